"""Memory of one rank, part by part and moment by moment: the one formula, of plans and of `fastft validate`.

A step has several moments at which memory may be fullest, and the peak is the largest of them: the loss at the end of
the forward, the first and the last layer of the backward, the reduction of gradients, the update. What each holds is
read off fastft's and DeepSpeed's code (0.19: stage_1_and_2.py, stage3.py, engine.py) and is held to measured runs by
benchmarks/plan_memory.py. Bytes throughout, of one rank, unless a name says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fastft.plan.head import head
from fastft.plan.setting import Kept, Setting, Tensors

# Bytes held per token, layer and hidden unit for the backward pass, in bf16 with flash attention (Korthikanti et al.
# 2022, arXiv 2205.05198, equation 2), and with full recomputation: each layer's input. Where a model cannot be traced.
ACTIVATION_BYTES = 34
CHECKPOINT_BYTES = 2

# Of one element of one state tensor: in memory, and in a checkpoint, which holds int8 as the float32 that it encodes.
STATE_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}
SAVED_BYTES = {**STATE_BYTES, "int8": 4}

# Beside all that is counted. On a GPU its context, NCCL's buffers and fragmentation: an allowance, not a measurement.
# On a CPU Python with torch, transformers and DeepSpeed: measured with a model of nothing (benchmarks/plan_memory.py).
RESERVED_BYTES = 4e9
PROCESS_BYTES = 0.72e9

# Of a CPU: what freed activations leave unusable, as a share of them (measured, benchmarks/plan_memory.py).
HEAP_SHARE = 0.25
# The same beside an adapter, whose layers make three more tensors of the size of each output.
ADAPTER_HEAP_SHARE = 1.0

PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "buckets")
HEAP = "heap"  # of a CPU, one more part
WHOLE = "whole step"  # of a CPU, one more moment
AFTER = ("checkpoint", "export")  # moments behind a step


@dataclass(frozen=True)
class Plan:
    """Bytes of one rank, by moment and part.

    Attributes
    ----------
    step : dict
        Moments of a training step, each a dict of ``PARTS``: on the device.
    around : dict
        Of loading (on the device), of what edits do then, and of checkpoint and export (in the host's memory, which a
        CPU's run has in one with the device's), beside which weights and optimizer are held.
    kept : Kept
    """

    setting: Setting
    kept: Kept
    step: dict[str, dict[str, int]]
    around: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def moment(self) -> str:
        """When a step's memory is fullest."""
        return max(self.step, key=lambda name: sum(self.step[name].values()))

    @property
    def parts(self) -> dict[str, int]:
        """At that moment."""
        return self.step[self.moment]

    @property
    def moments(self) -> dict[str, int]:
        """Bytes at every moment that counts: of a GPU loading and those of a step, of a CPU all."""
        around = self.around if self.setting.device == "cpu" else {"loading": self.around["loading"]}
        return {name: sum(parts.values()) for name, parts in {**self.step, **around}.items()}

    @property
    def training(self) -> int:
        """The most until the last step."""
        return max(size for name, size in self.moments.items() if name not in AFTER)

    @property
    def peak(self) -> int:
        """The most of all. On a CPU the checkpoint and the export are in the same memory."""
        return max(self.moments.values())

    @property
    def process(self) -> int:
        """Beside what is counted."""
        return int(PROCESS_BYTES if self.setting.device == "cpu" else RESERVED_BYTES)


def masters(setting: Setting, trained: int) -> int:
    """Of the weights that are updated, beside those that compute, of all ranks together.

    Weights in fp32 are the masters, but where they are offloaded; stages 1 and 2 clone their part of bf16 weights
    whatever the masters' dtype.
    """
    if not setting.bf16:
        return 4 * trained if setting.offload else 0
    if setting.master == "fp32":
        return 4 * trained
    remainder = 2 if setting.master == "remainder" else 0
    clone = 2 if setting.zero in (1, 2) else 0
    return (remainder + clone) * trained


def optimizer(setting: Setting, trained: int) -> int:
    """Masters and state, of all ranks together."""
    return masters(setting, trained) + trained * setting.states * STATE_BYTES[setting.state_dtype]


def sharded(zero: int, ranks: int, weights: float, gradients: float, optimizer: float) -> tuple[float, float, float]:
    """What a rank holds of them: stage 1 divides the optimizer, stage 2 also gradients, stage 3 also weights."""
    return (
        weights / (ranks if zero == 3 else 1),
        gradients / (ranks if zero >= 2 else 1),
        optimizer / (ranks if zero >= 1 else 1),
    )


def checkpoint(setting: Setting, tensors: Tensors) -> int:
    """One checkpoint, of all ranks together."""
    weights = tensors.trained_bytes if setting.adapter_only else tensors.whole
    if setting.zero == 3:  # its weights are the masters
        weights = tensors.trained_bytes if not setting.bf16 or setting.master != "fp32" else 0
        weights += 0 if setting.adapter_only else tensors.frozen_bytes
    state = tensors.trained * setting.states * SAVED_BYTES[setting.state_dtype]
    own = masters(setting, tensors.trained) if setting.bf16 else 4 * tensors.trained * (setting.zero in (1, 2))
    return weights + state + own


def files(setting: Setting, tensors: Tensors) -> int:
    """Those of parallel.offload_dir, of all ranks together."""
    weights = tensors.trained_bytes if setting.offload == "parameters" else 0
    return optimizer(setting, tensors.trained) + weights if setting.on_disk else 0


def plan(tensors: Tensors, kept: Kept, setting: Setting) -> Plan:
    """Memory of one rank at every moment that may be its fullest."""
    step = _step(tensors, kept, setting)
    around = _around(tensors, setting)
    if setting.device == "cpu" and setting.zero != 3:
        step[WHOLE] = whole = _heap(step, tensors, kept, setting)
        copies = around["checkpoint"]["copies"]
        # Copies of the state are about as large as gradients, and go into what half of the activations left.
        around["checkpoint"] = {**whole, "activations": whole["activations"] - kept.layers // 2, "copies": copies}
    return Plan(setting, kept, step, around)


def _heap(step: dict[str, dict[str, int]], t: Tensors, kept: Kept, s: Setting) -> dict[str, int]:
    """What a CPU run takes before ZeRO 3: it gives nothing back to the system (`fastft.ranks`), and what one kind of
    tensor leaves is seldom of a size for another, so that the moments of a step add up.
    """
    whole = {part: max(moment[part] for moment in step.values()) for part in PARTS}
    unused = int((ADAPTER_HEAP_SHARE if s.adapter_only else HEAP_SHARE) * kept.layers)
    into_bucket = min(t.trained_bytes, s.bucket * s.element) if s.zero == 1 else 0  # gradients
    return {**whole, HEAP: unused + into_bucket}


def _step(t: Tensors, kept: Kept, s: Setting) -> dict[str, dict[str, int]]:
    zero, ranks = s.zero, s.ranks
    whole = t.trained_bytes  # gradients
    weights, part, states = (int(x) for x in sharded(zero, ranks, t.whole, whole, optimizer(s, t.trained)))
    if s.offload and s.device == "cuda":
        weights, states = 0 if s.offload == "parameters" else weights, 0
    elif s.offload:  # the same memory, and gradients in float32 beside the masters
        weights, states = _in_memory(s, t, weights, states)
        states += 4 * t.trained // ranks
    loss = head(t, kept.tokens, s)
    bucket = _buckets(t, s)
    gathered = _gathered(t, s)
    # Before the backward: of earlier micro-steps. ZeRO 3 has a place for its part from the beginning.
    before = part if zero == 3 else (part if zero == 2 else whole) if s.accumulates else 0
    # A layer's new gradients stand beside those that they are added to.
    added = t.block if s.accumulates and zero < 2 else 0
    hidden = loss.gradient_of_hidden
    found = {
        "loss": _parts(
            weights, before + loss.gradient_in_loss, states, kept.layers + hidden, loss.logits,
            bucket.always + gathered,
        ),
        "first layer": _parts(
            weights, before + loss.gradient + added, states, kept.layers + kept.transient + hidden, loss.kept,
            bucket.filling + gathered,
        ),
    }  # fmt: skip
    # The embedding's gradient comes last, and beside the head's where they are one weight, or beside its copy in
    # DeepSpeed's bucket.
    doubled = t.embedding_bytes if t.tied or zero >= 2 or s.accumulates else 0
    ending = whole if zero < 2 else bucket.after
    beside = bucket.beside
    if zero == 3 and gathered:  # the embedding's weights; what is in the bucket is sent to make room for its gradient
        beside += t.embedding_bytes + (whole - t.embedding_bytes) % max(1, s.bucket * s.element)
    found["last layer"] = _parts(weights, ending + doubled, states, kept.ends, 0, beside)
    found["reduction"] = _parts(weights, bucket.reduced, states, 0, 0, bucket.flat)
    if whole > s.bucket * s.element and zero >= 2:  # the first reduction is before the backward has ended
        left = int(kept.layers * (1 - s.bucket * s.element / whole))
        found["first reduction"] = _parts(weights, bucket.reduced, states, left + kept.transient, 0, bucket.flat)
    if s.bf16 and zero == 0 and s.master == "fp32":  # DeepSpeed makes float32 copies of all gradients
        found["update"] = _parts(weights, whole + 4 * t.trained, states, 0, 0, 0)
    return found


def _in_memory(s: Setting, t: Tensors, weights: int, states: int) -> tuple[int, int]:
    """What is not in files, of both."""
    moved = t.trained_bytes // s.ranks if s.on_disk and s.offload == "parameters" else 0
    return weights - moved, (0 if s.on_disk else states)


def _parts(weights: int, gradients: int, optimizer: int, activations: int, logits: int, buckets: int) -> dict[str, int]:
    return dict(zip(PARTS, map(int, (weights, gradients, optimizer, activations, logits, buckets)), strict=True))


@dataclass(frozen=True)
class _Buckets:
    """What DeepSpeed takes to reduce gradients.

    Attributes
    ----------
    always, filling : int
        From the beginning, and from the first gradient on.
    beside : int
        Beside the gradients when the backward has ended.
    after : int
        Gradients, in the bucket or in their place, when the backward has ended (ZeRO 2 and 3).
    reduced, flat : int
        Gradients while the last bucket is reduced, and the copy that is sent.
    """

    always: int
    filling: int
    beside: int
    after: int
    reduced: int
    flat: int


def _buckets(t: Tensors, s: Setting) -> _Buckets:
    whole, size = t.trained_bytes, s.bucket * s.element
    used = min(whole, size)
    part = whole // s.ranks
    if s.zero == 0:
        return _Buckets(0, 0, 0, whole, whole, used if s.ranks > 1 else 0)
    # A GPU's bucket has its whole size; of a CPU's only the pages that were written are there.
    held = size if s.device == "cuda" else used
    idle = held - used
    if s.zero == 1:  # gradients move into the bucket when the backward has ended; then the rank's own are copied out
        room = size if s.device == "cuda" else 0
        own = part if whole > size else 0
        return _Buckets(0, room, room, whole, whole + idle + own, max(used, 0 if own else part))
    if s.zero == 2:
        room = size if s.device == "cuda" else 0
        own = part if whole > size or s.accumulates else 0
        return _Buckets(0, room, idle, used + own, used + own, idle + max(used, 0 if own else part))
    # ZeRO 3 keeps its bucket from step to step.
    return _Buckets(held, held, idle, used + part, used + part, idle + used)


def _gathered(t: Tensors, s: Setting) -> int:
    """Weights that ZeRO 3 has gathered at the turn from forward to backward: those that it needs again within
    DeepSpeed's distance, which is both ways; on a CPU, where nothing is kept, those of the head.
    """
    if s.zero != 3 or (s.ranks == 1 and not (s.offload == "parameters" and s.device == "cuda")):
        return 0
    if not s.reuse and not s.prefetch:
        return t.largest
    return min(t.whole, (s.reuse // 2 + s.prefetch) * s.element + t.block)


def _around(t: Tensors, s: Setting) -> dict[str, dict[str, int]]:
    weights, _, states = (int(x) for x in sharded(s.zero, s.ranks, t.whole, 0, optimizer(s, t.trained)))
    own = int(masters(s, t.trained) / (s.ranks if s.zero else 1))
    loaded = t.whole if s.zero < 3 else weights
    if s.device == "cpu":
        # DeepSpeed copies the weights of a group into one flat tensor, and then its part into the masters.
        made = {0: own, 1: max(t.trained_bytes, own), 2: max(t.trained_bytes, own), 3: own + t.largest}[s.zero]
        found: dict[str, dict[str, int]] = {"loading": {"weights": loaded, "copies": made}}
    else:  # where a GPU has no room for both, DeepSpeed flattens in the host's memory
        there = 0 if s.offload == "parameters" else weights
        made = (0 if s.offload else own) + (t.largest if s.zero == 3 else 0)
        found = {"loading": {"weights": there, "copies": made}}
        found["loading on the host"] = {"copies": loaded}
        if s.offload:  # with gradients in float32
            offloaded, kept = _in_memory(s, t, weights - there, states)
            found["offloaded to the host"] = {"weights": offloaded, "optimizer": kept + 4 * t.trained // s.ranks}
    saved = checkpoint(s, t)
    module = (t.trained_bytes if s.adapter_only else t.whole) if s.zero < 3 else 0  # rank 0 alone writes it
    snapshot = module + (saved - module) // (s.ranks if s.zero else 1)
    if s.on_disk:  # what is in files is written from there
        (weights, states), snapshot = _in_memory(s, t, weights, states), module
    held = {"weights": weights, "optimizer": states} if s.device == "cpu" else {}
    if held and s.zero == 3:  # a place for this rank's gradients, where offloaded also in float32, and the bucket
        gradients = (t.trained_bytes + (4 * t.trained if s.offload else 0)) // s.ranks
        held |= {"gradients": gradients, "buckets": min(t.trained_bytes, s.bucket * s.element)}
    found["checkpoint"] = {**held, "copies": snapshot}
    copies = 2 * t.largest  # one weight at a time, read back and compared
    if s.adapter_only:  # peft's files are made of all weights at once
        copies = t.whole if s.zero == 3 else t.trained_bytes
    found["export"] = {**held, "copies": copies}
    return found
