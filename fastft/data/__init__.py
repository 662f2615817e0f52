"""From files to packed, hashed, memory-mapped examples, and the order they are seen in."""
