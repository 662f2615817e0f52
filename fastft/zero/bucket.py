"""What DeepSpeed holds beside the shards: gradients that it reduces at a time, weights that it gathers ahead."""

from __future__ import annotations

import os

import torch

from fastft.zero.parameters import whole_numel

REDUCE_BUCKET = 50_000_000  # elements; DeepSpeed's default, 500 M, is 2 GB in fp32
SMALL_BUCKET = 12_500_000  # of ZeRO 3 on a CPU, which reduces a larger gradient where it lies
PREFETCH = 50_000_000  # DeepSpeed's stage3_prefetch_bucket_size


def with_bucket(model: torch.nn.Module, settings: dict) -> dict:
    """DeepSpeed's settings with limits for what it holds beside the shards, where they were not asked for.

    It takes the whole bucket for reductions from memory; on a CPU, whose heap gives nothing back, anew at every step,
    in between what has come into its place. And ZeRO 3 would keep 1e9 elements of gathered weights for their next use:
    all of a model of less than that, on every rank.
    """
    zero = settings.get("zero_optimization", {})
    if not zero.get("stage"):
        return settings
    parameters = list(model.parameters())
    trained = sum(whole_numel(p) for p in parameters if p.requires_grad)
    largest = max(map(whole_numel, parameters))
    sharded, on_cpu = zero["stage"] == 3, os.environ.get("DS_ACCELERATOR") == "cpu"
    limits = {"reduce_bucket_size": reduced_at_once(trained, largest, sharded and on_cpu)}
    if sharded:
        limits |= gathered_at_once(largest, on_cpu)
    return {**settings, "zero_optimization": {**limits, **zero}}


def reduced_at_once(trained: int, largest: int, small: bool) -> int:
    """Elements of DeepSpeed's bucket for so many trained ones, the largest parameter of so many; ``small``: at ZeRO 3
    on a CPU.
    """
    return max(1, min(SMALL_BUCKET if small else max(REDUCE_BUCKET, largest), trained))


def gathered_at_once(largest: int, on_cpu: bool) -> dict[str, int]:
    """DeepSpeed's settings for weights that are gathered before they are needed, or kept until they are again: two of
    the largest, as elements. None of either on a CPU: the cores that would gather ahead are those that compute.
    """
    return {
        "stage3_max_live_parameters": 2 * largest,
        "stage3_max_reuse_distance": 0 if on_cpu else 2 * largest,
        "stage3_prefetch_bucket_size": 0 if on_cpu else min(PREFETCH, largest),
    }
