"""The one training loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastft import assemble, rooms
from fastft.assemble import Job
from fastft.config import Config
from fastft.data import batches
from fastft.errors import Interrupted
from fastft.ops import backends
from fastft.optim.groupings.base import Progress
from fastft.ranks import environment, keep_heap
from fastft.tasks.base import Batch, Draw
from fastft.track import Telemetry
from fastft.train import export, fitting, health, resuming, run_folder
from fastft.train.advice import advice
from fastft.train.collector import quiet_collector
from fastft.train.evaluation import evaluate
from fastft.train.heartbeat import Heartbeat
from fastft.train.observers._standard import STANDARD, Best, Skips, Stragglers, upgraded
from fastft.train.observers.base import Action, Evaluate, Metrics, Observer, Save, StepResult, Stop, View
from fastft.train.record import run_record, sentences
from fastft.train.resuming import Found
from fastft.train.saver import Saver
from fastft.train.schedule import Due, Schedule
from fastft.train.signals import StopRequest
from fastft.train.throughput import Throughput, peak_memory
from fastft.zero import engine as zero
from fastft.zero.settings import deepspeed_config


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
    with ExitStack() as cleanup:
        return _train(config, cleanup, resume, overwrite)


def _train(config: Config, cleanup: ExitStack, resume: bool, overwrite: bool) -> dict:
    run_dir = Path(config.run.dir)
    ranks = environment(config)
    if not resume:
        run_folder.check(run_dir, config, overwrite)
    trackers = [rooms.TRACKERS.get(name)(settings) for name, settings in config.run.trackers.chosen().items()]
    if ranks.main:
        cleanup.callback(run_folder.lock(run_dir).close)
    loop = build(config, cleanup, resume)
    found, job, schedule = loop.found, loop.job, loop.schedule
    config = job.config  # where auto has become a number
    assert job.train is not None
    if ranks.main:
        run_folder.claim(run_dir, config, resume)
    log = loop.open(Telemetry(run_dir, ranks.main, schedule.total, trackers, loop.step))
    loop.saver.stop.say = log.warn
    cleanup.callback(log.close)
    log.open_trackers(run_dir, config)
    record = run_record(job, schedule, loop.step)
    log.record("run", zero_step=loop.engine.fastft_step, resumed_from=found and found.record(), **record)
    for sentence in [*([found.describe(config)] if found else []), *sentences(job, schedule)]:
        log.say(sentence)
    for sentence in advice(job, schedule):
        log.say(f"warning: {sentence}")
    return loop.run()


def build(config: Config, cleanup: ExitStack, resume: bool = False, steps_only: bool = False) -> Loop:
    """All that a run needs before its first step.

    Parameters
    ----------
    cleanup : ExitStack
        Gets what is to be undone when the run is over.
    resume : bool
        Take over the newest checkpoint of ``run.dir``.
    steps_only : bool
        Neither evaluation sets nor a run folder: the steps are taken for their own sake (`fastft bench`).

    Raises
    ------
    UserError
        Bad configuration, data or model.
    """
    ranks = environment(config)
    job = assemble.start(config)
    ranks = ranks.with_sequences(config.parallel.sequence)
    assemble.add_data(job, evals=not steps_only)
    assert job.order is not None and job.train is not None
    Schedule.of(config, job.order, job.task.max_length)  # of a run that begins; refused now if it cannot be
    heart = Heartbeat()
    heart.beat(0)  # from here on ranks wait for each other
    zero.start_process_group()
    job.ranks = ranks = ranks.with_group()
    health.check_agreement(config, job.train.data.key, ranks)
    if not steps_only:
        health.check_shared(Path(config.run.dir), ranks)
    settings = deepspeed_config(config, ranks)
    assemble.add_model(job, shards=settings if config.parallel.zero == 3 else None)
    zero.check_layers(job.model, config, ranks)
    assemble.add_optimizer(job)
    assert job.optimizer is not None and job.spec is not None
    layout = zero.layout(job.model, job.optimizer)
    found = resuming.find(job, layout) if resume else None
    schedule = found.schedule if found else Schedule.of(config, job.order, job.task.max_length)
    engine = zero.build_engine(job.model, job.optimizer, settings, config.parallel)
    cleanup.callback(zero.release, engine)
    with fitting.explained(config):
        assemble.add_objective(job, engine)
    keep_heap(ranks.device, config.parallel.zero == 3)  # not before: what is loaded and let go of is to be given back
    ranks.seed(config.run.seed)
    stop = StopRequest()
    if not steps_only:
        cleanup.enter_context(stop)
    saver = Saver(job, engine, schedule, layout, stop, heart)
    cleanup.callback(saver.close)
    loop = Loop(job, engine, schedule, saver, heart)
    loop.found = found
    if found:
        loop.resume(found)
    if config.batch.micro_tokens == "auto":
        fitting.settle(loop)
    return loop


class Loop:
    """Steps, and what is between them.

    Attributes
    ----------
    found : Found or None
        The checkpoint that it goes on from.
    mark : callable
        Called with the name of each part of a step as it ends: "data" (waiting for the batches), "forward", "backward",
        "optimizer"; `fastft bench` takes the time.
    """

    def __init__(self, job: Job, engine: Any, schedule: Schedule, saver: Saver, heart: Heartbeat):
        self.job, self.engine, self.schedule, self.saver, self.heart = job, engine, schedule, saver, heart
        assert job.optimizer is not None and job.train is not None and job.objective is not None
        self.split, self.objective = job.train, job.objective
        self.stepper = zero.Stepper(engine, job.optimizer, job.config.optim.grad_clip)
        self.throughput = Throughput()
        self.step = 0
        self.metrics: Metrics = {}
        self.found: Found | None = None
        self.mark: Callable[[str], object] = lambda part: None
        self.stopped: str | None = None  # why the run ended before its last step
        self.chosen: list | dict = []
        now, config = time.monotonic(), job.config
        self.eval_due, self.save_due = (
            Due(e, schedule, now) for e in (config.train.eval_every, config.checkpoint.every)
        )
        self.observers: dict[str, Observer] = {}
        self.states: dict[str, dict] = {}  # of the observers, from a checkpoint

    def resume(self, found: Found) -> None:
        """Take over a checkpoint's state."""
        state = resuming.load(self.job, self.engine, found)
        self.step, self.stopped = state["step"], state.get("stopped")
        self.states = upgraded(state)

    def open(self, log: Telemetry) -> Telemetry:
        """Begin to watch and to record."""
        self.log = log
        view = View(self.job, self.schedule, log, self.observers)
        chosen = {
            name: (rooms.OBSERVERS.get(name), settings) for name, settings in self.job.config.train.chosen().items()
        }
        for name, (kind, settings) in {**{n: (k, None) for n, k in STANDARD.items()}, **chosen}.items():
            self.observers[name] = kind(settings, view)
            if name in self.states:
                self.observers[name].load_state(self.states[name])
        for name in ("skips", "stragglers", "best"):
            setattr(self, name, self.observers[name])
        self.stepper.before_step = self._before_update
        return log

    skips: Skips
    stragglers: Stragglers
    best: Best
    log: Telemetry

    def run(self) -> dict:
        observers = self.observers.values()
        if self.step == 0 and (self.job.config.train.eval_at_start or any(o.needs_start for o in observers)):
            self._measure()
            for observer in observers:
                observer.at_start(self.metrics)
            self.metrics = {}  # of no step: nothing is best or improves by it
        self.engine.train()
        for loss in self.steps():
            self.after_step(loss)
            self.heart.beat(self.step)
        return self._finish()

    def steps(self) -> Iterator[torch.Tensor]:
        """Take the steps that are left; what is due after one is for the caller. Yields this rank's share of the
        loss.
        """
        with ThreadPoolExecutor(1) as ahead, quiet_collector():  # collates the next step while this one computes
            coming = ahead.submit(self.collate_step, self.step)
            while self.step < self.schedule.total and self.stopped is None:
                step_batches, denominator = coming.result()
                self.mark("data")
                if self.step + 1 < self.schedule.total:
                    coming = ahead.submit(self.collate_step, self.step + 1)
                with fitting.explained(self.job.config, self.step + 1):
                    loss = self.optimizer_step(step_batches, denominator)
                self.step += 1
                yield loss

    def optimizer_step(self, step_batches: list[Batch], denominator: float) -> torch.Tensor:
        """Forward and backward of every micro-step, then the update.

        Returns
        -------
        Tensor
            0-dim, detached: this rank's share of the step's loss.
        """
        ranks = self.job.ranks
        assert self.job.groups is not None
        progress = Progress(self.step, self.schedule.total, self.schedule.epoch(self.step))
        self.lr = self.job.groups.set_learning_rates(self.job.optimizer, progress)
        # DeepSpeed averages gradients over ranks, so the sum over all ranks and micro-steps wants world / targets.
        # full, not tensor: that one would wait for the device
        scale = torch.full((), ranks.world / (denominator or 1.0), dtype=torch.float32, device=ranks.device)
        total = torch.zeros((), dtype=torch.float32, device=ranks.device)
        step_batches = self.objective.begin_step(self.engine, step_batches)
        for i, batch in enumerate(step_batches):
            last = i == len(step_batches) - 1
            batch = batch.to(ranks.device)
            self.stepper.boundary(last)
            with self.stragglers.timer:
                loss = self.objective.compute_loss(self.engine, batch, scale)
            total += loss.detach()
            self.mark("forward")
            self.stepper.backward(loss, last)
            self.mark("optimizer" if last else "backward")
            self.throughput.add(batch)
        return total

    def collate_step(self, step: int) -> tuple[list[Batch], float]:
        """This rank's batches of an optimizer step, and the loss's denominator over all ranks."""
        config, ranks = self.job.config, self.job.ranks
        samples = self.schedule.samples(step)
        ids, rows = samples.ids, np.arange(len(samples.ids))
        micro, world = config.batch.micro, ranks.data_world
        if micro == "auto":
            sizes, most = self.split.sizes[ids], config.batch.forward_tokens * ranks.sequence_world
            plan = batches.auto(rows, sizes, world, most, self.job.task.pads, ranks.device.type, self.job.overhead)
        else:
            plan = batches.fixed(rows, world, micro)
        mine = [part[ranks.data_rank] for part in plan]
        draws = [Draw(config.run.seed, samples.epochs[part]) for part in mine]
        made = [self.job.task.collate(self.split, ids[part], draw) for part, draw in zip(mine, draws, strict=True)]
        return made, float(self.split.targets[ids].sum())

    def _before_update(self) -> None:
        self.mark("backward")
        for observer in self.observers.values():
            observer.before_update(self.step + 1)

    def after_step(self, loss: torch.Tensor) -> None:
        config, ranks = self.job.config, self.job.ranks
        last = self.step == self.schedule.total
        logging = self.step % config.train.log_every == 0 or last or self.step == 1
        skipped = self.stepper.skipped()

        def mean_loss() -> float:
            return float(ranks.sum_tensor(loss)) / ranks.world

        result = StepResult(self.step, loss, skipped, logging, mean_loss)
        asked = [action for observer in self.observers.values() for action in observer.after_step(result)]
        if logging:
            self._log(mean_loss())
        else:
            self.log.progress(self.step)
        eval_due, save_due = self._due()
        if eval_due or last or any(isinstance(action, Evaluate) for action in asked):
            asked += self._evaluate()
        reason = next((action.reason for action in asked if isinstance(action, Stop)), None)
        last = last or reason is not None
        signum = self.saver.agreed()
        if signum or last or save_due or any(isinstance(action, Save) for action in asked):
            self.stopped = reason
            self._save(wait=bool(signum) or last or not config.checkpoint.background)
        if reason is not None:
            self.log.record("stopped", step=self.step, reason=reason)
            self.log.warn(f"step {self.step}: stopped: {reason}")
        elif signum and not last:
            self.log.record("interrupted", step=self.step, signal=signum)
            raise Interrupted(signum, self.step, config.run.dir)

    def _due(self) -> tuple[bool, bool]:
        """Whether an evaluation and a checkpoint are due. By time, rank 0's clock decides for all."""
        now, both = time.monotonic(), (self.eval_due, self.save_due)
        due = [d.at(self.step, now) for d in both]
        if any(d.by_time for d in both):
            due = self.job.ranks.from_main(due)
        for d, is_due in zip(both, due, strict=True):
            if is_due:
                d.done(now)
        return due[0], due[1]

    def _log(self, loss: float) -> None:
        if not self.chosen:  # known once every op has run
            self.chosen = backends.choices()
            self.log.record("backends", chosen=self.chosen)
        rates = self.throughput.read(self.job.ranks)
        memory = peak_memory(self.job.ranks.device)
        self.log.record(
            "train",
            step=self.step,
            epoch=self.schedule.epoch(self.step),
            loss=loss,
            lr=self.lr,
            grad_norm=float(self.stepper.grad_norm),
            skipped=self.skips.total,
            memory=memory,
            **rates,
        )
        more = {"grad_norm": float(self.stepper.grad_norm), "padding": rates["padding"]}
        self.log.progress(self.step, loss=loss, lr=self.lr, rate=rates["tokens_per_second"], memory=memory, **more)

    def _evaluate(self) -> list[Action]:
        self._measure()
        return [a for o in self.observers.values() for a in o.after_evaluation(self.step, self.metrics)]

    def _measure(self) -> None:
        with self.throughput.paused():
            for name in self.job.evals:
                found = evaluate(self.job, name, self.step, self.engine, lambda: self.heart.beat(self.step))
                self.metrics[name], sure = found.numbers, found.intervals
                more = {"intervals": sure} if sure else {}
                self.log.record("eval", step=self.step, set=name, **self.metrics[name], **more)
                shown = "  ".join(f"{k} {v:.4g}" for k, v in self.metrics[name].items())
                self.log.say(f"step {self.step}  {name}: {shown}")

    def _save(self, wait: bool) -> None:
        start = time.perf_counter()
        with self.throughput.paused():
            best = self.best.best if self.best.saved(self.step) else None
            states = {name: state for name, o in self.observers.items() if (state := o.state())}
            path = self.saver.save(self.step, {"observers": states, "stopped": self.stopped}, best, wait)
            seconds = time.perf_counter() - start
            self.log.record("checkpoint", step=self.step, path=str(path), stall_seconds=seconds)

    def _finish(self) -> dict:
        config, ranks = self.job.config, self.job.ranks
        take_best = self.best.best is not None and (
            self.stopped is not None or any(observer.exports_best for observer in self.observers.values())
        )
        if not self.metrics and self.job.evals and not (take_best and self.best.metrics):
            self._evaluate()
        self.heart.rest()
        exported = self._take_best() if take_best else self.step
        metrics = (take_best and self.best.metrics) or self.metrics  # of what is exported
        results = {"step": self.step, "eval": metrics, "exported_step": exported, "stopped": self.stopped}
        folder = export.save_engine(self.engine, self.job, Path(config.run.dir) / "model", results)
        if ranks.main:
            run_folder.drop_old(Path(config.run.dir))
        more = {name: value for o in self.observers.values() for name, value in o.summary().items()}
        summary = {**results, "model": str(folder), "best": self.best.best, **self.throughput.overall(ranks), **more}
        self.log.record("end", **summary)
        return summary

    def _take_best(self) -> int:
        """Load the best checkpoint's weights, to be exported; its step."""
        assert self.best.best is not None
        step = self.best.best["step"]
        if step != self.step:
            resuming.load_step(self.job, self.engine, self.saver.folder, step)
        return step


def resumed(config: Config) -> dict:
    """Go on from the newest usable checkpoint of a run. UserError when the run has ended and nothing is left to do."""
    resuming.check_not_finished(config)
    return train(config, resume=True)
