"""Rules: what is changed in a corpus's documents, and which are left out. One file each."""
