"""Settings that are allowed but make little sense for this data and this length of run: said before it begins."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from fastft.assemble import Job
from fastft.config import Source
from fastft.config.every import interval
from fastft.data import formats
from fastft.data.split import Split
from fastft.ops.cpu import cpu_multiplies_bf16
from fastft.optim.optimizers.base import OptimizerSpec
from fastft.optim.schedules import steps_of
from fastft.train.schedule import Schedule

# Learning rates beyond which a pretrained model is surely lost, or stays as it is. Adam's steps are as long as its
# rate, SGD's as rate and gradient.
LARGEST = {True: 1e-2, False: 10.0}  # by whether the optimizer divides by the gradient's size
SMALLEST = 1e-8


def advice(job: Job, schedule: Schedule) -> list[str]:
    """A sentence on each; none for what makes sense. ``job`` has its data."""
    return [
        *_dtype(job),
        *_learning_rate(job, schedule),
        *_batch(job, schedule),
        *_intervals(job, schedule),
        *_evaluated(job),
    ]


def _dtype(job: Job) -> Iterator[str]:
    fused = job.record.get("layers", "").startswith("fused")  # these and the head compute in float32
    if job.config.model.dtype == "bf16" and job.ranks.device.type == "cpu" and not (fused or cpu_multiplies_bf16()):
        yield (
            "model.dtype: bf16 on a CPU that has no instructions for it: matrix products take many times as long as in "
            "fp32. model.dtype: fp32 is faster here."
        )


def _learning_rate(job: Job, schedule: Schedule) -> Iterator[str]:
    settings, total = job.config.optim, schedule.total
    warmup = steps_of(settings.warmup, total)
    if warmup and warmup >= total:
        yield (
            f"optim.warmup: {settings.warmup:,} steps of warm-up in a run of {total:,}: the learning rate never comes "
            "to optim.lr. A fraction (0.1) is of all steps."
        )
    elif settings.schedule == "wsd" and warmup + steps_of(settings.decay, total) > total:
        yield f"optim.decay: warm-up and decay are more than the run's {total:,} steps together."
    adaptive = "exp_avg_sq" in OptimizerSpec.of(job.config).state_tensors
    if settings.lr > LARGEST[adaptive]:
        usual = "1e-5 to 1e-3" if adaptive else "1e-3 to 1"
        yield f"optim.lr: {settings.lr:g} is far above what {settings.name} is used with ({usual})."
    elif settings.lr < SMALLEST:
        yield f"optim.lr: {settings.lr:g} is so small that the model stays as it is."


def _batch(job: Job, schedule: Schedule) -> Iterator[str]:
    rows, size = schedule.order.rows_per_epoch, schedule.size
    if size <= rows:
        return
    key = "batch.size" if job.config.batch.global_tokens is None else "batch.global_tokens"
    if schedule.positions > rows:
        yield f"{key}: a step takes {size:,} sequences, and the training set has {rows:,}: each is taken several times."
    else:
        yield f"{key}: {size:,} is more than the training set's {rows:,} sequences: an epoch is one step."


def _intervals(job: Job, schedule: Schedule) -> Iterator[str]:
    config = job.config
    for key, value, what in (
        ("train.eval_every", config.train.eval_every, "evaluated"),
        ("checkpoint.every", config.checkpoint.every, "saved"),
    ):
        if value is None:
            continue
        every = interval(value)
        steps = every.steps is not None and every.steps > schedule.total
        epochs = every.epochs is not None and every.epochs > schedule.epoch(schedule.total) + 1e-9
        if steps or epochs:
            length = f"{schedule.total:,} steps ({schedule.epoch(schedule.total):.3g} epochs)"
            yield f"{key}: {value} is longer than the run of {length}, which is {what} at its end only."
    saving = {"early_stopping", "forgetting"} & set(config.train.chosen())  # a checkpoint wherever it is the best
    if config.checkpoint.best_by and config.checkpoint.every is None and not saving:
        yield "checkpoint.best_by: without checkpoint.every only the last step is saved, which is then the best."


def _evaluated(job: Job) -> Iterator[str]:
    """Evaluation sets that hold training data; one whose name says so is meant to."""
    if job.train is None:
        return
    trained = _contents(job.train, job.config.data.train)
    for name, split in job.evals.items():
        both = [path for content, path in _contents(split, job.config.data.eval[name]).items() if content in trained]
        if both and not name.startswith("train"):
            more = f" and {len(both) - 1:,} more" if len(both) > 1 else ""
            yield (
                f"data.eval.{name}: {both[0]}{more} is training data too: its metrics say nothing about new rows. "
                "Hold some rows out, or call the set train."
            )


def _contents(split: Split, sources: list[Source]) -> dict[tuple, str]:
    """What a set is read from, by content and part, whatever the files are called."""
    hashes = json.loads((split.data.folder / "MANIFEST.json").read_bytes()).get("sources", {})
    found: dict[tuple, str] = {}
    for source in sources:
        for path in map(Path.absolute, formats.files_of(source)):
            content = hashes.get(str(path), {}).get("sha256") or str(path.resolve())
            found[(content, source.split)] = str(path)
    return found
