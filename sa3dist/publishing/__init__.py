"""What goes to other people with an adapter: its card, its licence's notice, and the upload to the Hugging Face hub."""
