"""Optimizers."""

from fastft.optim.adamw import FusedAdamW, set_offset

__all__ = ["FusedAdamW", "set_offset"]
