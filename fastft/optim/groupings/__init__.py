"""Rules that put parameters into groups with learning rates of their own. One file each."""
