"""What a caller of cross_entropy and its siblings may get wrong."""

import math

import torch
from torch import Tensor

_REDUCTIONS = ("mean", "sum", "none")


def check(logits, target, weight, token_weight, label_smoothing, reduction, softcap, inplace) -> None:
    """ValueError for logits, labels and options that do not fit together."""
    if target.is_floating_point():
        raise ValueError("target holds class probabilities, which are not supported: give int64 class indices")
    if logits.ndim < 1 or logits.shape[:-1] != target.shape:
        raise ValueError(
            f"logits must be (..., V) and target (...); got {tuple(logits.shape)} and {tuple(target.shape)}. "
            "torch's (N, C, d1, ...) layout is not taken: move the class dimension to the end"
        )
    if logits.shape[-1] == 0:
        raise ValueError("logits have no classes: the last dimension is 0")
    if not logits.is_floating_point():
        raise ValueError(f"logits must be floating, not {logits.dtype}")
    check_options(logits, target, logits.shape[-1], weight, token_weight, label_smoothing, reduction, softcap)
    if inplace and reduction == "none":
        raise ValueError(
            'inplace=True needs reduction "mean" or "sum": with "none" the gradient is known only in the backward'
        )
    # A compiler makes of every write one into a copy of its own, and has no numbers for strides that may change.
    if inplace and not torch.compiler.is_compiling() and _overlaps(logits):
        raise ValueError(
            "inplace=True needs logits whose elements have memory of their own; these are expanded or overlapping: "
            "pass logits.contiguous()"
        )
    if inplace and logits.is_leaf and logits.requires_grad:
        raise ValueError("inplace=True would overwrite a leaf that requires grad")


def check_options(
    of, target, vocab, weight, token_weight, label_smoothing, reduction, softcap, weight_name="weight"
) -> None:
    """ValueError for labels and options that do not fit. `of`: the logits, or the hidden states they come from."""
    if target.dtype != torch.int64:
        raise ValueError(
            f"target must be int64 class indices, not {target.dtype} (class probabilities are not supported)"
        )
    for name, tensor in (("target", target), (weight_name, weight), ("token_weight", token_weight)):
        if tensor is not None and tensor.device != of.device:
            raise ValueError(f"{name} is on {tensor.device}, not on {of.device}")
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{name} requires grad, and gets none from cross-entropy; pass {name}.detach()")
    if weight is not None and weight.shape != (vocab,):
        raise ValueError(f"{weight_name} must be (V,) = ({vocab},), not {tuple(weight.shape)}")
    if token_weight is not None and token_weight.ndim and token_weight.shape != target.shape:
        raise ValueError(
            f"token_weight must be 0-dim or like target {tuple(target.shape)}, not {tuple(token_weight.shape)}"
        )
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be within [0, 1], not {label_smoothing}")
    if reduction not in _REDUCTIONS:
        raise ValueError(f"unknown reduction {reduction!r}; known: {', '.join(_REDUCTIONS)}")
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"softcap must be positive and finite, or None, not {softcap}")


def _overlaps(tensor: Tensor) -> bool:
    """Whether two elements may share memory (True also for layouts that interleave without sharing)."""
    extent = 1
    for stride, size in sorted(
        (stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1
    ):
        if stride < extent:
            return True
        extent += (size - 1) * stride
    return False
