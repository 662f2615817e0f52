"""Sequences cut over ranks: each rank computes its part of every sequence, and in attention whole sequences for its
part of the heads (DeepSpeed-Ulysses: Jacobs et al. 2023, arXiv 2309.14509).

The exchange is Ulysses'; what a token sees is ours. DeepSpeed's wrapper for transformers gives attention no mask of the
whole sequence, and packed documents see each other. Here a forward is told where documents begin in the whole
sequences, before they are cut, and attention is by document as on one rank (`fastft.models.documents`). That the
model's logits are those of whole sequences is measured on the model before training, and so are the gradients that come
back through the exchange.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastft.errors import UserError
from fastft.models import documents
from fastft.models.documents import MASKS, bounds_of
from fastft.models.switch import Switch, proven
from fastft.ops.decoder.attention import kernels
from fastft.ranks import Ranks

NAME = "fastft_sequence_parallel"
KEYS = "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"


class SequenceParallel(Switch):
    """A model that computes this rank's part of the sequences that it is given, which are the same on all ranks of a
    sequence group.

    It does so in every forward without a cache and a mask. Logits are gathered: the same on all these ranks, without a
    way back for gradients; but in ``parts()`` they are those of this rank's part. The tokens of a sequence are padded
    to a multiple of the ranks.

    Attributes
    ----------
    sentence : str
        How attention is computed, for the record.
    """

    sentence = ""

    def __init__(self, model: nn.Module, ranks: Ranks):
        super().__init__(model, NAME, self._attend)
        self.rank, self.world, self.group = ranks.sequence_rank, ranks.sequence_world, ranks.sequence_group
        self.gathers, self.length = True, 0
        self.hooks.append(model.register_forward_pre_hook(self._before, with_kwargs=True))
        self.hooks.append(model.register_forward_hook(self._after))

    def cut(self, whole: Tensor, fill: int = 0) -> Tensor:
        """This rank's part (rows, ceil(tokens / ranks), ...) of whole sequences (rows, tokens, ...), which end in
        ``fill`` where they do not divide.
        """
        padding = whole.new_full((whole.shape[0], -whole.shape[1] % self.world, *whole.shape[2:]), fill)
        return torch.cat([whole, padding], 1).chunk(self.world, 1)[self.rank]

    def gather(self, part: Tensor, length: int) -> Tensor:
        """Whole sequences of ``length`` tokens from the parts of all ranks of the group; no gradient goes back."""
        part = part.detach().contiguous()
        every = [torch.empty_like(part) for _ in range(self.world)]
        dist.all_gather(every, part, group=self.group)
        return torch.cat(every, 1)[:, :length]

    @contextmanager
    def parts(self) -> Iterator[None]:
        """While inside, what a forward returns is of this rank's part."""
        self.gathers = False
        try:
            yield
        finally:
            self.gathers = True

    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        bounds, _, longest, _ = (kwargs.pop(name, None) for name in KEYS)
        cut = self.on and kwargs.get("use_cache") is False and all(kwargs.get(name) is None for name in MASKS)
        self.take(cut)
        self.length = 0
        if not cut:
            return args, kwargs
        tokens, positions = kwargs["input_ids"], kwargs.get("position_ids")
        rows, self.length = tokens.shape
        if positions is None:
            positions = torch.arange(self.length, device=tokens.device)[None]
        positions = positions.expand(rows, -1)
        padding = -self.length % self.world
        if bounds is None or padding:
            more = torch.arange(padding, device=tokens.device).expand(rows, -1)  # one more document
            positions = torch.cat([positions, more], 1)
            bounds, longest = bounds_of(positions, positions)
        kwargs |= {"input_ids": self.cut(tokens), "position_ids": self.cut(positions)}
        kwargs |= dict(zip(KEYS, (bounds, bounds, longest, longest), strict=True))
        return args, kwargs

    def _after(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if self.length and self.gathers:
            output["logits"] = self.gather(output.logits, self.length)
        return output

    def _attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        """transformers' attention interface, of this rank's tokens and all heads."""
        if not query.shape[2] == key.shape[2] == value.shape[2]:
            raise ValueError("queries and keys are of different lengths")
        if not query.shape[3] == key.shape[3] == value.shape[3]:
            raise ValueError("its queries, keys and values are of different sizes")
        query, key, value = self._to_heads(query, key, value)
        out, _ = documents.attend(module, query, key, value, attention_mask, **options)
        return self._to_tokens(out), None

    def _to_heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All tokens of this rank's heads, from this rank's tokens (rows, heads, tokens, dim) of all heads, in one
        exchange. Where ranks do not divide the groups of keys and values, each rank gets those that its heads need.
        """
        rows, _, length, dim = query.shape
        groups, world = key.shape[1], self.world
        copies = math.lcm(groups, world) // groups
        key, value = (t.repeat_interleave(copies, 1) if copies > 1 else t for t in (key, value))
        parts = [t.reshape(rows, world, -1, length, dim) for t in (query, key, value)]
        found = _Exchange.apply(torch.cat(parts, 2).movedim(1, 0), self.group)  # (ranks, rows, heads, tokens, dim)
        whole = found.permute(1, 2, 0, 3, 4).reshape(rows, -1, world * length, dim)
        query, key, value = whole.split([part.shape[2] for part in parts], 1)
        return query, key, value

    def _to_tokens(self, out: Tensor) -> Tensor:
        """This rank's tokens of all heads, from all tokens (rows, tokens, heads, dim) of its heads."""
        rows, _, heads, dim = out.shape
        parts = out.reshape(rows, self.world, -1, heads, dim).movedim(1, 0)
        found = _Exchange.apply(parts, self.group)  # (ranks, rows, tokens, heads, dim): a rank's heads
        return found.permute(1, 2, 0, 3, 4).reshape(rows, -1, self.world * heads, dim)


class _Exchange(torch.autograd.Function):
    """Part i of the first dimension to rank i, and one from each; its gradient goes the same way back."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: Any) -> Tensor:
        ctx.group = group
        parts = parts.contiguous()
        found = torch.empty_like(parts)
        dist.all_to_all_single(found, parts, group=group)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Exchange.apply(grad, ctx.group), None


def install(forward: Callable, model: Any, ranks: Ranks, length: int, device: torch.device) -> SequenceParallel:
    """Cut the model's sequences over the ranks of each sequence group, once its logits are found to be the same.

    Parameters
    ----------
    forward : callable
        The model, or the engine around it, on ``device``.
    length : int
        Tokens of the longest row in training.

    Raises
    ------
    UserError
        The model cannot be computed in parts of sequences; on all ranks.
    """
    installed = None
    if not (reason := documents.refused(model, device)):
        installed = SequenceParallel(model, ranks)
        tokens, dtype = documents.probe_length(model, length), next(model.parameters()).dtype

        def difference() -> float:
            for found in ranks.gather(_difference_of_attention(installed, model, device)):
                if not found <= (1e-4 if dtype == torch.float32 else 5e-2):
                    raise ValueError(f"attention and its gradients differ from those of whole sequences by {found:.2g}")
            return documents.difference(installed, forward, model, tokens, device)

        reason = proven(installed, difference, dtype, "whole sequences on one rank")
    if installed is None or reason:
        raise UserError(
            f"parallel.sequence: {ranks.sequence_world}: {type(model).__name__} cannot be computed in parts of its "
            f"sequences: {reason}.",
            "Set parallel.sequence: 1; parallel.activation_checkpointing: true and a higher parallel.zero save memory "
            "too.",
        )
    groups = getattr(model.config.get_text_config(), "num_key_value_heads", 1)
    by = kernels(documents.query_of(model, device), groups)
    installed.sentence = (
        f"sequences over {ranks.sequence_world} ranks, whole ones for a part of the heads each, by {by}"
    )
    return installed


def _difference_of_attention(installed: SequenceParallel, model: Any, device: torch.device) -> float:
    """Largest difference of attention and its gradients, of random heads like the model's, from those of whole
    sequences on this rank, each relative to its largest value.
    """
    like = documents.query_of(model, device)
    _, heads, dim = like.shape
    groups = getattr(model.config.get_text_config(), "num_key_value_heads", None) or heads
    length = 8 * installed.world
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad = (
        torch.randn(1, n, length, dim, generator=generator).to(like) for n in (heads, groups, groups, heads)
    )
    bounds = torch.tensor([0, length // 3, length], dtype=torch.int32, device=device)
    options = dict(zip(KEYS, (bounds, bounds, length - length // 3, length - length // 3), strict=True))

    def part(whole: Tensor) -> Tensor:
        return whole.chunk(installed.world, 2)[installed.rank]

    def run(attend: Callable, given: Callable[[Tensor], Tensor]) -> list[Tensor]:
        inputs = [given(t).detach().clone().requires_grad_() for t in (query, key, value)]
        with torch.enable_grad():
            out, _ = attend(nn.Module(), *inputs, None, **options)
        found = torch.autograd.grad(out, inputs, given(grad).transpose(1, 2))
        return [out.transpose(1, 2), *found]

    own = run(installed._attend, part)
    expected = [part(whole) for whole in run(documents.attend, lambda whole: whole)]
    return max(((a - b).abs().max() / b.abs().max().clamp_min(1e-6)).item() for a, b in zip(own, expected, strict=True))
