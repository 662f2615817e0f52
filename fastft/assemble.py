"""The one order in which a run is put together, whatever is to be done with it.

train, resume, validate, eval, predict, export, replay and trace differ in how far they go and where weights and
labels come from; what comes before what is the same for all of them, and part of being right: labels before the model
(its head has as many outputs), edits before anything is checked, freezing before the optimizer, checks through the
engine where there is one.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastft import rooms
from fastft.config import Config
from fastft.data import batches
from fastft.data.encoder import Learned
from fastft.data.mixture import Mixture
from fastft.data.orders.base import Order
from fastft.data.split import Split
from fastft.errors import UserError
from fastft.lazy import torch
from fastft.models import load
from fastft.models.edits.base import Edit
from fastft.objectives.base import Objective
from fastft.optim.groups import ParameterGroups
from fastft.optim.optimizers.base import ClientOptimizer, OptimizerSpec
from fastft.ranks import Ranks, environment, keep_heap
from fastft.tasks.base import Draw, ModelSpec, Task
from fastft.zero.parameters import whole_numel

Weights = Literal["start", "trained", "empty"]


@dataclass
class Job:
    """A run, as far as it was put together; what was not asked for is absent.

    Attributes
    ----------
    learned : dict
        What the training data taught (label names), or the checkpoint or the model that it was taken from.
    model : Module
        The Hugging Face model, edited; inside the engine where there is one.
    came_in : str
        Dtype of the folder that the model was read from, fp32 or bf16; other dtypes count as fp32.
    initialized : list of str
        Names of its weights that were newly initialized.
    frozen : int
        Elements of parameters that are not trained.
    objective, measured : Objective
        What is trained on, and the task's own without the wrappers around it, which evaluations take.
    record : dict
        What objective and edits settled, for the run's record.
    """

    config: Config
    ranks: Ranks
    task: Task
    learned: Learned = field(default_factory=dict)
    train: Split | None = None
    evals: dict[str, Split] = field(default_factory=dict)
    order: Order | None = None
    model: Any = None
    came_in: str = "fp32"
    initialized: list[str] = field(default_factory=list)
    edits: list[Edit] = field(default_factory=list)
    frozen: int = 0
    groups: ParameterGroups | None = None
    spec: OptimizerSpec | None = None
    optimizer: ClientOptimizer | None = None
    objective: Objective | None = None
    measured: Objective | None = None
    record: dict[str, Any] = field(default_factory=dict)
    sharded: bool = False  # an exported model of which each rank holds its part of every weight

    @property
    def adapter_only(self) -> bool:
        return any(edit.freezes_base for edit in self.edits)

    @cached_property
    def overhead(self) -> int:
        """What a micro-step costs beside its tokens, in tokens; see ``batches.overhead``."""
        own = [list(m.parameters(recurse=False)) for m in self.model.modules() if not isinstance(m, torch.nn.Embedding)]
        weights = {id(p): whole_numel(p) for parameters in own for p in parameters}
        return batches.overhead(sum(map(bool, own)), sum(weights.values()), self.ranks.device.type)

    def sample(self, count: int) -> dict[str, Any] | None:
        """Training rows at even distances, as the model is given them; None where the training data is not open."""
        if self.train is None:
            return None
        rows = np.unique(np.arange(count) * len(self.train) // count)
        return dict(self.task.collate(self.train, rows, Draw.fixed(self.config.run.seed, len(rows))).inputs)


def start(config: Config, learned: Learned | None = None) -> Job:
    """Ranks and task. ``learned``: instead of what the training data teaches."""
    if config.run.offline:
        load.go_offline()
    ranks = environment(config)
    task = rooms.TASKS.get(config.task)(config)
    check_sequence(config, task)
    return Job(config, ranks, task, learned or {})


def check_sequence(config: Config, task: Task) -> None:
    """UserError for what parallel.sequence cannot be had with, as far as configurations tell."""
    if config.parallel.sequence == 1:
        return
    key, one = f"parallel.sequence: {config.parallel.sequence}", "Set parallel.sequence: 1"
    if not task.cuts_sequences:
        able = ", ".join(name for name in rooms.TASKS.names() if rooms.TASKS.get(name).cuts_sequences)
        raise UserError(f"{key}: task: {config.task} does not cut its sequences; {able} do.", f"{one}.")
    if config.model.attention not in ("auto", "varlen"):
        raise UserError(
            f"{key}: model.attention: {config.model.attention} cannot be computed in parts of sequences; varlen is.",
            f"Set model.attention: auto, or {one[0].lower()}{one[1:]}.",
        )
    if wrappers := list(config.loss.chosen()):
        raise UserError(
            f"{key}: loss.{wrappers[0]} takes whole sequences.", f"Remove it, or {one[0].lower()}{one[1:]}."
        )
    heads = getattr(task.model_config.get_text_config(), "num_attention_heads", None)
    if heads and heads % config.parallel.sequence:
        raise UserError(
            f"{key}: each rank takes a part of the model's {heads} attention heads, which do not divide by it "
            f"({config.model.path}).",
            f"Set it to a divisor of {heads}.",
        )


def add_data(job: Job, *, train: bool = True, evals: bool = True) -> None:
    """Splits and sample order. All tokenizing is done here, before anything is built. Raises UserError."""
    config, task = job.config, job.task
    for name, settings in config.train.chosen().items():
        rooms.OBSERVERS.get(name).check_task(settings, task)
    if config.checkpoint.best_by is not None:
        task.metric(config.checkpoint.best_by, "checkpoint.best_by")
    if train:
        job.train = task.train_split()
        job.learned = task.learned(job.train)
        job.order = _order(config, job.train, config.batch.sequences(task.max_length))
    if evals:
        job.evals = task.eval_splits(job.learned)


def _order(config: Config, split: Split, batch: int) -> Order:
    data, train = config.data, config.train
    if data.shares is None:
        return rooms.ORDERS.get(data.order.name)(data.order, split, data.seed, batch)
    return Mixture(data.shares, split, data.seed, batch, train.steps, train.epochs or 1.0)


def add_model(job: Job, weights: Weights = "start", shards: dict | None = None) -> None:
    """The model, edited, with its frozen parameters.

    Parameters
    ----------
    weights : str
        "start": those that the run begins with, a new head initialized; "trained": of an exported model, none of
        which may be missing; "empty": any, for a checkpoint brings them.
    shards : dict, optional
        DeepSpeed's settings of the ZeRO-3 engine that is to come: each rank keeps its part of every parameter.
    """
    from fastft.zero.making import Making
    from fastft.zero.sharding import shard

    spec = job.task.model(job.learned)
    making = None if shards is None else Making(job.ranks.device)
    if weights == "trained":
        _open_trained(job, spec, making)
    else:
        _start(job, spec, weights, making)
    if shards is not None:
        shard(job.model, shards, load.dtype_of(job.config.model.dtype))
    if weights != "trained":
        job.frozen = sum(whole_numel(p) for p in job.model.parameters() if not p.requires_grad)


def _start(job: Job, spec: ModelSpec, weights: Weights, making: Any) -> None:
    """The model that a run begins with, or an "empty" one, edited."""
    config, task = job.config, job.task
    job.came_in = load.dtype_in(config.model)
    if weights == "start" and any(rooms.EDITS.get(n).wrote(Path(config.model.path)) for n in rooms.EDITS.names()):
        raise UserError(
            f"model.path: {config.model.path} holds an adapter, not a whole model.",
            "Merge it first: fastft export RUN_DIR FOLDER --merge, and start from that folder.",
        )
    settings = config.model.changed(init="random") if weights == "empty" else config.model
    new = spec.new_parameters if weights == "start" else ()
    chosen = config.model.chosen().items()
    how = {"device": job.ranks.device, "making": making, **spec.overrides}
    job.model, job.initialized = load.build(settings, spec.auto_class, new, config.run.seed, **how)
    job.edits = [rooms.EDITS.get(name)(settings, config) for name, settings in chosen]
    job.edits.sort(key=lambda edit: edit.order)
    with making or contextlib.nullcontext():
        if config.model.new_head and weights == "start":
            job.initialized = sorted({*job.initialized, *load.new_head(job.model, new)})
        if config.model.resize_embeddings:
            load.resize(job.model, task.processor)
        load.freeze(job.model, config.model.freeze)  # by the model's own names
        for edit in job.edits:
            edit.see(job)
            edit.apply(job.model, spec.new_parameters)
            job.record |= edit.record()


def add_together(job: Job) -> Any:
    """An exported model that all ranks use together: in shards, with the engine that gathers them, where there are
    several and parallel.zero is 3, which joins the process group.

    Returns the engine; None: there is none, and every rank has the whole model.
    """
    job.sharded = job.config.parallel.zero == 3 and not job.ranks.alone
    if not job.sharded:
        add_model(job, "trained")
        return None
    from fastft.zero import engine
    from fastft.zero.settings import deepspeed_config

    engine.start_process_group()
    settings = deepspeed_config(job.config, job.ranks)
    add_model(job, "trained", shards=settings)
    return engine.build_forward_engine(job.model, settings)


def _open_trained(job: Job, spec: ModelSpec, making: Any = None) -> None:
    """An exported model: whole, or an edit's own form beside the base that it names."""
    settings, folder = job.config.model, Path(job.config.model.path)
    kinds = [kind for name in rooms.EDITS.names() if (kind := rooms.EDITS.get(name)).wrote(folder)]
    kinds.sort(key=lambda kind: kind.order)
    if not kinds:
        job.model, _ = load.build(settings, spec.auto_class, (), job.config.run.seed, making=making)
        return
    path, revision = kinds[-1].base(folder)
    # The edit brings the head, whatever the base has in its place.
    base = settings.changed(path=path, revision=revision, tokenizer=str(folder), new_head=True)
    how = {"making": making, **spec.overrides}
    job.model, _ = load.build(base, spec.auto_class, spec.new_parameters, job.config.run.seed, **how)
    with making or contextlib.nullcontext():
        for kind in kinds:
            kind.open(folder, job.model)
    if job.model.can_generate():
        job.model.generation_config = load.generation_config(settings, job.model.generation_config)


def add_optimizer(job: Job) -> None:
    """Parameter groups and the optimizer over them."""
    config = job.config
    if config.parallel.activation_checkpointing:
        if not job.model.supports_gradient_checkpointing:
            raise UserError(
                f"parallel.activation_checkpointing: {type(job.model).__name__} does not support it.",
                "Set it to false; smaller batch.micro_tokens save memory too.",
            )
        job.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    job.groups = ParameterGroups.of(job.model, config)
    job.spec = OptimizerSpec.of(config)
    job.optimizer = job.spec.build(job.groups.groups)


def add_objective(job: Job, forward: Any = None) -> None:
    """Check the model against the task, and settle how its loss is taken.

    ``forward``: the engine around the model; None: there is none, and the model goes to this rank's device.
    """
    if forward is None:
        job.model.to(job.ranks.device)
        forward = job.model
    device = job.ranks.device
    if job.ranks.sequence_world > 1:
        from fastft.models import sequence_parallel

        job.task.sequences = sequence_parallel.install(forward, job.model, job.ranks, job.task.max_length, device)
    job.task.check_model(forward, job.model, device)
    if job.config.model.attention == "varlen" and job.task.pads and not getattr(job.task, "bounds", False):
        raise UserError(
            "model.attention: varlen is for encoders, and for packed documents (causal_lm and sft with data.packing: "
            "isolated).",
            "Set model.attention: auto.",
        )
    objective = job.measured = job.task.objective(forward, job.model, device, job.learned)
    for name, settings in job.config.loss.chosen().items():
        objective = rooms.OBJECTIVES.get(name)(objective, settings, job.config)
    job.objective = objective
    job.record |= {**objective.record, **job.task.settled}


def trained(path: str, task: str | None = None, together: bool = False) -> Job:
    """An exported model: a run's folder, a folder written by save_pretrained, or a hub id.

    The config is that of the run that exported it or, where there is none, that of ``task``, or else of the task that
    the model fits.

    ``together``: all ranks ask for it, and for the same then: with parallel.zero: 3 they hold it in shards.
    """
    from fastft import config as configuration

    folder = Path(path)
    config = None
    if (folder / "model").is_dir():
        path = str(folder / "model")
        if (folder / "config.yaml").is_file():
            config = configuration.load_run(folder)
    model = configuration.Model(path=path)
    if config is not None:
        job = start(config.changed(model=model.changed(trust_remote_code=config.model.trust_remote_code)))
    else:
        found = load.config(model)
        said = getattr(found, "fastft_task", None)
        fitting = (name for name in rooms.TASKS.names() if rooms.TASKS.get(name).fits(found))
        names = [said] if said in rooms.TASKS else [task] if task else list(fitting)
        if not names:
            kind = (found.architectures or ["(none)"])[0]
            known = ", ".join(rooms.TASKS.names())
            raise UserError(
                f"model path {path}: {kind} is no model of a known task ({known}).",
                "Give a model that fastft exported.",
            )
        job = start(configuration.validate({"task": names[0], "model": {"path": path}}))
    job.learned = job.task.learned_of_model()
    if together:
        add_together(job)
    else:
        add_model(job, "trained")
    if not job.sharded:
        job.model.to(job.ranks.device)
    job.model.eval()
    keep_heap(job.ranks.device, job.sharded)
    return job
