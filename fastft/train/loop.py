"""The one training loop."""

import math
import platform
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import yaml

import fastft
from fastft import config as configuration
from fastft.config import Config
from fastft.data import batches, order
from fastft.errors import Interrupted, UserError
from fastft.models import load
from fastft.ops import backends
from fastft.optim import FusedAdamW
from fastft.optim.schedules import learning_rate
from fastft.tasks import TASKS, Batch, Split, Task
from fastft.train import checkpoint, engine, export, health
from fastft.train.engine import Ranks, Stepper
from fastft.train.evaluation import evaluate
from fastft.train.heartbeat import Heartbeat
from fastft.train.signals import StopRequest
from fastft.train.telemetry import Telemetry


# What a resumed run may not change: the sample order and the layout of the state depend on it.
SETTLED = ("task", "batch.size", "batch.global_tokens", "data.seed", "model.dtype", "parallel.zero", "optim.state_dtype", "optim.master")


@dataclass(frozen=True)
class Schedule:
    """How many sequences a step takes and how many steps there are.

    Step s takes positions [s * size, (s + 1) * size) of the endless sample order; the last step of a run counted in epochs may be short.
    """

    size: int
    total: int
    positions: int

    @classmethod
    def of(cls, config: Config, n: int, max_length: int) -> "Schedule":
        size = config.batch.size
        if config.batch.global_tokens is not None:
            size = config.batch.global_tokens // max_length
            if size == 0:
                raise UserError(f"batch.global_tokens = {config.batch.global_tokens} is less than one sequence (data.max_length = {max_length}).",
                                "Raise batch.global_tokens or lower data.max_length.")
        size = size or 32
        if config.train.steps is not None:
            return cls(size, config.train.steps, config.train.steps * size)
        positions = max(1, round((config.train.epochs or 1.0) * n))
        return cls(size, math.ceil(positions / size), positions)

    def ids(self, step: int, n: int, seed: int) -> np.ndarray:
        return order.sample_ids(n, seed, step * self.size, min((step + 1) * self.size, self.positions))


def train(config: Config, *, resume: bool = False, overwrite: bool = False) -> dict:
    """Train as the configuration says, on every rank of this process group.

    Returns
    -------
    dict
        ``step``, ``model`` (folder of the exported model), ``eval`` (last metrics by set), ``tokens_per_second``.

    Raises
    ------
    UserError
        Bad configuration, data or model.
    Interrupted
        After a signal, once everything is saved.
    """
    run_dir = Path(config.run.dir)
    if config.run.offline:
        load.go_offline()
    ranks = engine.environment(config)
    if not resume:
        _check_run_dir(run_dir, config, overwrite)
    task = TASKS.get(config.task)(config)
    split, evals = task.train_split(), task.eval_splits()  # all tokenising is done before there is a process group
    schedule = Schedule.of(config, len(split), task.max_length)
    model, drawn = load.build(config.model, task.auto_class, task.new_parameters, config.run.seed, **task.model_overrides())
    task.check_model(model, ranks.device)
    settled = task.attach(model, ranks.device)
    frozen = load.freeze(model, config.model.freeze)
    if config.parallel.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = engine.build_optimizer(model, config)
    engine.start_process_group()
    health.check_agreement(config, split.data.key, ranks)
    model_engine = engine.build_engine(model, optimizer, engine.deepspeed_config(config, ranks), config.parallel.fused_step)
    with ExitStack() as cleanup:
        stop = cleanup.enter_context(StopRequest())
        run = _Run(config, task, split, evals, schedule, ranks, model_engine, optimizer, stop)
        if resume:
            run.resume()
        if ranks.main:
            _claim(run_dir, config, resume)
        log = run.log = Telemetry(run_dir, ranks.main, schedule.total)
        cleanup.callback(log.close)
        log.record("run", zero_step=model_engine.fastft_step, passed_over=run.passed_over,
                   **_record(config, ranks, split, evals, schedule, model, frozen, drawn, settled, run.step))
        return run.loop()


class _Run:
    """The state of a run: everything the loop touches, in one place."""

    def __init__(self, config: Config, task: Task, split: Split, evals: dict[str, Split], schedule: Schedule, ranks: Ranks, model_engine,
                 optimizer: FusedAdamW, stop: StopRequest):
        self.config, self.task, self.split, self.evals, self.schedule, self.ranks = config, task, split, evals, schedule, ranks
        self.engine, self.optimizer, self.stop = model_engine, optimizer, stop
        self.log: Telemetry | None = None  # opened once everything that can be refused has been
        self.stepper = Stepper(model_engine, optimizer, config.optim.grad_clip)
        self.folder = Path(config.run.dir) / "checkpoints"
        self.step, self.skipped_in_a_row, self.skipped_total = 0, 0, 0
        self.metrics: dict[str, dict[str, float]] = {}
        self.throughput = _Throughput()
        self.heart, self.pace = Heartbeat(), health.Pace(ranks.device)
        self.chosen: list | dict = []
        self.passed_over: list[str] = []  # damaged checkpoints, newer than the one resumed from

    def loop(self) -> dict:
        self.engine.train()
        with ThreadPoolExecutor(1) as ahead:  # collates the next step while this one computes
            coming = ahead.submit(self._collate_step, self.step)
            while self.step < self.schedule.total:
                step_batches, denominator = coming.result()
                if self.step + 1 < self.schedule.total:
                    coming = ahead.submit(self._collate_step, self.step + 1)
                loss = self._optimizer_step(step_batches, denominator)
                self.step += 1
                self._after_step(loss)
                self.heart.beat(self.step)
        return self._finish()

    def _optimizer_step(self, step_batches: list[Batch], denominator: float) -> torch.Tensor:
        """Forward and backward of every micro-step, then the update; returns this rank's share of the step's loss (0-dim, detached)."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config.optim, self.step, self.schedule.total)
        # DeepSpeed averages gradients over ranks, so the sum over all ranks and micro-steps wants world / targets.
        scale = torch.tensor(self.ranks.world / denominator, dtype=torch.float32, device=self.ranks.device)
        total = torch.zeros((), dtype=torch.float32, device=self.ranks.device)
        for i, batch in enumerate(step_batches):
            last = i == len(step_batches) - 1
            batch = batch.to(self.ranks.device)
            self.stepper.boundary(last)
            with self.pace:
                loss = self.task.forward_loss(self.engine, batch, scale)
            total += loss.detach()
            self.stepper.backward(loss, last)
            self.throughput.add(batch)
        return total

    def _collate_step(self, step: int) -> tuple[list[Batch], float]:
        """This rank's batches of an optimizer step, and the loss's denominator over all ranks."""
        ids = self.schedule.ids(step, len(self.split), self.config.data.seed)
        micro, world = self.config.batch.micro, self.ranks.world
        if micro == "auto":
            plan = batches.by_length(ids, self.split.lengths[ids], world, self.config.batch.micro_tokens)
        else:
            plan = batches.fixed(ids, world, micro)
        return [self.task.collate(self.split, part[self.ranks.rank]) for part in plan], float(self.split.targets[ids].sum())

    def _after_step(self, loss: torch.Tensor) -> None:
        settings, last = self.config.train, self.step == self.schedule.total
        self._count_skips()
        every = self.config.parallel.verify_every
        if every and self.step % every == 0 and self.ranks.world > 1 and self.config.parallel.zero < 3:
            health.check_weights(self.engine.module, self.ranks, self.step)
        if self.step % settings.log_every == 0 or last or self.step == 1:
            self._log(loss)
        else:
            self.log.progress(self.step)
        if (settings.eval_every and self.step % settings.eval_every == 0) or last:
            self._evaluate()
        signum = self.stop.agreed(self.ranks.device, self.ranks.world)
        if signum or last or (self.config.checkpoint.every and self.step % self.config.checkpoint.every == 0):
            self._save()
        if signum and not last:
            self.log.record("interrupted", step=self.step, signal=signum)
            raise Interrupted(signum, self.step, self.config.run.dir)

    def _count_skips(self) -> None:
        skipped = self.stepper.skipped()
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        self.skipped_total += skipped
        if skipped:
            self.log.record("skipped", step=self.step, samples=self.schedule.ids(self.step - 1, len(self.split), self.config.data.seed).tolist())
            self.log.say(f"step {self.step}: NaN or Inf gradients; the step was skipped")
        if self.skipped_in_a_row > self.config.train.max_skipped:
            raise UserError(f"{self.skipped_in_a_row} steps in a row had NaN or Inf gradients (the last at step {self.step}).",
                            "Lower optim.lr, check the data (the samples stand in metrics.jsonl), or raise train.max_skipped.")

    def _log(self, loss: torch.Tensor) -> None:
        if not self.chosen:  # known once every op has run
            self.chosen = backends.choices()
            self.log.record("backends", chosen=self.chosen)
        if self.ranks.world > 1:
            loss = loss.clone()
            dist.all_reduce(loss)
        value = float(loss) / self.ranks.world
        rates = self.throughput.read(self.ranks)
        if self.ranks.world > 1 and (slow := self.pace.slow_ranks(self.ranks)):
            self.log.record("slow_ranks", step=self.step, times=slow)
            self.log.say(f"step {self.step}: slow: " + ", ".join(f"rank {rank} takes {times:.1f} times the others' time" for rank, times in slow.items()))
        self.log.record("train", step=self.step, epoch=self.step * self.schedule.size / len(self.split), loss=value,
                        lr=self.optimizer.param_groups[0]["lr"], grad_norm=float(self.stepper.grad_norm), skipped=self.skipped_total, **rates)
        self.log.progress(self.step, loss=value, rate=rates["tokens_per_second"])

    def _evaluate(self) -> None:
        with self.throughput.paused():
            for name, split in self.evals.items():
                self.metrics[name] = evaluate(self.engine, self.task, split, self.ranks, lambda: self.heart.beat(self.step))
                self.log.record("eval", step=self.step, set=name, **self.metrics[name])
                self.log.say(f"step {self.step}  {name}: " + "  ".join(f"{k} {v:.4g}" for k, v in self.metrics[name].items()))

    def _save(self) -> None:
        with self.throughput.paused():
            state = {"step": self.step, "skipped_in_a_row": self.skipped_in_a_row, "skipped_total": self.skipped_total,
                     "data": self.split.data.key, "task": self.task.state(), "config": configuration.dump(self.config)}
            path = checkpoint.save(self.engine, self.folder, self.step, state, self.ranks, self.config.checkpoint.keep)
            self.log.record("checkpoint", step=self.step, path=str(path))

    def resume(self) -> None:
        path, manifest, self.passed_over = checkpoint.find(self.folder)
        if manifest["state"]["data"] != self.split.data.key:
            raise UserError(f"{path}: the training data, tokenizer or data settings changed since this checkpoint.",
                            "Put the old data back, or start a new run from the exported model.")
        self._check_same_run(path, manifest["state"])
        state = checkpoint.load(self.engine, path, manifest, self.ranks)
        self.step, self.skipped_in_a_row, self.skipped_total = state["step"], state["skipped_in_a_row"], state["skipped_total"]

    def _check_same_run(self, path: Path, state: dict) -> None:
        """Refuse settings under which the rest would not be the rest of this run."""
        before = yaml.safe_load(state["config"])
        for key in SETTLED:
            section, _, name = key.rpartition(".")
            then, now = (c[section].get(name) if section else c.get(name) for c in (before, self.config.model_dump(mode="json")))
            if then != now:
                raise UserError(f"{path}: was written with {key} = {then}, this run has {now}.",
                                f"Resume with {key}={then}, or start a new run from the exported model.")
        if state["step"] > self.schedule.total:
            raise UserError(f"{path}: is at step {state['step']}, the run would end at {self.schedule.total}.", "Raise train.steps or train.epochs.")

    def _finish(self) -> dict:
        if not self.metrics:
            self._evaluate()
        self.heart.rest()
        folder = export.save_engine(self.engine, self.task, Path(self.config.run.dir) / "model", self.config.model.dtype, self.ranks)
        if self.ranks.main:
            _drop_old(Path(self.config.run.dir))
        summary = {"step": self.step, "model": str(folder), "eval": self.metrics, **self.throughput.overall(self.ranks)}
        self.log.record("end", **summary)
        return summary


class _Throughput:
    """Tokens and samples per second over all ranks: since the last reading, and over the whole run."""

    def __init__(self):
        self.tokens = self.padded = self.samples = 0
        self.all_tokens = self.all_samples = 0
        self.all_seconds = 0.0
        self.since = time.perf_counter()

    def add(self, batch: Batch) -> None:
        self.tokens += batch.tokens
        self.padded += batch.padded
        self.samples += batch.samples

    def read(self, ranks: Ranks) -> dict[str, float]:
        now = time.perf_counter()
        seconds, self.since = now - self.since, now
        tokens, padded, samples = _sum_over_ranks([self.tokens, self.padded, self.samples], ranks)
        self.all_tokens, self.all_samples, self.all_seconds = self.all_tokens + tokens, self.all_samples + samples, self.all_seconds + seconds
        self.tokens = self.padded = self.samples = 0
        return {"tokens_per_second": tokens / seconds, "samples_per_second": samples / seconds, "padding": 1 - tokens / max(padded, 1)}

    def overall(self, ranks: Ranks) -> dict[str, float]:
        seconds = max(self.all_seconds, 1e-9)
        return {"train_seconds": self.all_seconds, "tokens_per_second": self.all_tokens / seconds, "samples_per_second": self.all_samples / seconds}

    def paused(self) -> "_Pause":
        """A context whose time does not count (evaluation, saving)."""
        return _Pause(self)


class _Pause:
    def __init__(self, throughput: _Throughput):
        self.throughput = throughput

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *exc) -> None:
        self.throughput.since += time.perf_counter() - self.start


def _sum_over_ranks(values: list[float], ranks: Ranks) -> list[float]:
    if ranks.world == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64, device=ranks.device)
    dist.all_reduce(total)
    return total.tolist()


OF_A_RUN = ("checkpoints", "model", "metrics.jsonl", "config.yaml")  # what a run writes into its folder, beside prepared data


def _check_run_dir(run_dir: Path, config: Config, overwrite: bool) -> None:
    """A new run may take an empty folder, or with --overwrite that of an older run; never anybody else's files."""
    there = [name for name in OF_A_RUN if (run_dir / name).exists()]
    if "metrics.jsonl" not in there:
        if there:
            raise UserError(f"run.dir: {run_dir} holds {', '.join(there)}, but is not the folder of a run.", "Choose another run.dir; nothing was touched.")
        return
    if not overwrite:
        raise UserError(f"run.dir: {run_dir} already holds a run.",
                        f"Go on with `fastft resume {run_dir}`, choose another run.dir, or start over with --overwrite.")
    inputs = {"model.path": config.model.path, "model.tokenizer": config.model.tokenizer, "data.labels": config.data.labels}
    inputs |= {f"data.train[{i}]": s.path for i, s in enumerate(config.data.train)}
    inputs |= {f"data.eval.{name}": s.path for name, sources in config.data.eval.items() for s in sources}
    for key, path in inputs.items():
        if path and Path(path).exists() and run_dir.resolve() in Path(path).resolve().parents:
            raise UserError(f"{key}: {path} lies in run.dir, which --overwrite starts over.", "Choose another run.dir, or copy it out first.")


def _claim(run_dir: Path, config: Config, resume: bool) -> None:
    """Take the run folder, now that nothing is left to refuse: keep the whole configuration, put an overwritten run aside until this one is done."""
    run_dir.mkdir(parents=True, exist_ok=True)
    if not resume and (run_dir / "metrics.jsonl").exists():
        failed_before = (run_dir / "metrics.jsonl.old").exists()  # then what lies aside is the last good run, and stays
        for name in filter(lambda n: (run_dir / n).exists(), OF_A_RUN):
            path, aside = run_dir / name, run_dir / f"{name}.old"
            if not failed_before:
                path.rename(aside)
            elif path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    (run_dir / "config.yaml").write_text(configuration.dump(configuration.absolute(config)), encoding="utf-8")


def _drop_old(run_dir: Path) -> None:
    """Remove what an overwritten run left aside."""
    if not (run_dir / "metrics.jsonl.old").exists():
        return  # nothing of ours
    for name in OF_A_RUN:
        old = run_dir / f"{name}.old"
        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)


def _record(config: Config, ranks: Ranks, split: Split, evals: dict[str, Split], schedule: Schedule, model: torch.nn.Module, frozen: int,
            drawn: list[str], settled: dict, start: int) -> dict:
    """What a run was: settings, versions, machine, data, and which backends computed it."""
    import deepspeed
    import transformers

    return {
        "config": config.model_dump(mode="json"), "command": sys.argv[1:], "start_step": start, "total_steps": schedule.total,
        "sequences_per_step": schedule.size, "world_size": ranks.world, "device": str(ranks.device), "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in model.parameters()), "frozen": frozen, "drawn_anew": drawn, **settled,
        "data": {s.name: {"sequences": len(s), "tokens": int(s.lengths.sum()), **s.data.meta["counts"]} for s in [split, *evals.values()]},
        "python": platform.python_version(), "machine": platform.machine(),
        "versions": {"fastft": fastft.__version__, "torch": torch.__version__, "transformers": transformers.__version__, "deepspeed": deepspeed.__version__},
    }
