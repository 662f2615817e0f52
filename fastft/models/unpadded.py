"""Encoders without padding: a batch's rows go through the encoder's layers one after the other, and are padded again
for the head.

A batch says which of its places are tokens and where its documents begin (``positions``, made on the host where rows
are padded, so that nothing waits for a device). A forward that does not say it runs as before. That the model's logits
are the same both ways is measured on the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastft.models.switch import Switch, proven, refuse
from fastft.models.trial import on_device, trial
from fastft.ops.decoder.attention import refuses
from fastft.ops.encoder_attention import attention

NAME = "fastft_unpadded"
KEYS = ("rows_at", "cu_seq_lens_q", "max_length_q")


def positions(documents: np.ndarray) -> dict[str, Any]:
    """What a padded batch says of its tokens.

    Parameters
    ----------
    documents : (rows, width) int
        Which document of its row each token belongs to; below 0: padding. A row that is one document: 0 throughout.

    Returns
    -------
    dict
        ``rows_at`` (tokens,) int64: their places in the flat batch; ``cu_seq_lens_q`` (documents + 1,) int32: where
        each document begins among them; ``max_length_q``: tokens of the longest. Of padding alone: its first place.
    """
    at = np.flatnonzero(documents >= 0)
    if not len(at):
        at = np.zeros(1, np.int64)
    which = documents.ravel()[at] + at // documents.shape[1] * (int(documents.max()) + 1)
    bounds = np.concatenate([[0], np.flatnonzero(np.diff(which)) + 1, [len(at)]])
    ends = torch.from_numpy(bounds.astype(np.int32))
    return {"rows_at": torch.from_numpy(at), "cu_seq_lens_q": ends, "max_length_q": int(np.diff(bounds).max())}


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query, key and value (1, heads, tokens, dim); the result
    (1, tokens, heads, dim).

    Raises ValueError for what it cannot compute: a causal decoder, a cap on the logits, relative positions, windows.
    """
    bounds, longest = options.get("cu_seq_lens_q"), options.get("max_length_q")
    if bounds is None or longest is None:
        raise ValueError("the model does not hand the rows' bounds to its attention")
    for name in ("softcap", "s_aux", "position_bias", "head_mask", "sliding_window"):
        if options.get(name) is not None:
            raise ValueError(f"its attention has {name}")
    if getattr(module, "is_causal", False) or options.get("is_causal"):
        raise ValueError("its attention is causal")
    if attention_mask is not None or query.shape != key.shape or query.shape[0] != 1:
        raise ValueError("its attention is given more than the tokens themselves")
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attention(q, k, v, bounds, longest, scale, dropout)[None], None


class Unpadded(Switch):
    """A model whose encoder runs without padding where a forward says where its tokens are."""

    def __init__(self, model: nn.Module, stack: nn.Module):
        super().__init__(model, NAME, attend)
        self.rows: tuple[Tensor, Tensor, int] | None = None
        self.shape = torch.Size()
        self.hooks += [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            stack.register_forward_pre_hook(self._strip, with_kwargs=True),
            stack.register_forward_hook(self._pad),
        ]

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        at, bounds, longest = (kwargs.pop(name, None) for name in KEYS)
        self.rows = None if at is None or not self.on else (at, bounds, longest)
        self.take(self.rows is not None)
        if self.rows is not None:
            kwargs = {**kwargs, "attention_mask": None}
        return args, kwargs

    def _strip(self, stack: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if self.rows is None:
            return args, kwargs
        at, bounds, longest = self.rows
        named = not args
        hidden = kwargs["hidden_states"] if named else args[0]
        self.shape = hidden.shape
        tokens = hidden.flatten(0, 1).index_select(0, at)[None]
        kwargs = {**kwargs, "cu_seq_lens_q": bounds, "max_length_q": longest}
        return ((), {**kwargs, "hidden_states": tokens}) if named else ((tokens, *args[1:]), kwargs)

    def _pad(self, stack: nn.Module, args: tuple, output: Any) -> Any:
        if self.rows is None:
            return output
        hidden = output if isinstance(output, Tensor) else output[0]
        whole = hidden.new_zeros(self.shape[0] * self.shape[1], hidden.shape[-1])
        whole = whole.index_copy(0, self.rows[0], hidden[0]).view(*self.shape[:2], -1)
        if isinstance(output, Tensor):
            return whole
        if isinstance(output, tuple):
            return (whole, *output[1:])
        output["last_hidden_state"] = whole
        return output


def stack_of(model: Any) -> nn.Module | str:
    """The module that runs hidden states through all layers, or why there is none."""
    config = model.config.get_text_config()
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "is_decoder", False):
        return "it is no encoder"
    layers = getattr(config, "num_hidden_layers", None)
    found = [
        module
        for module in model.modules()
        for child in module.children()
        if isinstance(child, nn.ModuleList) and len(child) == layers and not isinstance(child[0], nn.Linear)
    ]
    if len(found) != 1:
        return "its layers are not in one place"
    if any(isinstance(child, nn.Embedding) for child in found[0].modules()):
        return "its layers and embeddings are in one module, or its positions are relative"
    return found[0]


def install(
    forward: Callable, model: Any, choice: str, inputs: dict[str, Any], device: torch.device
) -> tuple[Unpadded | None, str]:
    """Layers without padding where that gives the model's own logits, measured on rows of several lengths.

    Parameters
    ----------
    forward : callable
        The model, or the engine around it, on ``device``.
    choice : str
        model.attention: "varlen", or "auto".
    inputs : dict
        The model's inputs of some rows, as the task pads them, with what ``positions`` says of them.

    Returns
    -------
    (Unpadded or None, str)
        What was put into the model, and why, or why not.

    Raises
    ------
    UserError
        "varlen" was asked for and cannot be had.
    """
    if choice not in ("auto", "varlen"):
        return None, "asked for"
    reason = _refused(model, device)
    if not reason:
        stack = stack_of(model)
        assert isinstance(stack, nn.Module)
        installed, dtype = Unpadded(model, stack), next(model.parameters()).dtype
        given = {name: on_device(value, device) for name, value in inputs.items()}
        reason = proven(installed, lambda: _difference(installed, forward, model, given, device), dtype, "padded rows")
        if not reason:
            return installed, "automatic" if choice == "auto" else "asked for"
    refuse(model, choice, reason)
    return None, reason


def _refused(model: Any, device: torch.device) -> str:
    stack = stack_of(model)
    if isinstance(stack, str):
        return stack
    config = model.config.get_text_config()
    heads, size = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    if not heads or not size:
        return "its config does not say how many heads it has"
    return refuses(torch.empty(0, heads, size // heads, dtype=next(model.parameters()).dtype, device=device))


def _difference(installed: Unpadded, forward: Callable, model: Any, inputs: dict, device: torch.device) -> float:
    """Largest difference of logits of real tokens, relative to the largest one."""
    with trial(model, device, training=True):  # there it may ask for what is refused
        forward(**inputs)
    with trial(model, device):
        found = forward(**inputs).logits.float()
        with installed.off():
            expected = forward(**inputs).logits.float()
    if found.dim() == 3 and found.shape[:2] == inputs["input_ids"].shape:  # a head for each token
        found, expected = (t.flatten(0, 1)[inputs["rows_at"]] for t in (found, expected))
    return ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-6)).item()
