"""Loading, checking and saving Hugging Face models."""
