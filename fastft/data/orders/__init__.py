"""Sample orders: which samples each step takes. One file each."""
