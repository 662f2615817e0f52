"""What a rank's memory is reckoned from: the model's parameters, what a forward keeps, and the run's settings."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tensors:
    """A model's parameters.

    Attributes
    ----------
    trained, frozen : int
        Elements.
    trained_bytes, frozen_bytes : int
    embedding_bytes : int
        The gradient of the input embedding; 0 where it is not trained.
    head : tuple of int or None
        Rows and columns of the output head whose loss is taken over a vocabulary.
    head_trained, tied : bool
        Whether the head is trained, and whether it is the input embedding.
    largest, block : int
        The largest parameter, and all of the largest layer.
    """

    trained: int
    frozen: int
    trained_bytes: int
    frozen_bytes: int
    embedding_bytes: int = 0
    head: tuple[int, int] | None = None
    head_trained: bool = False
    tied: bool = False
    largest: int = 0
    block: int = 0

    @property
    def whole(self) -> int:
        return self.trained_bytes + self.frozen_bytes


@dataclass(frozen=True)
class Kept:
    """What a forward of ``tokens`` tokens keeps.

    Attributes
    ----------
    layers : int
        For the backward pass, of everything but the head.
    transient : int
        Most that the backward of one layer takes beside it; with activation checkpointing also what is computed again.
    ends : int
        What is still kept when the backward reaches the embedding.
    traced : bool
        Counted on the model without weights; False: an estimate from layers and hidden size.
    """

    tokens: int
    layers: int
    transient: int
    ends: int
    traced: bool = True


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What of a run's configuration and machine decides its memory.

    Attributes
    ----------
    bucket : int
        Elements that DeepSpeed reduces at a time.
    reuse, prefetch : int
        Elements within which ZeRO 3 keeps a gathered weight for its next use, and which it gathers ahead.
    states : int
        State tensors that the optimizer keeps for each parameter, of ``state_dtype``.
    master : str
        fp32, remainder or stochastic, for bf16 weights.
    accumulates : bool
        Whether a step has several micro-steps.
    widens : bool
        Whether a CPU computes bf16 in float32.
    fused_loss : bool
        linear_cross_entropy: never all logits.
    offload : str or None
        "optimizer" or "parameters": what is in the host's memory, or in files on its disk (``on_disk``).
    """

    bucket: int
    reuse: int = 0
    prefetch: int = 0
    device: str = "cuda"
    zero: int = 0
    ranks: int = 1
    bf16: bool = True
    master: str = "fp32"
    states: int = 2
    state_dtype: str = "fp32"
    accumulates: bool = False
    widens: bool = False
    fused_loss: bool = True
    adapter_only: bool = False
    offload: str | None = None
    on_disk: bool = False

    @property
    def element(self) -> int:
        """Bytes of a weight, and of its gradient."""
        return 2 if self.bf16 else 4
