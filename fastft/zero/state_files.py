"""A nested state in one safetensors file: its tensors as the format has them, all else as JSON in its header.

Nothing that is read can name code: of classes a file holds those of KINDS, whose values are made here. Files of older
versions are pickles (see pickles.py).
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from fastft.models.weight_files import CODES, header, raw
from fastft.zero import pickles

SUFFIX, OLDER = ".safetensors", ".pt"
LARGEST = 90_000_000  # safetensors reads headers of up to 100 MB
STATE = "state"  # the key of the header's metadata


class Output(Protocol):
    def write(self, data: Any, /) -> Any: ...


def write(state: Any, out: Output) -> None:
    """Write a state: dicts, lists, tuples and sets of tensors in host memory, numbers, strings, None, and what KINDS
    has. TypeError for anything else, ValueError for too much beside the tensors.
    """
    tensors: list[torch.Tensor] = []
    tree = json.dumps(_plain(state, tensors), separators=(",", ":"))
    if len(tree) > LARGEST:
        raise ValueError(f"{len(tree):,} bytes beside the tensors are more than safetensors takes")
    # The largest elements first, as safetensors has it: every tensor is aligned.
    order = sorted(range(len(tensors)), key=lambda i: -tensors[i].element_size())
    out.write(header({str(i): (tuple(tensors[i].shape), tensors[i].dtype) for i in order}, **{STATE: tree}))
    for i in order:
        out.write(raw(tensors[i]))


def read(path: Path) -> Any:
    """The state in a file, a dict, its tensors mapped: one that is not used is not read. ValueError for a damaged
    file.
    """
    if path.suffix == OLDER:
        return pickles.load(path, map_location="cpu", mmap=True)
    try:
        with safe_open(path, "pt") as file:
            tree = json.loads((file.metadata() or {})[STATE])
            state = _value(tree, lambda name: file.get_tensor(str(name)))
            if not isinstance(state, dict):
                raise TypeError(f"a {type(state).__name__}, not a dict")
            return state
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as e:
        raise ValueError(f"it holds no state of fastft ({type(e).__name__}: {str(e)[:200]})") from None


def refused(path: Path) -> str | None:
    """Why a file is not read; None: it holds state alone. Its tensors are not read for that."""
    if path.suffix != SUFFIX:
        return pickles.refused(path)
    try:
        read(path)
    except ValueError as e:
        return str(e)
    return None


@cache
def _kinds() -> dict[str, tuple[type, Callable[[Any], Any], Callable[[Any], Any]]]:
    """Name in a file -> class, what stands for a value of it, and back."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return {
        "dict": (dict, lambda v: [list(item) for item in v.items()], dict),
        "tuple": (tuple, list, tuple),
        "set": (set, lambda v: sorted(v, key=repr), set),
        "size": (torch.Size, list, _size),
        "loss_scale": (LossScaler, lambda v: v.cur_scale, LossScaler),
        "stage": (ZeroStageEnum, int, ZeroStageEnum),
        "fragment": (fragment_address, lambda v: [v.numel, v.start], lambda v: fragment_address(*v)),
        "dtype": (torch.dtype, lambda v: CODES[v], {code: dtype for dtype, code in CODES.items()}.__getitem__),
    }


def _size(lengths: list[int]) -> torch.Size:
    if not all(type(n) is int and 0 <= n < 1 << 63 for n in lengths):
        raise ValueError(f"no size: {lengths[:8]}")
    return torch.Size(lengths)


def _plain(value: Any, tensors: list[torch.Tensor]) -> Any:
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if torch.is_tensor(value) and value.dtype in CODES:
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    if type(value) is list:
        return [_plain(v, tensors) for v in value]
    if type(value) is OrderedDict:  # of a module: with its versions
        items = [[_plain(k, tensors), _plain(v, tensors)] for k, v in value.items()]
        return {"ordered": [items, _plain(getattr(value, "_metadata", None), tensors)]}
    for name, (kind, taken, _) in _kinds().items():
        if type(value) is kind:
            return {name: _plain(taken(value), tensors)}
    of = f" of {value.dtype}" if torch.is_tensor(value) else ""
    raise TypeError(f"a {type(value).__module__}.{type(value).__qualname__}{of} cannot be kept in a checkpoint")


def _value(tree: Any, tensor: Callable[[Any], torch.Tensor]) -> Any:
    if isinstance(tree, list):
        return [_value(v, tensor) for v in tree]
    if not isinstance(tree, dict):
        return tree
    ((name, inner),) = tree.items()
    if name == "tensor":
        return tensor(inner)
    if name == "float":
        return float(inner)
    inner = _value(inner, tensor)
    if name == "ordered":
        items, versions = inner
        ordered: Any = OrderedDict(items)
        if versions is not None:
            ordered._metadata = versions
        return ordered
    return _kinds()[name][2](inner)
