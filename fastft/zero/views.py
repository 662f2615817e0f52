"""Mixtures of experts at ZeRO 3: weights that are seen through views, and blocks that are gathered as one."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch


class View(NamedTuple):
    """Where a saved tensor is in a parameter that is gathered: size, stride and offset, in elements."""

    parameter: torch.nn.Parameter
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def keep_none(model: torch.nn.Module) -> None:
    """Have autograd keep where a view of a gathered weight is, and not the view, in modules whose weights have three
    dimensions or more.

    A weight that is used whole is let go of by ZeRO 3 after the forward, and is there again in the backward, for
    autograd keeps the parameter. A view of it (one expert of all) would hold the memory that it was gathered in until
    then, for every layer.
    """
    for module in model.modules():
        if any(p.dim() > 2 or len(getattr(p, "ds_shape", ())) > 2 for p in module.parameters(recurse=False)):
            module.forward = functools.partial(_forward, module, module.forward)


def need_gradients(model: torch.nn.Module) -> None:
    """Have the input of a block of experts need a gradient where its weights do, also where all before it is frozen.

    DeepSpeed gathers and reduces such a block as one, at the end of its backward, which torch finds by the gradients of
    its inputs: without one it is taken for the beginning.
    """
    from deepspeed.utils.z3_leaf_module import z3_leaf_module

    for module in model.modules():
        if z3_leaf_module(module) and any(p.requires_grad for p in module.parameters()):
            module.register_forward_pre_hook(_with_gradient, prepend=True)


def _with_gradient(module: torch.nn.Module, args: tuple) -> tuple | None:
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    first = next((t for t in tensors if t.is_floating_point()), None)
    if first is None or not torch.is_grad_enabled() or any(t.requires_grad for t in tensors):
        return None
    needing = first.detach().requires_grad_()
    return tuple(needing if a is first else a for a in args)


def _forward(module: torch.nn.Module, plain: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return plain(*args, **kwargs)
    own = [(p.data_ptr(), p.data_ptr() + p.nbytes, p) for p in module.parameters(recurse=False) if p.numel()]

    def pack(tensor: torch.Tensor) -> Any:
        at = tensor.data_ptr()
        for begin, end, parameter in own:
            if begin <= at < end and tensor.dtype == parameter.dtype:
                return View(parameter, tensor.size(), tensor.stride(), (at - begin) // tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
        return plain(*args, **kwargs)


def _unpack(kept: Any) -> torch.Tensor:
    if not isinstance(kept, View):
        return kept
    data = kept.parameter.data
    assert data.numel(), "ZeRO 3 gathers a module's weights before its backward"
    return data.as_strided(kept.size, kept.stride, data.storage_offset() + kept.offset)
