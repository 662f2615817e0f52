"""From a checkpoint to the state of a run: which one, whether the rest would be the rest of this run, loading it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from fastft import config as configuration
from fastft.assemble import Job
from fastft.config import Config
from fastft.errors import UserError
from fastft.train import checkpoint, run_folder
from fastft.train.schedule import Schedule
from fastft.zero import restoring

# What a resumed run may not change, with what a checkpoint without the key was written with: the sample order and the
# layout of the state depend on it.
SETTLED: dict[str, object] = {
    "task": None,
    "batch.size": None,
    "batch.global_tokens": None,
    "data.seed": None,
    "data.order": {"name": "permutation"},
    "model.dtype": None,
    "optim.name": None,
    "optim.state_dtype": None,
    "optim.master": None,
}


@dataclass(frozen=True)
class Found:
    """The checkpoint to go on from."""

    path: Path
    manifest: dict
    schedule: Schedule  # of the rest of the run
    passed_over: list[str]  # what is wrong with newer ones
    resharded: bool  # whether another number of ranks or ZeRO stage wrote it

    def describe(self, config: Config) -> str:
        """Where the run goes on, and what of its configuration changed since."""
        before = yaml.safe_load(self.manifest["state"]["config"])
        changed = configuration.changes(before, config.model_dump(mode="json"))
        return "; ".join([f"from step {self.manifest['step']}", *changed])

    def record(self) -> dict:
        return {
            "path": str(self.path),
            "world_size": self.manifest["world_size"],
            "zero": self.manifest["zero"],
            "resharded": self.resharded,
            "passed_over": self.passed_over,
        }


def begun(config: Config) -> Literal["new", "not saved", "saved", "finished"]:
    """What there is of a run in its folder, for a job that is started again.

    "not saved": this run, by its configuration, ended before its first checkpoint, so that nothing is lost if it begins
    anew; another one without a checkpoint is "new", which then refuses the folder.
    """
    folder = Path(config.run.dir)
    if not (folder / "metrics.jsonl").is_file() or not (folder / "config.yaml").is_file():
        return "new"
    run = configuration.load_run(folder)
    if config.batch.micro_tokens == "auto":  # which has become a number there
        config = config.changed(batch=config.batch.changed(micro_tokens=run.batch.micro_tokens))
    before, now = (c.model_dump(mode="json") for c in (run, configuration.absolute(config)))
    same = not configuration.changes(before, now)
    if run_folder.finished(folder, config):
        return "finished"
    if checkpoint.steps(folder / "checkpoints"):
        return "saved"
    return "not saved" if same else "new"


def find(job: Job, layout: str) -> Found:
    """The newest usable checkpoint, once it is known that the rest would be the rest of this run.

    Raises
    ------
    UserError
        There is none, or it was written with other data, settings or trained parameters.
    """
    config, ranks = job.config, job.ranks
    assert job.train is not None and job.order is not None and job.spec is not None
    path, manifest, passed_over = checkpoint.find(Path(config.run.dir) / "checkpoints", ranks=ranks)
    state = manifest["state"]
    run_folder.check_data(path, state["data"], job.train.data.key)
    before, now = yaml.safe_load(state["config"]), config.model_dump(mode="json")
    for key, default in SETTLED.items():
        then, new = (_value(c, key, default) for c in (before, now))
        if then != new:
            raise UserError(
                f"{path}: was written with {key} = {then}, this run has {new}.",
                f"Resume with {key}={then}, or start a new run from the exported model.",
            )
    then, new = (_mixture(c) for c in (before, now))
    if then != new:
        raise UserError(
            f"{path}: was written with another mixture: weights, epochs or data.curriculum changed (or train.steps, of "
            "which a stage is a fraction).",
            "Resume with the values that the run began with, or start a new run from the exported model.",
        )
    names = {type(edit).__name__: edit for edit in job.edits}
    stored = state.get("edits", {})
    if "edits" in state and set(stored) != set(names):
        raise UserError(
            f"{path}: was written with model edits {', '.join(sorted(stored)) or '(none)'}, this run has "
            f"{', '.join(sorted(names)) or '(none)'}.",
            "Resume with the settings of model that the run began with, or start a new run from the exported model.",
        )
    wrong = [names[name].check_state(stored[name]) for name in stored if name in names] if ranks.main else []
    if problem := next(filter(None, ranks.from_main(wrong)), None):
        raise UserError(f"{path}: {problem}", "Put the old model back, or start a new run.")
    if state["layout"] != layout:  # DeepSpeed restores flat shards by position: layers would take each other's weights
        raise UserError(
            f"{path}: was written with other trained parameters or parameter groups (model.freeze, an adapter, "
            "optim.weight_decay 0 or not).",
            "Resume with the settings that the run began with, or start a new run from the exported model.",
        )
    segments = state.get("segments", state.get("knots", ()))  # as fastft 0.1.0 called them
    schedule = Schedule.of(config, job.order, job.task.max_length, segments)
    if manifest["step"] > schedule.total or state.get("taken", 0) > schedule.positions:
        raise UserError(
            f"{path}: is at step {manifest['step']}, the run would end at {schedule.total}.",
            "Raise train.steps or train.epochs.",
        )
    resharded = restoring.reshards(manifest, config.parallel.zero, ranks, job.spec)
    return Found(path, manifest, schedule, passed_over, resharded)


def _value(config: dict, key: str, default: object) -> object:
    value: object = config
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return default if value is None else value


def _mixture(config: dict) -> object:
    """What the sample order of a mixture hangs on; None where there is none."""
    data, train = config["data"], config["train"]
    parts = [(source.get("name"), source.get("weight"), source.get("epochs")) for source in data["train"]]
    if all(weight is None and epochs is None for _, weight, epochs in parts):
        return None
    stages = data.get("curriculum", [])
    length = (train["steps"], train["epochs"]) if any(isinstance(s["until"], float) for s in stages) else None
    return parts, stages, length


def load(job: Job, engine, found: Found) -> dict:
    """Restore model, optimizer and random numbers; returns the loop's state."""
    assert job.optimizer is not None
    before = job.optimizer.param_groups
    settings = [{key: value for key, value in group.items() if key != "params"} for group in before]
    state = checkpoint.load(engine, found.path, found.manifest, job.ranks)
    for group, given in zip(job.optimizer.param_groups, settings, strict=True):  # new ones, as torch loads them
        group.update(given)  # the configuration's, not the checkpoint's
    return state


def load_step(job: Job, engine, folder: Path, step: int) -> None:
    """Load a checkpoint of this run, whose later ones may be of other ranks, for its weights. Raises UserError."""
    assert job.spec is not None
    path, manifest, _ = checkpoint.find(folder, step, job.ranks)
    restoring.reshards(manifest, job.config.parallel.zero, job.ranks, job.spec)  # refused where it cannot be
    checkpoint.load(engine, path, manifest, job.ranks)


def check_not_finished(config: Config) -> None:
    """UserError when a run was stopped by an observer and its model is exported: there is nothing to go on with."""
    run_dir = Path(config.run.dir)
    newest = checkpoint.steps(run_dir / "checkpoints")[-1:]
    if not newest or not (run_dir / "model").is_dir():
        return
    try:
        state = checkpoint.state_of(run_dir / "checkpoints" / f"step-{newest[0]}")
    except UserError:
        return
    if state.get("stopped"):
        raise UserError(
            f"{run_dir}: finished: it stopped at step {newest[0]}: {state['stopped']}.",
            "The model is in its folder model/. Start a new run from it to train on.",
        )
