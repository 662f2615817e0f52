"""What a task is, and what all tasks share: reading and counting rows, the overlength policy, preparing splits."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from fastft.config import Config, Source
from fastft.data import formats
from fastft.data.prepared import Prepared, prepare
from fastft.data.sources import holds
from fastft.errors import UserError, did_you_mean
from fastft.files import digest
from fastft.models import load
from fastft.registry import Registry

TOKENIZE_ROWS = 1000  # rows handed to the tokenizer at a time: enough for its threads, small enough for memory


@dataclass
class Counts:
    """What became of the input; nothing is dropped or cut without standing here."""

    rows: int = 0
    empty: int = 0
    truncated: int = 0
    dropped: int = 0
    split: int = 0
    overlong: list[str] = field(default_factory=list)  # where the first few stand
    overlong_total: int = 0
    longest: int = 0

    def overlength(self, where: str, length: int) -> None:
        self.overlong_total += 1
        self.longest = max(self.longest, length)
        if len(self.overlong) < 3:
            self.overlong.append(f"{where} ({length} tokens)")


class Split:
    """A prepared set: what the loop needs to know of every sequence, without touching its tokens.

    Attributes
    ----------
    lengths : (n,) int64, memory-mapped
        Tokens of each sequence before padding.
    targets : (n,) float64, memory-mapped
        What each sequence contributes to the loss's denominator (target tokens, or 1 per classified text).
    totals : dict
        ``tokens`` and ``targets``, summed, and ``longest``; see ``write_sizes``.
    """

    def __init__(self, name: str, data: Prepared):
        self.name, self.data = name, data
        self.lengths, self.targets, self.totals = data["lengths"], data["targets"], data.meta["totals"]

    def __len__(self) -> int:
        return len(self.lengths)


@dataclass
class Batch:
    """One rank's part of one micro-step."""

    inputs: dict[str, torch.Tensor | bool]
    labels: torch.Tensor
    samples: int
    tokens: int  # real tokens
    padded: int  # tokens computed

    def to(self, device: torch.device) -> "Batch":
        if device.type == "cpu":
            return self
        inputs = {
            k: v.pin_memory().to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in self.inputs.items()
        }
        return Batch(
            inputs, self.labels.pin_memory().to(device, non_blocking=True), self.samples, self.tokens, self.padded
        )


class Task(ABC):
    """One fine-tuning task, bound to a configuration.

    Class attributes: ``auto_class`` (transformers Auto class), ``new_parameters`` (name parts of weights that may be drawn anew),
    ``code_version`` (raise it when the same input gives other samples), ``metric_names`` (what ``new_metrics`` measures that has a better and a worse).
    """

    auto_class: str
    new_parameters: tuple[str, ...] = ()
    code_version = 3
    metric_names: tuple[str, ...]

    def __init__(self, config: Config):
        self.config = config
        self.model_config = load.config(config.model)
        self.tokenizer = load.tokenizer(config.model)
        self.max_length = self._max_length()

    # -- what each task says ------------------------------------------------------------------------------------------------

    @abstractmethod
    def build(self, folder: Path, sources: list[Source], training: bool) -> dict:
        """Write the columns of a split into folder, those of ``write_sizes`` among them; return its meta, with ``counts`` and ``totals``.

        Raises UserError on bad rows.
        """

    @abstractmethod
    def collate(self, split: Split, ids: np.ndarray) -> Batch:
        """The sequences as padded tensors; no ids at all gives a dummy batch whose labels are all ignored."""

    @abstractmethod
    def documents(self, split: Split, sample: int) -> list[str]:
        """Where the documents of a sample were read (file and line), and which tokens of a document that is not whole."""

    @abstractmethod
    def loss(self, outputs, batch: Batch, scale: torch.Tensor) -> torch.Tensor:
        """Sum of the batch's losses times scale (0-dim float32 on the outputs' device): a scalar to call backward on."""

    @abstractmethod
    def new_metrics(self) -> "Metrics":
        """An empty accumulator."""

    def attach(self, model: torch.nn.Module, device: torch.device) -> dict:
        """Settle how the loss is taken from this model, before there is an engine around it; what was settled, for the run's record.

        Raises UserError when the configuration asks for what this model cannot do.
        """
        return {}

    def forward_loss(self, model, batch: Batch, scale: torch.Tensor) -> torch.Tensor:
        """``loss`` of the model's (or the engine's) outputs for this batch; a task that needs no outputs may take a shorter way."""
        return self.loss(model(**batch.inputs), batch, scale)

    def forward_metrics(self, model, batch: Batch, metrics: "Metrics") -> None:
        """Add this batch to an accumulator."""
        metrics.update(model(**batch.inputs), batch)

    def model_overrides(self) -> dict:
        """Config attributes for the model to be built (num_labels ...)."""
        return {}

    def state(self) -> dict:
        """What the task learnt from the training data, as JSON; stands in every checkpoint."""
        return {}

    def load_state(self, state: dict) -> None:
        """Take over ``state`` of a run, instead of its training data."""

    def state_of_model(self) -> dict:
        """``state`` as an exported model carries it in its config. UserError when model.path was never trained for this task."""
        return {}

    def check_model(self, model: torch.nn.Module, device: torch.device) -> None:
        """Refuse a model that would compute something else than the task says. Raises UserError."""

    def check_best_by(self) -> None:
        """Refuse a checkpoint.best_by that no evaluation will measure, before anything is trained for it."""
        wanted = self.config.checkpoint.best_by
        known = [f"{name}.{metric}" for name in self.config.data.eval for metric in self.metric_names]
        if wanted is not None and wanted not in known:
            raise UserError(
                f"checkpoint.best_by: {wanted} is not measured.",
                f"{did_you_mean(wanted, known)} Known: {', '.join(known)}."
                if known
                else "Give an evaluation set in data.eval.",
            )

    def train_split(self) -> Split:
        if not self.config.data.train:
            raise UserError("data.train: no training data given.", "For example: data: {train: corpus.jsonl}")
        return self.split("train", self.config.data.train, training=True)

    def eval_splits(self) -> dict[str, Split]:
        return {
            name: self.split(f"eval-{name}", sources, training=False) for name, sources in self.config.data.eval.items()
        }

    # -- shared -------------------------------------------------------------------------------------------------------------

    def split(self, name: str, sources: list[Source], training: bool) -> Split:
        """Prepare (or reopen) a split; empty ones are errors."""
        if "/" in name or "\\" in name:
            raise UserError(
                f"data.eval: {name.removeprefix('eval-')!r} is no name for a set: it becomes a folder's name.",
                "Use a name without slashes.",
            )
        run_dir = Path(self.config.run.dir)
        cache = Path(self.config.data.cache or run_dir / "prepared")
        for folder in (path for source in sources if (path := Path(source.path)).is_dir()):
            own = {"run.dir": run_dir, **({"data.cache": cache} if formats.hf.is_saved_dataset(folder) else {})}
            if inside := [key for key, path in own.items() if holds(folder, path)]:
                raise UserError(
                    f"data set {name!r}: the folder {folder} holds {inside[0]} ({own[inside[0]]}): the run would read what it writes.",
                    f"Put {inside[0]} elsewhere, or name the files to read one by one.",
                )
        files = _files(sources)
        read_as = [formats.format_of(Path(f)) for f in files]  # a name decides it, where a source says nothing
        settings = digest([self.preparation_key(training), [s.model_dump(exclude={"path"}) for s in sources], read_as])

        def build(folder: Path) -> dict:
            meta = self.build(folder, sources, training)
            if came := set(_files(sources)) ^ set(files):
                raise UserError(
                    f"{min(came)}: came or went while the data was read.",
                    "Run again when nothing writes to it any more.",
                )
            return meta

        split = Split(name, prepare(cache / name, settings, files, build))
        if not split.totals["targets"]:
            counts = split.data.meta["counts"]
            raise UserError(
                f"data set {name!r} is empty: {counts['rows']} rows read from {', '.join(files[:3])}, nothing left to learn from.",
                f"Counts: {counts}.",
            )
        return split

    def preparation_key(self, training: bool) -> dict:
        """What prepared data depends on beside the files."""
        tok = self.tokenizer
        vocabulary = tok.backend_tokenizer.to_str() if tok.is_fast else repr(sorted(tok.get_vocab().items()))
        data = self.config.data.model_dump(exclude={"train", "eval", "cache", "seed", "max_length"})
        return {
            "task": self.config.task,
            "code": self.code_version,
            "data": data,
            "max_length": self.max_length,
            "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
            "special": {k: str(v) for k, v in tok.special_tokens_map.items()},
        }

    def read(
        self, sources: list[Source], columns: list[str], counts: Counts, texts: list[str] | None = None
    ) -> Iterator[tuple[str, dict]]:
        """Rows with their columns checked; rows without any text in the first are counted and passed over. texts: columns of text (the first)."""
        for source in sources:
            for where, record in formats.read(source):
                counts.rows += 1
                for column in columns:
                    if column not in record:
                        raise UserError(
                            f"{where}: no column {column!r}.",
                            f"{did_you_mean(column, record)} Set data.text / data.label to the columns of your data.",
                        )
                for column in texts or columns[:1]:
                    _check_text(where, column, record[column])
                if not record[columns[0]].strip():
                    counts.empty += 1
                    continue
                yield where, record

    def chunks(self, rows: Iterator) -> Iterator[list]:
        """Rows in lists of TOKENIZE_ROWS."""
        while chunk := list(islice(rows, TOKENIZE_ROWS)):
            yield chunk

    def settle_overlength(self, counts: Counts) -> None:
        """With policy 'error': raise once everything is read, so that the message can count."""
        if self.config.data.overlength == "error" and counts.overlong_total:
            raise UserError(
                f"{counts.overlong_total} of {counts.rows} texts are longer than max_length = {self.max_length} tokens "
                f"(longest: {counts.longest}), first: {'; '.join(counts.overlong)}.",
                f"Choose data.overlength: {', '.join(self.overlength_choices())}, or raise data.max_length"
                f" (the model's limit is {load.length_limit(self.model_config) or 'not set'}).",
            )

    def overlength_choices(self) -> list[str]:
        return ["truncate", "drop"]

    def _max_length(self) -> int:
        limit, wanted = load.length_limit(self.model_config), self.config.data.max_length
        if wanted is None:
            return min(limit or 1024, 1024)
        if limit is not None and wanted > limit:
            raise UserError(
                f"data.max_length = {wanted} is beyond the model's limit of {limit} positions.",
                f"Set data.max_length to at most {limit}.",
            )
        return wanted


class Metrics(ABC):
    """Sums over batches on one rank; ``finish`` turns every rank's state into numbers."""

    @abstractmethod
    def update(self, outputs, batch: Batch) -> None: ...

    @abstractmethod
    def state(self) -> object:
        """Anything that pickles."""

    @staticmethod
    @abstractmethod
    def finish(states: list) -> dict[str, float]: ...


def _check_text(where: str, column: str, value: object) -> None:
    if not isinstance(value, str):
        raise UserError(
            f"{where}: column {column!r} holds {type(value).__name__}, not text: {value!r}.", "Mend or remove the row."
        )
    try:
        value.encode()
    except UnicodeEncodeError as e:
        raise UserError(
            f"{where}: column {column!r} holds half a character ({e.object[e.start]!r} at position {e.start}).",
            "Mend the row.",
        ) from None


def _files(sources: list[Source]) -> list[str]:
    return [str(file) for source in sources for file in formats.files_of(source)]


def counts_dict(counts: Counts) -> dict:
    return asdict(counts)


def write_sizes(folder: Path, lengths: np.ndarray, targets: np.ndarray) -> dict:
    """Columns ``lengths`` and ``targets`` (see Split), and their totals: a resume reads neither, and there may be 10^9."""
    np.save(folder / "lengths.npy", lengths.astype(np.int64))
    np.save(folder / "targets.npy", targets.astype(np.float64))
    return {"tokens": int(lengths.sum()), "targets": targets.sum().item(), "longest": int(lengths.max(initial=0))}


TASKS: Registry[type[Task]] = Registry("task")
