"""The output head of a Hugging Face model as a loss: hidden states go in,
linear_cross_entropy's loss comes out, logits are never all there.

The head module itself is called, by the model, where it always is: its forward hooks run, so ZeRO-3 gathers its weight
and FSDP, PEFT and tied embeddings find what they expect. Only while targets are set does its forward return a loss
instead of logits; generation, evaluation of logits, state dict names and save_pretrained never meet it. What the model
does to the logits afterwards (Gemma 2's cap, Granite's and Cohere's scale, BART's bias) goes into the op instead; that
this list is complete for the model at hand is measured before training, not assumed.
"""

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastft.errors import UserError
from fastft.ops import BackendError, cross_entropy, linear_cross_entropy

# weight (V, H), bias (V,), low_rank; see linear_cross_entropy
Parts = tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]


class HeadError(ValueError):
    """The model's loss cannot go through its head; the message says why."""


@dataclass
class _Call:
    """What the head's next forward is to compute, and what became of it."""

    target: Tensor
    options: dict
    losses: list[Tensor]
    rows: Tensor | None = None


class FusedHead:
    """A model whose loss can be taken at its head.

    Parameters
    ----------
    model : transformers model or PEFT model
        Causal or sequence-to-sequence, its logits being head(hidden states), perhaps scaled, capped or shifted as
        ``after`` says. The head is a Linear, PEFT's LoRA of one, or any module with a method ``loss_parts(hidden) ->
        (weight, bias, low_rank)``.

    Raises
    ------
    HeadError
        There is no such head.
    """

    def __init__(self, model: nn.Module):
        get_head: Any = model.get_output_embeddings  # a method, which nn.Module's type does not know
        self.head = get_head()
        if self.head is None:
            raise HeadError(f"{type(model).__name__} has no output embeddings")
        self.parts_of = _parts_of(self.head)
        self.after = post_processing(model)
        self._call: _Call | None = None
        self.aux_loss: Tensor | None = None  # of the model's last output: a mixture of experts' balancing loss
        self._plain = self.head.forward
        self.head.forward = types.MethodType(_forward_of(self), self.head)
        self._own_foreign_parameters()

    def remove(self) -> None:
        """Give the head its own forward back."""
        del self.head.forward

    def loss(
        self, model: Callable, inputs: dict, target: Tensor, *, rows: Tensor | None = None, **options: Any
    ) -> Tensor:
        """linear_cross_entropy of the model's hidden states against target.

        Parameters
        ----------
        model : callable
            The model, or a DeepSpeed engine around it.
        inputs : dict
            Its keyword arguments, without labels: those would make it compute a loss of its own, from logits that are
            not there.
        target : (B, T) int64
            What each position of the head's input is to predict: not shifted.
        rows : (n,) int64, optional
            Positions of the flattened target that are looked at, the others being ignored: where few have a target the
            head's product is taken of those alone.
        **options
            Of linear_cross_entropy, but for bias, low_rank, softcap and logit_scale, which the model brings.

        Returns
        -------
        Tensor
            The loss, in the graph behind all of the head's hooks.
        """
        with self._expecting(target, options, rows) as call:
            output = model(**inputs)
        self.aux_loss = getattr(output, "aux_loss", None)
        if len(call.losses) != 1:
            raise HeadError(f"the head was called {len(call.losses)} times in one forward of the model")
        shape = target.shape if options.get("reduction") == "none" else ()
        return call.losses[0].reshape(shape)

    @contextmanager
    def _expecting(self, target: Tensor, options: dict, rows: Tensor | None) -> Iterator[_Call]:
        self._call = call = _Call(target, options, [], rows)
        # Registered now, so that it runs after every other hook of the head: what ZeRO-3's return is what has to go
        # into the backward, or the weight is not gathered again when its gradient arrives.
        hook = self.head.register_forward_hook(lambda _module, _inputs, output: call.losses.append(output))
        try:
            yield call
        finally:
            hook.remove()
            self._call = None

    def _own_foreign_parameters(self) -> None:
        """Parameters of the head's children are used without calling the children:
        ZeRO-3 has to gather them for the head itself.
        """
        own = {id(p) for p in self.head.parameters(recurse=False)}
        foreign = [p for p in self.head.parameters() if id(p) not in own]
        if foreign:
            from fastft.zero.parameters import used_by

            used_by(self.head, foreign)


def install(forward: Callable, model: nn.Module, inputs: dict, choice: str) -> tuple[FusedHead | None, str]:
    """A FusedHead where it gives the model's own loss, measured on inputs.

    Parameters
    ----------
    forward : callable
        The model, or the engine around it.
    inputs : dict
        Keyword arguments of a small forward of the model, without labels; on the model's device.
    choice : {"auto", "linear_cross_entropy", "cross_entropy"}
        The configuration's loss.implementation.

    Returns
    -------
    (FusedHead or None, str)
        The head, and why this was chosen. With None the loss is to be taken from the model's logits.

    Raises
    ------
    UserError
        linear_cross_entropy was asked for and does not give the model's loss.
    """
    if choice == "cross_entropy":
        return None, "asked for"
    head = None
    try:
        head = FusedHead(model)
        difference = _difference(head, forward, model, inputs)
    except (HeadError, BackendError, ValueError) as error:
        reason = str(error)
    else:
        # fp32: sums in another order; bf16: logits of size 10 carry errors of 0.04, of which each of two paths has its
        # own.
        allowed = 1e-4 if next(head.head.parameters()).dtype == torch.float32 else 5e-2
        if difference <= allowed:
            return head, "asked for" if choice == "linear_cross_entropy" else "automatic"
        reason = f"its losses differ from those of the model's logits by {difference:.2g} (allowed {allowed:.0e})"
    if head is not None:
        head.remove()
    if choice == "linear_cross_entropy":
        raise UserError(
            f"loss.implementation: linear_cross_entropy cannot be used for {type(model).__name__}: {reason}.",
            "Set loss.implementation: auto or cross_entropy.",
        )
    return None, reason


def post_processing(model: nn.Module) -> dict:
    """What this model does to its head's output, as options of linear_cross_entropy plus ``shift``,
    a (V,) buffer to be added.

    By the names that transformers' models use: final_logit_softcapping (Gemma 2 and 3n), logits_scaling (Granite: a
    divisor), logit_scale (Cohere: a factor), final_logits_bias (BART, Marian, Pegasus).
    """
    whole: Any = model.config
    config = whole.get_text_config(decoder=True)
    found: dict = {}
    if cap := getattr(config, "final_logit_softcapping", None):
        found["softcap"] = float(cap)
    if divisor := getattr(config, "logits_scaling", None):
        found["logit_scale"] = 1.0 / divisor
    elif isinstance(factor := getattr(config, "logit_scale", None), (int, float)):
        found["logit_scale"] = float(factor)
    shift = getattr(model, "final_logits_bias", None)
    if shift is not None:
        found["shift"] = shift[0]
    return found


def input_embedding(model: Any) -> nn.Module | None:
    """The module that embeds the vocabulary; None where there is none, or transformers does not know it (CANINE)."""
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return None


def _forward_of(fused: FusedHead) -> Callable:
    def forward(self, hidden: Tensor, *args, **kwargs) -> Tensor:
        call = fused._call
        if call is None:
            return fused._plain(hidden, *args, **kwargs)
        if hidden.shape[:-1] != call.target.shape:
            raise HeadError(f"targets are {tuple(call.target.shape)}, the head's input is {tuple(hidden.shape)}")
        target = call.target
        if call.rows is not None:
            hidden = hidden.flatten(0, -2).index_select(0, call.rows)
            target = target.flatten().index_select(0, call.rows)
        weight, bias, low_rank = fused.parts_of(hidden)
        after = dict(fused.after)
        if (shift := after.pop("shift", None)) is not None:
            bias = shift.to(hidden.dtype) if bias is None else bias + shift
        loss = linear_cross_entropy(hidden, weight, target, bias=bias, low_rank=low_rank, **after, **call.options)
        if call.rows is not None and call.options.get("reduction") == "none":
            loss = loss.new_zeros(call.target.numel()).index_copy(0, call.rows, loss)
        # In the shape of logits with one class, so that what the model does to logits next goes through; nobody reads
        # the result.
        return loss.reshape(1, -1, 1)

    return forward


def _parts_of(head: Any) -> Callable[[Tensor], Parts]:
    if hasattr(head, "loss_parts"):
        return head.loss_parts
    if type(head) is nn.Linear:
        return lambda hidden: (head.weight, head.bias, None)
    if hasattr(head, "lora_A") and hasattr(head, "get_base_layer"):
        return _lora_parts_of(head)
    raise HeadError(f"its head is a {type(head).__name__}, not a Linear layer")


def _lora_parts_of(head: Any) -> Callable[[Tensor], Parts]:
    """peft.tuners.lora.Linear: W x + sum over adapters of scaling * B A dropout(x)."""
    if type(base := head.get_base_layer()) is not nn.Linear:
        raise HeadError(f"the LoRA of its head wraps a {type(base).__name__}, not a Linear layer")

    def parts(hidden: Tensor) -> Parts:
        adapters = [] if head.disable_adapters or head.merged else [a for a in head.active_adapters if a in head.lora_A]
        for adapter in adapters:
            if adapter in head.lora_variant or head.lora_bias[adapter]:
                raise HeadError(f"the LoRA of its head, {adapter!r}, is not plain (a variant, or with a bias)")
        if not adapters:
            return base.weight, base.bias, None
        # A is called as the module it is; PEFT keeps adapters in float32 beside a bfloat16 model.
        low = [
            head.lora_A[a](head.lora_dropout[a](hidden.to(head.lora_A[a].weight.dtype))) * head.scaling[a]
            for a in adapters
        ]
        high = [head.lora_B[a].weight for a in adapters]
        dtype = base.weight.dtype
        return (
            base.weight,
            base.bias,
            (torch.cat([t.to(dtype) for t in low], -1), torch.cat([t.to(dtype) for t in high], -1)),
        )

    return parts


def _difference(head: FusedHead, forward: Callable, model: nn.Module, inputs: dict) -> float:
    """Largest difference of a token's loss taken at the head from the one of the model's logits,
    relative to the largest loss.

    The head's input is scaled up until it puts out 30: a cap or a scale that is not accounted for would hardly show on
    the small logits of a model with random weights.
    """
    was_training = model.training
    model.eval()
    largest = []
    watch = head.head.register_forward_hook(lambda _module, _inputs, output: largest.append(output.abs().max().float()))
    scale = head.head.register_forward_pre_hook(lambda _module, given: _scaled(given, largest))
    try:
        with torch.no_grad():
            forward(**inputs)
            watch.remove()
            if not largest:
                raise HeadError("its forward does not call its head")
            logits = forward(**inputs).logits
            generator = torch.Generator().manual_seed(0)
            target = torch.randint(logits.shape[-1], logits.shape[:-1], generator=generator).to(logits.device)
            target[..., 0] = -100
            expected = cross_entropy(logits, target, reduction="none")
            got = head.loss(forward, inputs, target, reduction="none")
    finally:
        watch.remove()
        scale.remove()
        model.train(was_training)
    return ((got - expected).abs().max() / expected.abs().max()).item()


def _scaled(given: tuple, largest: list[Tensor]) -> tuple:
    hidden, *rest = given
    return (hidden * (30.0 / largest[0]).to(hidden.dtype) if largest else hidden, *rest)
