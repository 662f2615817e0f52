"""The one training loop."""

import math
import platform
import statistics
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import yaml

import fastft
from fastft import config as configuration
from fastft.config import Config
from fastft.data import batches
from fastft.errors import Interrupted, UserError
from fastft.models import load
from fastft.ops import backends
from fastft.optim import FusedAdamW
from fastft.optim.schedules import learning_rate
from fastft.tasks import TASKS, Batch, Split, Task
from fastft.train import checkpoint, engine, export, health, reshard, run_folder
from fastft.train.engine import Ranks, Stepper
from fastft.train.evaluation import evaluate
from fastft.train.heartbeat import Heartbeat
from fastft.train.schedule import Schedule
from fastft.train.signals import StopRequest
from fastft.train.telemetry import Telemetry
from fastft.train.throughput import Throughput
from fastft.train.writer import Writer

# What a resumed run may not change: the sample order and the layout of the state depend on it.
SETTLED = ("task", "batch.size", "batch.global_tokens", "data.seed", "model.dtype", "optim.state_dtype", "optim.master")


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
        run_folder.check(run_dir, config, overwrite)
    held = run_folder.lock(run_dir) if ranks.main else None
    task = TASKS.get(config.task)(config)
    task.check_best_by()
    split, evals = task.train_split(), task.eval_splits()  # all tokenising is done before there is a process group
    schedule = Schedule.of(config, len(split), task.max_length)  # of a run that begins; refused now if it cannot be
    model, drawn = load.build(
        config.model, task.auto_class, task.new_parameters, config.run.seed, **task.model_overrides()
    )
    task.check_model(model, ranks.device)
    settled = task.attach(model, ranks.device)
    frozen = load.freeze(model, config.model.freeze)
    if config.parallel.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = engine.build_optimizer(model, config)
    layout = engine.layout(model, optimizer)
    heart = Heartbeat()
    heart.beat(0)  # from here on ranks wait for each other
    engine.start_process_group()
    health.check_agreement(config, split.data.key, ranks)
    found = _found(config, split, task.max_length, layout, ranks) if resume else None
    schedule = found.schedule if found else schedule
    settings = engine.deepspeed_config(config, ranks)
    if found and found.converted:
        settings["checkpoint"] = {**settings.get("checkpoint", {}), **reshard.SETTINGS}
    model_engine = engine.build_engine(model, optimizer, settings, config.parallel.fused_step)
    with ExitStack() as cleanup:
        stop = cleanup.enter_context(StopRequest())
        run = _Run(config, task, split, evals, schedule, ranks, model_engine, optimizer, layout, stop, heart)
        if held:
            cleanup.callback(held.close)
        cleanup.callback(run.writer.close)
        if found:
            run.resume(found)
        if ranks.main:
            run_folder.claim(run_dir, config, resume)
        log = run.log = Telemetry(run_dir, ranks.main, schedule.total)
        cleanup.callback(log.close)
        log.record(
            "run",
            zero_step=model_engine.fastft_step,
            resumed_from=found and found.record(),
            **_record(config, ranks, split, evals, schedule, model, frozen, drawn, settled, run.step),
        )
        return run.loop()


@dataclass(frozen=True)
class _Found:
    """The checkpoint to go on from."""

    path: Path
    manifest: dict
    schedule: Schedule  # of the rest of the run
    passed_over: list[str]  # what is wrong with newer ones
    converted: Path | None  # its form for this number of ranks and ZeRO stage, when it was written by another

    def record(self) -> dict:
        return {
            "path": str(self.path),
            "world_size": self.manifest["world_size"],
            "zero": self.manifest["zero"],
            "converted": self.converted is not None,
            "passed_over": self.passed_over,
        }


def _found(config: Config, split: Split, max_length: int, layout: str, ranks: Ranks) -> _Found:
    """The newest usable checkpoint, once it is known that the rest would be the rest of this run; converted where that is needed."""
    path, manifest, passed_over = checkpoint.find(Path(config.run.dir) / "checkpoints", ranks=ranks)
    run_folder.check_data(path, manifest["state"]["data"], split.data.key)
    before = yaml.safe_load(manifest["state"]["config"])
    for key in SETTLED:
        section, _, name = key.rpartition(".")
        then, now = (c[section].get(name) if section else c.get(name) for c in (before, config.model_dump(mode="json")))
        if then != now:
            raise UserError(
                f"{path}: was written with {key} = {then}, this run has {now}.",
                f"Resume with {key}={then}, or start a new run from the exported model.",
            )
    if (
        manifest["state"]["layout"] != layout
    ):  # DeepSpeed restores flat shards by position: layers would take each other's weights
        raise UserError(
            f"{path}: was written with other trained parameters or parameter groups (model.freeze, optim.weight_decay 0 or not).",
            "Resume with the settings that the run began with, or start a new run from the exported model.",
        )
    schedule = Schedule.of(config, len(split), max_length, manifest["state"].get("knots", ()))
    if manifest["step"] > schedule.total or manifest["state"].get("taken", 0) > schedule.positions:
        raise UserError(
            f"{path}: is at step {manifest['step']}, the run would end at {schedule.total}.",
            "Raise train.steps or train.epochs.",
        )
    converted = (
        reshard.convert(path, checkpoint.TAG, config.parallel.zero, ranks)
        if reshard.needed(manifest, config.parallel.zero, ranks)
        else None
    )
    return _Found(path, manifest, schedule, passed_over, converted)


class _Run:
    """The state of a run: everything the loop touches, in one place."""

    def __init__(
        self,
        config: Config,
        task: Task,
        split: Split,
        evals: dict[str, Split],
        schedule: Schedule,
        ranks: Ranks,
        model_engine,
        optimizer: FusedAdamW,
        layout: str,
        stop: StopRequest,
        heart: Heartbeat,
    ):
        self.config, self.task, self.split, self.evals, self.schedule, self.ranks = (
            config,
            task,
            split,
            evals,
            schedule,
            ranks,
        )
        self.engine, self.optimizer, self.layout, self.stop = model_engine, optimizer, layout, stop
        self.log: Telemetry | None = None  # opened once everything that can be refused has been
        self.stepper = Stepper(model_engine, optimizer, config.optim.grad_clip)
        self.folder = Path(config.run.dir) / "checkpoints"
        self.step, self.skipped_in_a_row, self.skipped_total = 0, 0, 0
        self.metrics: dict[str, dict[str, float]] = {}
        self.throughput = Throughput()
        self.recent: deque[float] = deque(maxlen=50)  # losses, where train.spike_factor asks for them
        self.heart, self.pace = heart, health.Pace(ranks.device)
        self.stepper.before_step = self._check_weights
        self.chosen: list | dict = []
        self.writer = Writer(ranks)
        self.best: dict | None = (
            None  # step, metric and value of the best checkpoint, where checkpoint.best_by asks for it
        )
        self.evaluated_at = -1

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
        scale = torch.tensor(self.ranks.world / (denominator or 1.0), dtype=torch.float32, device=self.ranks.device)
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
        return [self.task.collate(self.split, part[self.ranks.rank]) for part in plan], float(
            self.split.targets[ids].sum()
        )

    def _after_step(self, loss: torch.Tensor) -> None:
        settings, last = self.config.train, self.step == self.schedule.total
        self._count_skips()
        self._watch_for_spikes(loss)
        if self.step % settings.log_every == 0 or last or self.step == 1:
            self._log(loss)
        else:
            self.log.progress(self.step)
        if (settings.eval_every and self.step % settings.eval_every == 0) or last:
            self._evaluate()
        signum = self._agreed()
        if signum or last or (self.config.checkpoint.every and self.step % self.config.checkpoint.every == 0):
            self._save(wait=bool(signum) or last or not self.config.checkpoint.background)
        if signum and not last:
            self.log.record("interrupted", step=self.step, signal=signum)
            raise Interrupted(signum, self.step, self.config.run.dir)

    def _count_skips(self) -> None:
        skipped = self.stepper.skipped()
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        self.skipped_total += skipped
        if skipped:
            self.log.record(
                "skipped",
                step=self.step,
                samples=self.schedule.ids(self.step - 1, len(self.split), self.config.data.seed).tolist(),
            )
            self.log.say(f"step {self.step}: NaN or Inf gradients; the step was skipped")
        if self.skipped_in_a_row > self.config.train.max_skipped:
            raise UserError(
                f"{self.skipped_in_a_row} steps in a row had NaN or Inf gradients (the last at step {self.step}).",
                "Lower optim.lr, check the data (the samples stand in metrics.jsonl), or raise train.max_skipped.",
            )

    def _check_weights(self) -> None:
        """Before the update: after it ZeRO 1 and 2 have just written all replicated weights anew from the shards."""
        every, step = self.config.parallel.verify_every, self.step + 1
        if every and step % every == 0 and self.ranks.world > 1 and self.config.parallel.zero < 3:
            health.check_weights(self.engine.module, self.ranks, step)

    def _watch_for_spikes(self, loss: torch.Tensor) -> None:
        factor = self.config.train.spike_factor
        if factor is None:
            return
        value = self._over_ranks(loss)
        usual = statistics.median(self.recent) if len(self.recent) == self.recent.maxlen else math.inf
        self.recent.append(value)
        if value > factor * usual:
            samples = self.schedule.ids(self.step - 1, len(self.split), self.config.data.seed).tolist()
            self.log.record("spike", step=self.step, loss=value, usual=usual, samples=samples)
            raise UserError(
                f"step {self.step}: the loss {value:.4g} is more than {factor} times the usual {usual:.4g}; samples {', '.join(map(str, samples[:8]))}"
                f"{', ...' if len(samples) > 8 else ''}.",
                f"`fastft replay {self.config.run.dir} --step {self.step}` shows each sample; `fastft resume` goes back to the checkpoint before it.",
            )

    def _over_ranks(self, loss: torch.Tensor) -> float:
        """The step's loss, from every rank's share of it."""
        if self.ranks.world > 1:
            loss = loss.clone()
            dist.all_reduce(loss)
        return float(loss) / self.ranks.world

    def _log(self, loss: torch.Tensor) -> None:
        if not self.chosen:  # known once every op has run
            self.chosen = backends.choices()
            self.log.record("backends", chosen=self.chosen)
        value = self._over_ranks(loss)
        rates = self.throughput.read(self.ranks)
        if self.ranks.world > 1 and (slow := self.pace.slow_ranks(self.ranks)):
            self.log.record("slow_ranks", step=self.step, times=slow)
            self.log.say(
                f"step {self.step}: slow: "
                + ", ".join(f"rank {rank} takes {times:.1f} times the others' time" for rank, times in slow.items())
            )
        self.log.record(
            "train",
            step=self.step,
            epoch=self.schedule.taken(self.step) / len(self.split),
            loss=value,
            lr=self.optimizer.param_groups[0]["lr"],
            grad_norm=float(self.stepper.grad_norm),
            skipped=self.skipped_total,
            **rates,
        )
        self.log.progress(self.step, loss=value, rate=rates["tokens_per_second"])

    def _evaluate(self) -> None:
        self.evaluated_at = self.step
        with self.throughput.paused():
            for name, split in self.evals.items():
                self.metrics[name] = evaluate(
                    self.engine, self.task, split, self.ranks, lambda: self.heart.beat(self.step)
                )
                self.log.record("eval", step=self.step, set=name, **self.metrics[name])
                self.log.say(
                    f"step {self.step}  {name}: " + "  ".join(f"{k} {v:.4g}" for k, v in self.metrics[name].items())
                )

    def _agreed(self) -> int:
        """The signal that any rank has seen (0: none). Raises UserError on every rank when any could not write its part of a checkpoint."""
        signum, failed = self.stop.agreed(self.ranks.device, self.ranks.world, bool(self.writer.problem))
        if failed:
            problems = [self.writer.problem] * self.ranks.world
            if self.ranks.world > 1:
                dist.all_gather_object(problems, self.writer.problem)
            raise UserError(
                "; ".join(f"rank {rank}: {problem}" for rank, problem in enumerate(problems) if problem),
                f"The older checkpoints are whole: go on with `fastft resume {self.config.run.dir}` once it is mended.",
            )
        return signum

    def _save(self, wait: bool) -> None:
        start = time.perf_counter()
        with self.throughput.paused():
            best = self._is_best()
            state = {
                "step": self.step,
                "best": self.best,
                "skipped_in_a_row": self.skipped_in_a_row,
                "skipped_total": self.skipped_total,
                "data": self.split.data.key,
                "knots": self.schedule.knots_at(self.step),
                "taken": self.schedule.taken(self.step),
                "layout": self.layout,
                "task": self.task.state(),
                "config": configuration.dump(self.config),
            }
            self._settle()
            path = checkpoint.save(
                self.engine, self.writer, self.folder, self.step, state, self.config.checkpoint.keep, best
            )
            if wait:
                self._settle()
            self.log.record("checkpoint", step=self.step, path=str(path), stall_seconds=time.perf_counter() - start)

    def _settle(self) -> None:
        """Wait, all ranks together, until everyone's part of the last checkpoint is on the disk; raises on every rank when any failed.

        Only who writes on, or has nothing to write, gives a sign of life: a disk that does not answer is for the watchdog.
        """
        moved = -1
        while True:
            self._agreed()
            busy = self.writer.busy()
            if not self.stop.any(busy, self.ranks.device, self.ranks.world):
                break
            if not busy or self.writer.moved != moved:
                moved = self.writer.moved
                self.heart.beat(self.step)
            time.sleep(0.02)
        self._agreed()

    def _is_best(self) -> bool:
        """Whether the metric of checkpoint.best_by, if it was measured at this step, is the best so far."""
        name, _, metric = (self.config.checkpoint.best_by or "").rpartition(".")
        if not metric or self.evaluated_at != self.step:
            return False
        value, smaller = self.metrics[name][metric], metric in ("loss", "perplexity")
        if not math.isfinite(value):  # NaN is neither better nor worse than anything
            return False
        if self.best is not None and (value >= self.best["value"] if smaller else value <= self.best["value"]):
            return False
        self.best = {"step": self.step, "metric": f"{name}.{metric}", "value": value}
        return True

    def resume(self, found: _Found) -> None:
        settings = [
            {key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups
        ]
        state = checkpoint.load(self.engine, found.path, found.manifest, self.ranks, found.converted)
        for group, given in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(
                given
            )  # the configuration's, not the checkpoint's (of which stage 3 gives every group the first one's: weight decay on biases)
        if found.converted:
            reshard.done(found.converted, self.ranks)
        self.best = state.get("best")
        self.step, self.skipped_in_a_row, self.skipped_total = (
            state["step"],
            state["skipped_in_a_row"],
            state["skipped_total"],
        )

    def _finish(self) -> dict:
        if not self.metrics:
            self._evaluate()
        self.heart.rest()
        folder = export.save_engine(
            self.engine, self.task, Path(self.config.run.dir) / "model", self.config.model.dtype, self.ranks
        )
        if self.ranks.main:
            run_folder.drop_old(Path(self.config.run.dir))
        summary = {"step": self.step, "model": str(folder), "eval": self.metrics, **self.throughput.overall(self.ranks)}
        self.log.record("end", **summary)
        return summary


def _record(
    config: Config,
    ranks: Ranks,
    split: Split,
    evals: dict[str, Split],
    schedule: Schedule,
    model: torch.nn.Module,
    frozen: int,
    drawn: list[str],
    settled: dict,
    start: int,
) -> dict:
    """What a run was: settings, versions, machine, data, and which backends computed it."""
    import deepspeed
    import transformers

    return {
        "config": config.model_dump(mode="json"),
        "command": sys.argv[1:],
        "start_step": start,
        "total_steps": schedule.total,
        "sequences_per_step": schedule.size,
        "knots": schedule.knots,
        "data_key": split.data.key,
        "world_size": ranks.world,
        "device": str(ranks.device),
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "frozen": frozen,
        "drawn_anew": drawn,
        **settled,
        "data": {
            s.name: {"sequences": len(s), "tokens": s.totals["tokens"], **s.data.meta["counts"]}
            for s in [split, *evals.values()]
        },
        "python": platform.python_version(),
        "machine": platform.machine(),
        "versions": {
            "fastft": fastft.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "deepspeed": deepspeed.__version__,
        },
    }
