"""The plan of a configuration: its model without weights, what each rank holds, how long a step takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastft import assemble, rooms, track
from fastft.assemble import Job
from fastft.config import Config
from fastft.data.batches import LARGEST
from fastft.data.encoder import Learned
from fastft.models.head import input_embedding
from fastft.models.load import dtype_of, length_limit
from fastft.ops.cpu import widens
from fastft.ops.decoder.attention import slow
from fastft.optim.optimizers.base import OptimizerSpec
from fastft.plan import activations, memory
from fastft.plan.experts import active
from fastft.plan.memory import Plan
from fastft.plan.model import Shape
from fastft.plan.setting import Setting, Tensors
from fastft.ranks import Ranks
from fastft.tasks._decoder import DecoderTask
from fastft.zero.bucket import gathered_at_once, reduced_at_once
from fastft.zero.parameters import whole_numel
from fastft.zero.settings import deepspeed_config

# For tasks whose heads are as wide as the data has labels: a head of two outputs is as good as nothing.
UNLEARNED: Learned = {"labels": ["0", "1"], "scheme": "raw", "targets": ["value"], "mean": [0.0], "std": [1.0]}
DEFAULT_LENGTH = 1024  # tokens of a sequence, where neither data.max_length nor the model says another


@dataclass(frozen=True)
class Batching:
    """How a step's sequences lie in one rank's forwards.

    Attributes
    ----------
    size : int
        Sequences of a step, of all ranks.
    rows, width : int
        The most of a forward: sequences, and tokens of each, also where several ranks share them.
    accumulation : int
        Forwards of a step.
    """

    size: int
    rows: int
    width: int
    accumulation: int


@dataclass(frozen=True)
class Disk:
    """Bytes on disks, of all ranks together.

    Attributes
    ----------
    checkpoint : int
        One checkpoint.
    files : int
        In parallel.offload_dir.
    total : int
        As many checkpoints as are there at a time (those kept, the best, and the one being written), the exported
        model, and the files.
    """

    checkpoint: int
    files: int
    total: int

    @property
    def sentence(self) -> str:
        files = f", of which {gigabytes(self.files)} in parallel.offload_dir" if self.files else ""
        return f"disk, about: {gigabytes(self.checkpoint)} a checkpoint, {gigabytes(self.total)} in all{files}."


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"


@dataclass(frozen=True)
class Planned:
    """A configuration's plan, with what it was made from."""

    config: Config
    shape: Shape
    tensors: Tensors
    batching: Batching
    plan: Plan
    trained: float  # share of the parameters

    @property
    def setting(self) -> Setting:
        return self.plan.setting

    @property
    def disk(self) -> Disk:
        saved, files = memory.checkpoint(self.setting, self.tensors), memory.files(self.setting, self.tensors)
        at_once = self.config.checkpoint.keep + 1 + (self.config.checkpoint.best_by is not None)
        return Disk(saved, files, at_once * saved + self.tensors.whole + files)


def planned(
    config: Config,
    device: str,
    ranks: int,
    *,
    learned: Learned | None = None,
    longest: int | None = None,
    size: int | None = None,
    real: Job | None = None,
) -> Planned:
    """The plan of a run on so many ranks.

    Parameters
    ----------
    device : str
        "cpu" or "cuda"; no GPU has to be there.
    learned : dict, optional
        What the training data taught; without it a head of two labels is counted.
    longest, size : int, optional
        Tokens of the longest sequence, and sequences of a step, where they are known; else the most that the
        configuration allows.
    real : Job, optional
        The run as it was put together, where it was: its model is measured then.

    Raises
    ------
    UserError
        The model's configuration cannot be had, an edit (LoRA) does not fit it, or parallel.sequence not the ranks.
    """
    Ranks(0, ranks, 0, ranks, torch.device("meta")).with_sequences(config.parallel.sequence)
    try:
        job = without_weights(config, ranks, learned)
    except Exception:  # whatever its own code says of a device without values
        if real is None:
            raise
        job = real
    batch = batching(config, job, device, ranks, longest, size)
    tensors = tensors_of((real or job).model, hasattr(config.loss, "implementation"))
    setting = _setting(job, device, ranks, batch, tensors)
    how, part = _how(job, tensors, setting), batch.width // config.parallel.sequence
    if job is real:
        kept = activations.estimated(job.model, batch.rows * part, how)
    else:
        kept = activations.kept(job.model, batch.rows, part, how)
    text = job.model.config.get_text_config()
    parameters = tensors.trained + tensors.frozen
    layers, hidden = (getattr(text, name, None) or 1 for name in ("num_hidden_layers", "hidden_size"))
    shape = Shape(parameters, layers, hidden, active(job.model))
    plan = memory.plan(tensors, kept, setting)
    rows = len(real.train) if real is not None and real.train is not None else None
    for edit in job.edits:
        plan.around.update(edit.making(job.model, batch.width, rows))
    return Planned(config, shape, tensors, batch, plan, tensors.trained / parameters)


def without_weights(config: Config, ranks: int, learned: Learned | None = None) -> Job:
    """The model with its edits on the meta device. Reads the model's config.json, never its weights."""
    places = Ranks(0, ranks, 0, ranks, torch.device("meta"))
    task = rooms.TASKS.get(config.task)(config)
    assemble.check_sequence(config, task)
    for known in (learned, {}, UNLEARNED):
        if known is None:
            continue
        job = Job(config, places, task, dict(known))
        try:
            task.model(job.learned)
        except KeyError:
            continue
        break
    state = torch.random.get_rng_state()
    try:
        assemble.add_model(job, "empty")
    finally:
        torch.random.set_rng_state(state)  # building sets the seed
    return job


def tensors_of(model: Any, over_vocabulary: bool) -> Tensors:
    """Sizes of a model's parameters, with or without weights, also where ZeRO 3 holds them in shards."""
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    frozen = [p for p in parameters if not p.requires_grad]
    size = lambda p: getattr(p, "stored_bytes", whole_numel(p) * p.element_size())
    weight = getattr(input_embedding(model), "weight", None)
    output = model.get_output_embeddings() if over_vocabulary else None
    head = getattr(getattr(output, "base_layer", output), "weight", None)
    columns = getattr(output, "in_features", None)
    rows = whole_numel(head) // columns if head is not None and columns else 0
    blocks = [sum(size(p) for p in m.parameters() if p.requires_grad) for m in activations.blocks(model)]
    return Tensors(
        trained=sum(map(whole_numel, trained)),
        frozen=sum(map(whole_numel, frozen)),
        trained_bytes=sum(map(size, trained)),
        frozen_bytes=sum(map(size, frozen)),
        embedding_bytes=size(weight) if weight is not None and weight.requires_grad else 0,
        head=(rows, int(columns)) if rows and columns else None,
        head_trained=head is not None and head.requires_grad,
        tied=head is not None and head is weight,
        largest=max(map(size, parameters)),
        block=max(blocks, default=0),
    )


def batching(
    config: Config, job: Job, device: str, ranks: int, longest: int | None = None, size: int | None = None
) -> Batching:
    """The largest forward of a rank, padding included."""
    batch = config.batch
    longest = longest or config.data.max_length or min(length_limit(job.model.config) or DEFAULT_LENGTH, DEFAULT_LENGTH)
    width = -(-longest // batch.pad_to_multiple_of) * batch.pad_to_multiple_of
    size, sequence = size or batch.sequences(width), config.parallel.sequence
    own = -(-size // (ranks // sequence))
    width = -(-width // sequence) * sequence
    if isinstance(batch.micro, int):
        rows = min(batch.micro, own)
    else:
        most = batch.forward_tokens * sequence
        most = most if job.task.pads else min(most, LARGEST[device])
        rows = min(max(1, most // width), own)
    return Batching(size, rows, width, -(-own // rows))


def _setting(job: Job, device: str, ranks: int, batch: Batching, tensors: Tensors) -> Setting:
    config, spec = job.config, OptimizerSpec.of(job.config)
    zero = deepspeed_config(config, job.ranks)["zero_optimization"]
    own = config.model.dtype
    probe = torch.empty(0, dtype=dtype_of(own))
    largest = tensors.largest // probe.element_size()
    on_cpu = device == "cpu"
    gathered = gathered_at_once(largest, on_cpu) | zero
    reduced = reduced_at_once(tensors.trained, largest, on_cpu and config.parallel.zero == 3)
    return Setting(
        device=device,
        zero=config.parallel.zero,
        ranks=ranks,
        bf16=own == "bf16",
        master=getattr(config.optim, "master", "fp32"),
        states=len(spec.state_tensors),
        state_dtype=getattr(config.optim, "state_dtype", "fp32"),
        accumulates=batch.accumulation > 1,
        widens=on_cpu and widens(probe),
        fused_loss=getattr(config.loss, "implementation", "auto") != "cross_entropy",
        adapter_only=job.adapter_only,
        offload=config.parallel.offload,
        on_disk=config.parallel.offload_dir is not None,
        bucket=int(zero.get("reduce_bucket_size") or reduced),
        reuse=int(gathered["stage3_max_reuse_distance"]),
        prefetch=int(gathered["stage3_prefetch_bucket_size"]),
    )


def _how(job: Job, tensors: Tensors, setting: Setting) -> activations.How:
    """As the checks before a run will most likely settle it: they compare numbers, which are not here."""
    config = job.config
    packed = isinstance(job.task, DecoderTask) and config.data.packing == "isolated"
    in_parts = config.parallel.sequence > 1  # by document, in layers that are not fused whole
    wanted = config.model.attention in ("auto", "varlen") and packed
    text = job.model.config.get_text_config()
    fast = setting.bf16 if setting.device == "cuda" else not slow(torch.device("cpu"), dtype_of(config.model.dtype))
    by_document = wanted and fast and not getattr(text, "attention_dropout", 0.0)
    return activations.How(
        fused=by_document and config.model.layers == "auto" and setting.zero != 3 and not in_parts,
        by_mask=packed and not by_document and not in_parts,
        checkpointing=config.parallel.activation_checkpointing,
        widens=setting.widens,
        whole=tensors.head is None,
        eager=config.model.attention == "eager",
    )


def measured(config: Config) -> dict | None:
    """What the run in ``run.dir`` took, where there is one: ``memory`` of rank 0 (bytes, at its peak), ``ranks``,
    ``device``, ``seconds`` per step, and ``same``: whether it ran with this configuration.
    """
    folder = Path(config.run.dir)
    if not (folder / "metrics.jsonl").is_file():
        return None
    records = track.read(folder)
    runs = [r for r in records if r["kind"] == "run"]
    steps = [r for r in records if r["kind"] == "train" and "memory" in r]
    if not runs or not steps:
        return None
    ended = [r for r in records if r["kind"] == "end" and r.get("train_seconds")]
    mine, then = config.model_dump(mode="json"), runs[-1]["config"]
    same = all(mine.get(part) == then.get(part) for part in ("task", "model", "batch", "optim", "parallel"))
    return {
        "memory": max(r["memory"] for r in steps),
        "ranks": runs[-1].get("world_size", 1),
        "device": str(runs[-1].get("device", "cpu")).partition(":")[0],
        "seconds": ended[-1]["train_seconds"] / ended[-1]["step"] if ended and ended[-1]["step"] else None,
        "same": same,
        "dir": str(folder),
    }
