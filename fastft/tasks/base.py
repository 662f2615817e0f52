"""What a task is: how rows become features, which model, which loss, which metrics, which predictions.

A task is one file of this folder with a class that registers itself, or a folder where it needs several; files that
begin with an underscore hold what tasks share. What training data teaches (label names) is passed on as ``learned``;
a task keeps nothing between its methods.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from fastft import rooms
from fastft.config import Config, Data, Evaluation, Loss, Section
from fastft.corpus.shards import corpora_of
from fastft.data.encoder import Encoder, Learned
from fastft.data.split import Split, data_key, open_split
from fastft.errors import UserError, did_you_mean
from fastft.inference.base import Predictor
from fastft.lazy import torch
from fastft.models import load
from fastft.objectives.base import Objective

if TYPE_CHECKING:
    from fastft.ranks import Ranks

TASKS = rooms.TASKS
IGNORE = -100  # a target that no loss is taken of


class Processor(Protocol):
    """What turns raw inputs into features: a tokenizer, a feature extractor, an image processor."""

    def save_pretrained(self, save_directory: str | Path) -> Any: ...


@dataclass
class Batch:
    """One rank's part of one micro-step.

    Attributes
    ----------
    inputs : dict
        Keyword arguments of the model's forward.
    labels : Tensor
        What the loss compares with; its shape is the task's.
    samples, tokens, padded : int
        Samples, real tokens, and tokens computed.
    """

    inputs: Mapping[str, torch.Tensor | bool]
    labels: torch.Tensor
    samples: int
    tokens: int
    padded: int

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self

        def moved(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {name: moved(item) for name, item in value.items()}
            return value.pin_memory().to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value

        return replace(self, **{f.name: moved(getattr(self, f.name)) for f in fields(self)})


@dataclass(frozen=True)
class Draw:
    """Random numbers of a batch's samples: a function of seed, epoch and sample alone, so that resume, replay and
    trace see the same.

    Attributes
    ----------
    seed : int
    epochs : (n,) int64
        How often each sample was taken before; 0 in evaluations.
    """

    seed: int
    epochs: np.ndarray

    @classmethod
    def fixed(cls, seed: int, n: int) -> Draw:
        """The numbers of an evaluation, the same each time."""
        return cls(seed, np.zeros(n, np.int64))

    def generator(self, row: int, sample: int) -> np.random.Generator:
        """That of the batch's ``row``-th sample."""
        return np.random.Generator(np.random.Philox(key=[self.seed, (int(self.epochs[row]) << 40) + sample]))


@dataclass(frozen=True)
class Metric:
    """A number that an evaluation gives, and which way is better."""

    name: str
    lower_is_better: bool = False

    def better(self, value: float, than: float) -> bool:
        return value < than if self.lower_is_better else value > than


class Metrics(ABC):
    """Sums over batches on one rank; ``finish`` turns every rank's state into numbers."""

    @abstractmethod
    def update(self, model: Callable, batch: Batch) -> None:
        """Run the model (or the engine around it) on the batch and add what it says."""

    def complete(self, model: Callable, most: Callable[[int], int]) -> Iterator[None]:
        """What is left to do once all batches were seen, on all ranks together; yields now and then, as often on each.

        ``most(n)``: the largest n of any rank.
        """
        return iter(())

    def bring_together(self, ranks: Ranks) -> None:
        """After ``complete``, on all ranks together: samples whose parts were with several ranks, to one of them."""

    @abstractmethod
    def state(self) -> object:
        """Anything that pickles."""

    @abstractmethod
    def finish(self, states: list) -> dict[str, float]:
        """The numbers, from the states of all ranks."""

    def judged(self, learned: Learned) -> list[tuple[int, dict]] | None:
        """Of one rank: what each sample was judged by (_judged.py); None: nothing is kept."""
        return None

    def error_of(self, judged: dict[str, Any]) -> float | None:
        """How wrong a sample is by what ``judged`` says of it, to order them by; None: that cannot be said."""
        return None

    def by_class(self, states: list, learned: Learned) -> dict[str, dict[str, float]]:
        """precision, recall, f1 and support by class, from the states of all ranks."""
        return {}


class SampleMetrics(Metrics):
    """Metrics whose state is arrays with a row per sample, so that intervals can be drawn from them (_intervals.py)."""

    @abstractmethod
    def columns(self) -> dict[str, np.ndarray]:
        """Of one rank, (samples, ...) each; empty where it had none. Columns of one length have the same samples."""

    @abstractmethod
    def numbers(self, columns: dict[str, np.ndarray]) -> dict[str, float]:
        """The metrics of some samples."""

    def state(self) -> Any:
        return self.columns()

    def finish(self, states: list) -> dict[str, float]:
        columns = self.joined(states)
        return self.numbers(columns) if columns else {}

    def joined(self, states: list) -> dict[str, np.ndarray]:
        """The columns of all ranks, one behind the other."""
        parts = [columns for columns in states if columns]
        names = dict.fromkeys(name for part in parts for name in part)
        return {name: np.concatenate([part[name] for part in parts if name in part]) for name in names}


@dataclass(frozen=True)
class ModelSpec:
    """Which model a task trains.

    Attributes
    ----------
    auto_class : str
        Name of a transformers Auto class.
    new_parameters : tuple of str
        Name parts of weights that may be newly initialized (a head); any other missing weight is an error.
    overrides : dict
        Config attributes (``num_labels`` ...).
    """

    auto_class: str
    new_parameters: tuple[str, ...] = ()
    overrides: dict[str, Any] = field(default_factory=dict)


class Task(ABC):
    """One fine-tuning task, bound to a configuration.

    Class attributes
    ----------------
    Data, Loss, Evaluation, Predict : Section types
        The task's keys in ``data``, ``loss`` and ``evaluation``, and the options of ``fastft predict``.
    code_version : int
        Raise it when the same input gives other samples.
    pads : bool
        Whether the rows of a batch are computed at the longest one's length; settled by check_model.
    cuts_sequences : bool
        Whether its sequences can be cut over ranks (parallel.sequence).
    sequences : SequenceParallel or None
        What cuts those of the model, where they are: there before check_model.
    settled : dict
        How parts of the model are computed, and why, for the run's record; check_model fills it in.
    """

    Data: ClassVar[type[Data]] = Data
    Loss: ClassVar[type[Loss]] = Loss
    Evaluation: ClassVar[type[Evaluation]] = Evaluation
    Predict: ClassVar[type[Section]] = Section
    code_version: ClassVar[int] = 3
    pads: bool = True
    settled: Mapping[str, str] = {}
    cuts_sequences: ClassVar[bool] = False
    sequences: Any = None

    def __init__(self, config: Config):
        self.config = config

    # -- what is loaded once
    # -------------------------------------------------------------------------------------------------

    @cached_property
    def model_config(self) -> Any:
        """The transformers config of ``model.path``."""
        return load.config(self.config.model)

    @property
    @abstractmethod
    def processor(self) -> Processor:
        """What is exported with the model."""

    @property
    @abstractmethod
    def max_length(self) -> int:
        """Longest sequence. Raises UserError when the configuration asks for more than the model takes."""

    # -- data
    # ----------------------------------------------------------------------------------------------------------------

    @abstractmethod
    def encoder(self, learned: Learned | None) -> Encoder:
        """For the training set (``learned`` is None), or for an evaluation set."""

    @abstractmethod
    def processor_key(self) -> dict:
        """What the encoder's result depends on beside the files and ``data``, as JSON."""

    @abstractmethod
    def collate(self, split: Split, ids: np.ndarray, draw: Draw) -> Batch:
        """The samples as padded tensors; no ids at all gives a dummy batch whose labels are all ignored."""

    def learned(self, split: Split) -> Learned:
        """What the training set taught. Raises UserError when that is too little to train for."""
        return split.data.meta.get("learned", {})

    def learned_of_model(self) -> Learned:
        """The same, as an exported model carries it in its config. UserError when model.path was not trained for this
        task.
        """
        return {}

    def documents(self, split: Split, sample: int) -> list[str]:
        """Where a sample's documents were read (file and line), and which tokens of a document that is not whole."""
        return [split.data.origin(sample)]

    def describe(self, split: Split) -> list[str]:
        """What to know of a training set before it is learned from, a sentence each."""
        return []

    # -- model
    # ---------------------------------------------------------------------------------------------------------------

    @abstractmethod
    def model(self, learned: Learned) -> ModelSpec: ...

    @classmethod
    @abstractmethod
    def fits(cls, model_config: Any) -> bool:
        """Whether a trained model, known by its transformers config alone, is one of this task."""

    def check_model(self, forward: Callable, model: torch.nn.Module, device: torch.device) -> None:
        """Refuse a model that would compute something else than the task says. Raises UserError.

        ``forward`` is the model, or the engine around it: under ZeRO-3 only the engine can be called.
        """

    @abstractmethod
    def objective(self, forward: Callable, model: torch.nn.Module, device: torch.device, learned: Learned) -> Objective:
        """How the loss is taken from this model. Raises UserError when the configuration asks for what it cannot do."""

    # -- results
    # -------------------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def metrics(self) -> tuple[Metric, ...]:
        """What an evaluation measures that has a better and a worse."""

    @abstractmethod
    def new_metrics(self, objective: Objective, learned: Learned) -> Metrics:
        """An empty accumulator."""

    @abstractmethod
    def predictor(self, model: torch.nn.Module, learned: Learned, options: Any) -> Predictor:
        """``options``: of this class's ``Predict``."""

    # -- shared
    # --------------------------------------------------------------------------------------------------------------

    def metric(self, name: str, key: str) -> Metric:
        """The metric of ``SET.METRIC``, which a key names. Raises UserError when no evaluation measures it."""
        known = {f"{s}.{metric.name}": metric for s in self.config.data.eval for metric in self.metrics}
        if name not in known:
            hint = did_you_mean(name, known) if known else "Give an evaluation set in data.eval."
            raise UserError(f"{key}: {name} is not measured.", hint)
        return known[name]

    def preparation_key(self, learned: Learned | None) -> dict:
        """What prepared data depends on beside the files."""
        fixed = {"task": self.config.task, "code": self.code_version, "data": data_key(self.config.data)}
        return {**fixed, "max_length": self.max_length, **self.processor_key(), **self.learned_key(learned)}

    def learned_key(self, learned: Learned | None) -> dict:
        """What an evaluation set's columns depend on of what was learned."""
        return {"learned": learned} if learned else {}

    def train_split(self) -> Split:
        if not self.config.data.train:
            raise UserError("data.train: no training data given.", "For example: data: {train: corpus.jsonl}")
        return self._split("train", self.config.data.train, None, apart=self.config.data.shares is not None)

    def eval_splits(self, learned: Learned) -> dict[str, Split]:
        sets = self.config.data.eval
        return {name: self._split(f"eval-{name}", sources, learned) for name, sources in sets.items()}

    def corpus_split(
        self, name: str, folders: list[Path], learned: Learned | None, only: Sequence[str | None]
    ) -> Split:
        """A set of prepared corpora, of each the source named in ``only``, or all (None). Raises UserError where the
        task does not read them.
        """
        raise UserError(
            f"data set {name!r}: {folders[0]} is a prepared corpus, which task {self.config.task} does not read.",
            "causal_lm and masked_lm do.",
        )

    def _split(self, name, sources, learned: Learned | None, apart: bool = False) -> Split:
        only = [getattr(source, "source", None) for source in sources]
        if folders := corpora_of(name, sources):
            return self.corpus_split(name, folders, learned, only)
        if any(only):
            raise UserError(
                f"data set {name!r}: source: {next(filter(None, only))} is a source in a prepared corpus, and these "
                "are files.",
                "Leave it out.",
            )
        config = self.config
        key = self.preparation_key(learned)
        return open_split(name, sources, self.encoder(learned), key, learned, config.data, config.run, apart)
