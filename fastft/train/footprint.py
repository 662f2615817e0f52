"""About how much memory a run needs on each rank, and how much disk: said before it begins."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastft.assemble import Job
    from fastft.train.schedule import Schedule

# Bytes held per token, layer and hidden unit for the backward pass, in bf16 with flash attention (Korthikanti et al.
# 2022, arXiv 2205.05198, equation 2), and with full recomputation: each layer's input.
ACTIVATION_BYTES = 34
CHECKPOINT_BYTES = 2

# Of one element of one state tensor: in memory, and in a checkpoint, which holds int8 as the float32 that it encodes.
STATE_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}
SAVED_BYTES = {**STATE_BYTES, "int8": 4}
# Of one element of the weights that are updated: DeepSpeed holds them apart, the remainder is the optimizer's.
MASTER_BYTES = {"fp32": 4, "remainder": 2 + 2, "stochastic": 2}


@dataclass(frozen=True)
class Footprint:
    """Bytes; of one rank, but for the disk's.

    Attributes
    ----------
    ranks : int
        How many were reckoned with.
    weights, gradients, optimizer : int
        What stays: parameters, their gradients, the optimizer's state with its master weights.
    activations : int
        What a forward of ``tokens`` tokens holds for its backward: an estimate, of transformers of the usual shape.
    tokens : int
    checkpoint : int
        One checkpoint, of all ranks.
    disk : int
        As many as are there at a time: those kept, the best, and the one being written; and the exported model.
    """

    ranks: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    tokens: int
    checkpoint: int
    disk: int

    def as_dict(self) -> dict[str, int]:
        return asdict(self)

    def sentences(self) -> list[str]:
        whose = "the rank" if self.ranks == 1 else f"each of {self.ranks} ranks"
        states = gigabytes(self.weights + self.gradients + self.optimizer)
        return [
            f"memory of {whose}, about: {states} for weights, gradients and optimizer, "
            f"{gigabytes(self.activations)} for activations of {self.tokens:,} tokens at once.",
            f"disk, about: {gigabytes(self.checkpoint)} a checkpoint, {gigabytes(self.disk)} in all.",
        ]


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"


def footprint(job: Job, schedule: Schedule) -> Footprint:
    """Of a job that has its data, its model and its optimizer."""
    from fastft.zero.parameters import whole_numel

    config, ranks, spec = job.config, job.ranks, job.spec
    assert spec is not None and job.train is not None
    zero, per_rank = config.parallel.zero, ranks.data_world
    parameters = [(whole_numel(p), p.element_size(), p.requires_grad) for p in job.model.parameters()]
    weights = sum(n * size for n, size, _ in parameters)
    gradients = sum(n * size for n, size, trained in parameters if trained)
    trained = sum(n for n, _, trained in parameters if trained)
    kept, settings = len(spec.state_tensors), config.optim
    dtype = getattr(settings, "state_dtype", "fp32")
    masters = 0
    if zero or config.model.dtype == "bf16":  # the only ones that update copies of the weights
        masters = trained * MASTER_BYTES[getattr(settings, "master", "fp32")]
    state = trained * kept * STATE_BYTES[dtype] + masters
    saved = (gradients if job.adapter_only else weights) + trained * kept * SAVED_BYTES[dtype] + masters
    at_once = config.checkpoint.keep + 1 + (config.checkpoint.best_by is not None)
    tokens = _tokens(job, schedule)
    return Footprint(
        ranks=per_rank,
        weights=weights // (per_rank if zero == 3 else 1),
        gradients=gradients // (per_rank if zero >= 2 else 1),
        optimizer=state // (per_rank if zero else 1),
        activations=_activations(job, tokens),
        tokens=tokens,
        checkpoint=saved,
        disk=at_once * saved + weights,
    )


def _tokens(job: Job, schedule: Schedule) -> int:
    """The most that one forward of one rank takes, padding included."""
    assert job.train is not None
    batch, longest = job.config.batch, int(job.train.totals["longest"])
    if getattr(job.config.data, "packing", "none") == "isolated":
        longest = job.task.max_length
    sequences = -(-min(schedule.size, schedule.positions) // job.ranks.data_world)
    if isinstance(batch.micro, int):
        return min(batch.micro, sequences) * longest
    return max(longest, min(batch.micro_tokens, sequences * longest))


def _activations(job: Job, tokens: int) -> int:
    text = job.model.config.get_text_config()
    layers, hidden = (getattr(text, name, None) or 0 for name in ("num_hidden_layers", "hidden_size"))
    per_unit = ACTIVATION_BYTES * layers
    if job.config.parallel.activation_checkpointing:
        per_unit = CHECKPOINT_BYTES * layers + ACTIVATION_BYTES
    return tokens * hidden * per_unit * (2 if job.config.model.dtype == "fp32" else 1)
