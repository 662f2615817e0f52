"""The fused ops. Each has a readable reference in PyTorch and faster backends; see `fastft.ops.backends`."""

from fastft.ops.adamw import adamw
from fastft.ops.backends import BackendError, choices
from fastft.ops.cross_entropy import bad_target, cross_entropy
from fastft.ops.linear_cross_entropy import linear_cross_entropy
from fastft.ops.sum_squares import sum_squares
from fastft.ops.vocab_parallel import vocab_parallel_cross_entropy

__all__ = [
    "BackendError",
    "adamw",
    "bad_target",
    "choices",
    "cross_entropy",
    "linear_cross_entropy",
    "sum_squares",
    "vocab_parallel_cross_entropy",
]
