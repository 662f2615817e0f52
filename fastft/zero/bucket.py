"""How many gradients DeepSpeed reduces at a time."""

from __future__ import annotations

import torch

from fastft.zero.parameters import whole_numel

REDUCE_BUCKET = 500_000_000  # elements: DeepSpeed's reduce_bucket_size


def with_bucket(model: torch.nn.Module, settings: dict) -> dict:
    """DeepSpeed's settings with a bucket for reductions that is no larger than all gradients together, where none was
    asked for: it takes the whole of it from memory, 500 M elements; on a CPU, whose heap gives nothing back, anew at
    every step, in between what has come into its place.
    """
    zero = settings.get("zero_optimization", {})
    if not zero.get("stage") or "reduce_bucket_size" in zero:
        return settings
    trained = sum(whole_numel(p) for p in model.parameters() if p.requires_grad)
    return {**settings, "zero_optimization": {**zero, "reduce_bucket_size": reduced_at_once(trained)}}


def reduced_at_once(trained: int) -> int:
    """Elements of DeepSpeed's bucket for so many trained ones, where none was asked for."""
    return max(1, min(REDUCE_BUCKET, trained))
