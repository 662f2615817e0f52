"""Optimizers, parameter groups and learning-rate schedules."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastft.optim.adamw import FusedAdamW as FusedAdamW
    from fastft.optim.adamw import set_offset as set_offset


def __getattr__(name: str) -> Any:
    """FusedAdamW and set_offset, imported with torch when they are asked for."""
    if name in ("FusedAdamW", "set_offset"):
        from fastft.optim import adamw

        return getattr(adamw, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
