"""Publish an adapter: its card, its licence's notice, and the upload to the Hugging Face hub."""
