"""Optimizers."""

from fastft.optim.adamw import FusedAdamW

__all__ = ["FusedAdamW"]
