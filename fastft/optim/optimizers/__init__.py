"""Optimizers by name. One file each."""
