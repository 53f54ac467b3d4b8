"""What is published with an adapter: its card, the licence's notice, and the upload to the Hugging Face hub."""
