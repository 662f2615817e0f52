"""What a forward keeps for its backward, counted on a model without weights.

The model runs on torch's meta device, where tensors have shapes and no memory, and every tensor that autograd keeps is
counted once. Attention is counted as flash attention keeps it, and layers that fastft fuses by what the fused layer
keeps (`fastft.ops.decoder`).
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastft.models import layers
from fastft.models.switch import Switch
from fastft.models.trial import REFUSALS
from fastft.plan.memory import ACTIVATION_BYTES, CHECKPOINT_BYTES
from fastft.plan.setting import Kept

NAME = "fastft_plan"


@dataclass(frozen=True)
class How:
    """How a run computes the model.

    Attributes
    ----------
    fused : bool
        Layers of the known form as one function each.
    by_mask : bool
        Attention reads a mask, for which keys and values are repeated for each head.
    checkpointing : bool
        Layers keep their inputs only.
    widens : bool
        bf16 is computed in float32.
    whole : bool
        The head is no vocabulary's, so its forward is counted, too.
    eager : bool
        Attention as transformers writes it out, with all its probabilities.
    """

    fused: bool
    by_mask: bool
    checkpointing: bool
    widens: bool
    whole: bool
    eager: bool = False


def kept(model: Any, rows: int, width: int, how: How) -> Kept:
    """Of a forward of ``rows`` sequences of ``width`` tokens.

    Parameters
    ----------
    model : transformers model
        On the meta device. Its layers' forwards are replaced for good where they are fused.
    """
    try:
        return _traced(model, rows, width, how)
    except (*REFUSALS, AttributeError, KeyError):  # what model code does with values, which nothing has here
        return estimated(model, rows * width, how)


def estimated(model: Any, tokens: int, how: How) -> Kept:
    """By layers and hidden size alone, for models that cannot be run without values."""
    text = model.config.get_text_config()
    number, hidden = (getattr(text, name, None) or 0 for name in ("num_hidden_layers", "hidden_size"))
    unit = tokens * hidden * (2 if how.widens else next(model.parameters()).element_size() // 2)
    layer = ACTIVATION_BYTES * unit
    if how.checkpointing:
        return Kept(tokens, CHECKPOINT_BYTES * number * unit, layer, layer, traced=False)
    return Kept(tokens, number * layer, layer // 4, layer, traced=False)


def _traced(model: Any, rows: int, width: int, how: How) -> Kept:
    tokens = rows * width
    inside = blocks(model)
    counter = _Counter(model)
    sizes = [0] * len(inside)
    matches = [layers.match(block) if how.fused and _known(block) else "" for block in inside]
    if not how.fused or any(isinstance(found, str) for found in matches):
        matches = ["" for _ in inside]
    hooks = []
    for i, (block, found) in enumerate(zip(inside, matches, strict=True)):
        if isinstance(found, layers.Match):
            block.forward = _stub(block, found, how)

        def before(*_: Any, i: int = i) -> None:
            sizes[i] -= counter.total

        def after(*_: Any, i: int = i) -> None:
            sizes[i] += counter.total

        hooks += [block.register_forward_pre_hook(before), block.register_forward_hook(after)]
    training = model.training
    model.train()
    attention = Switch(model, NAME, _Attention(how))
    attention.take(not how.eager)
    try:
        with torch.enable_grad(), counter.counting():
            out = (model if how.whole else model.base_model)(**_inputs(model, rows, width))
            del out
    finally:
        attention.remove()
        model.train(training)
        for hook in hooks:
            hook.remove()
    text = model.config.get_text_config()
    hidden = tokens * text.hidden_size * next(model.parameters()).element_size()
    largest = max(sizes, default=0)
    outside = counter.total - sum(sizes)
    transient = max((_transient(found, tokens, how) for found in matches if isinstance(found, layers.Match)), default=0)
    transient = transient or 2 * counter.largest + 2 * hidden
    if how.checkpointing and inside:
        return Kept(tokens, outside + len(inside) * hidden, largest + transient, outside + largest + transient)
    return Kept(tokens, counter.total, transient, outside + (sizes[0] if sizes else 0) + transient)


def _known(block: nn.Module) -> bool:
    return hasattr(block, "self_attn") and hasattr(block, "mlp")


def blocks(model: nn.Module) -> list[Any]:
    """What activation checkpointing computes again: transformers' layers."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


def _inputs(model: Any, rows: int, width: int) -> dict[str, Any]:
    tokens = torch.zeros(rows, width, dtype=torch.int64, device="meta")
    inputs: dict[str, Any] = {"input_ids": tokens}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens
    if model.can_generate():
        inputs["use_cache"] = False
    return inputs


class _Counter:
    """Bytes of what autograd keeps, each piece of memory once, parameters and buffers not."""

    def __init__(self, model: nn.Module):
        self.own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        self.seen: dict[int, Any] = {}  # holds what it has counted, so that no other memory gets the same address
        self.total = self.largest = 0

    @contextmanager
    def counting(self) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.own and storage._cdata not in self.seen:
            self.seen[storage._cdata] = storage
            self.total += storage.nbytes()
            self.largest = max(self.largest, storage.nbytes())
        return tensor


class _Keep(torch.autograd.Function):
    """Returns its first tensor's likeness of ``shape`` and keeps all it is given, and tensors of so many elements."""

    @staticmethod
    def forward(ctx: Any, shape: tuple, extra: list[tuple[int, torch.dtype]], *tensors: Tensor) -> Tensor:
        made = [tensors[0].new_empty(n, dtype=dtype) for n, dtype in extra]
        out = tensors[0].new_empty(shape)
        ctx.save_for_backward(*tensors, *made)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise RuntimeError("nothing is computed on the meta device")


class _Attention:
    """transformers' attention interface: what flash attention keeps."""

    def __init__(self, how: How):
        self.how = how

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        rows, heads, length, _ = query.shape
        if self.how.by_mask and key.shape[1] != heads:
            key, value = (t.repeat_interleave(heads // key.shape[1], 1) for t in (key, value))
        out = _Keep.apply(
            (rows, length, heads, value.shape[-1]),
            [(query.numel(), query.dtype), (rows * heads * length, torch.float32)],  # the output, and its logsumexp
            query,
            key,
            value,
        )
        return out, None


def _stub(block: Any, found: layers.Match, how: How) -> Any:
    """A forward that keeps what `fastft.ops.decoder`'s layer keeps."""
    width = block.mlp.gate_proj.out_features
    weight = block.mlp.gate_proj.weight  # trained even where nothing before it is

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        tokens, d = hidden_states.numel() // hidden_states.shape[-1], hidden_states.shape[-1]
        dtype = torch.float32 if how.widens else hidden_states.dtype
        inner = found.shape.heads * found.shape.dim
        qkv = inner + 2 * found.shape.groups * found.shape.dim
        kept = [(tokens * n, dtype) for n in (qkv, inner, d, 2 * width)]
        kept.append((tokens * (2 + found.shape.heads), torch.float32))  # of both norms, and the logsumexp
        return _Keep.apply(hidden_states.shape, kept, hidden_states, weight)

    return forward


def _transient(found: layers.Match, tokens: int, how: How) -> int:
    """Most that the fused layer's backward holds beside what was kept: gradients of hidden states, of the attention's
    output and of query, key and value; where bf16 is computed in float32, the layer's weights and their gradients.
    """
    gate = found.layer.mlp.gate_proj
    shape = found.shape
    element = 4 if how.widens else gate.weight.element_size()
    inside = 4 * gate.in_features + (2 * shape.heads + 2 * shape.groups) * shape.dim
    held = tokens * element * max(gate.out_features + gate.in_features, inside)
    if how.widens:
        held += 2 * 4 * sum(p.numel() for p in found.layer.parameters())
    return held
