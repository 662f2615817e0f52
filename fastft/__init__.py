"""fastft: fine-tune pretrained language models at the hardware's limit."""

__version__ = "0.1.0"
