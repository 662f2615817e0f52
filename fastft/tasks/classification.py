"""Text classification, single- or multi-label, one text or a pair, with encoder or decoder models."""

from __future__ import annotations

import difflib
import logging
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from fastft import rooms
from fastft.config import Config, Data, InputPath, Loss, Section
from fastft.data.encoder import Learned, RowError, write_sizes
from fastft.data.formats import Record
from fastft.data.formats.base import Unreadable, open_text
from fastft.data.split import Split
from fastft.data.store import Store
from fastft.errors import UserError, did_you_mean
from fastft.inference.base import Predictor, Row
from fastft.lazy import torch
from fastft.objectives.base import Objective, OutputsObjective
from fastft.tasks import _judged
from fastft.tasks._sequence import HEADS, SequenceEncoder, SequenceTask
from fastft.tasks.base import IGNORE, Batch, Draw, Metric, ModelSpec, SampleMetrics


class ClassificationData(Data):
    """Texts with one label or several."""

    text: str = Field("text", description="Column of the text.")
    text_pair: str | None = Field(None, description="Column of a second text.")
    label: str = Field("label", description="Column of the label(s).")
    multi_label: bool = Field(False, description="Any number of labels per row.")
    label_separator: str = Field(",", min_length=1, description="multi_label: what separates labels in a string cell.")
    labels: InputPath | None = Field(
        None, description="File with one label name per line; data may then hold names or 0-based indices."
    )

    def check(self, config: Config) -> None:
        if self.truncation == "split":
            raise ValueError(
                "data.truncation: split makes no sense for classification (a label belongs to the whole text): "
                "choose truncate, drop or error"
            )


class ClassificationLoss(Loss):
    """Cross-entropy over the labels, or one binary cross-entropy for each when there are several."""

    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Share of the target spread over all classes.")
    z_loss: float = Field(0.0, ge=0, description="Weight of logsumexp^2 (keeps logits small).")

    def check(self, config: Config) -> None:
        if getattr(config.data, "multi_label", False) and (self.label_smoothing or self.z_loss):
            raise ValueError(
                "loss.label_smoothing and loss.z_loss belong to a softmax; with data.multi_label every label has a "
                "loss of its own: remove them"
            )


class ClassificationOptions(Section):
    """How texts are classified."""

    max_length: int | None = Field(
        None, ge=2, description="Longer texts are cut to so many tokens; default: the run's."
    )


log = logging.getLogger(__name__)


@rooms.TASKS.register("classification")
class Classification(SequenceTask):
    """Prepared columns: ``tokens``, ``segments`` (token types, pairs only), and ``labels``: (n,) int64 class indices,
    or (n, classes) float32 of 0 and 1 when multi_label. The meta's "labels" holds the names, in index order.
    """

    Data = ClassificationData
    Loss = ClassificationLoss
    Predict = ClassificationOptions

    def encoder(self, learned: Learned | None) -> LabelEncoder:
        return LabelEncoder(self, self.names_in_file() if learned is None else learned["labels"])

    def names_in_file(self) -> list[str] | None:
        """The label names of ``data.labels``."""
        if self.config.data.labels is None:
            return None
        path = Path(self.config.data.labels)
        if not path.is_file():
            raise UserError(f"data.labels: no such file: {path}.", "One label name per line.")
        try:
            with open_text(path) as f:
                names = [line.strip() for line in f if line.strip()]
        except (OSError, EOFError, UnicodeDecodeError) as e:
            raise UserError(f"data.labels: {path}: {e}", "It must be UTF-8 text, one label name per line.") from None
        if not names:
            raise UserError(f"data.labels: {path} is empty.", "One label name per line.")
        if twice := {n for n in names if names.count(n) > 1}:
            raise UserError(f"data.labels: {path} names {', '.join(sorted(twice))} twice.")
        return names

    def learned_key(self, learned: Learned | None) -> dict:
        return {"labels": self.names_in_file() if learned is None else learned["labels"]}

    def learned(self, split: Split) -> Learned:
        names = split.data.meta["labels"]
        if not names:
            raise UserError(
                f"data.train: no row of {len(split)} has a label.", "Set data.label to the column of the labels."
            )
        if len(names) < 2 and not self.config.data.multi_label:
            raise UserError(
                f"data.train: all {len(split)} rows have the same label {names[0]!r}.",
                "Classification needs at least two.",
            )
        for advice in doubtful(names, self.counts(split)):
            log.warning("data.train: %s", advice)
        return {"labels": names}

    def counts(self, split: Split) -> list[int]:
        """Rows of each class."""
        labels = np.asarray(split.data["labels"])
        many = labels.sum(0) if labels.ndim == 2 else np.bincount(labels, minlength=len(split.data.meta["labels"]))
        return many.astype(int).tolist()

    def describe(self, split: Split) -> list[str]:
        pairs = sorted(zip(self.counts(split), split.data.meta["labels"], strict=True))
        rarest = ", ".join(f"{name} ({n:,} row{'s' * (n != 1)})" for n, name in pairs[:3])
        return [f"{len(pairs):,} classes, rarest: {rarest}; most common: {pairs[-1][1]} ({pairs[-1][0]:,})"]

    def learned_of_model(self) -> Learned:
        return {"labels": self.output_names("classifier")}

    def model(self, learned: Learned) -> ModelSpec:
        kind = "multi_label_classification" if self.config.data.multi_label else "single_label_classification"
        return ModelSpec(self.auto_class, HEADS, self.named_outputs(learned["labels"], problem_type=kind))

    @classmethod
    def fits(cls, model_config: Any) -> bool:
        named = any("ForSequenceClassification" in a for a in model_config.architectures or [])
        return named and model_config.problem_type != "regression"

    def collate(self, split: Split, ids: np.ndarray, draw: Draw) -> Batch:
        inputs, real, padded = self.inputs(split, ids)
        labels = torch.from_numpy(np.asarray(split.data["labels"][np.asarray(ids, dtype=np.int64)]))
        if len(ids) == 0:  # a dummy row: ignored class, or NaN-free zeros that the loss weighs with 0
            labels = torch.full((1,), IGNORE) if labels.dim() == 1 else torch.full((1, labels.shape[1]), float("nan"))
        return Batch(inputs, labels, len(ids), real, padded)

    def loss(self, outputs: Any, batch: Batch, scale: torch.Tensor) -> torch.Tensor:
        """Of the model's outputs: cross-entropy, or the mean over labels of binary cross-entropy; summed over rows."""
        from fastft.ops import cross_entropy

        settings = self.config.loss
        if batch.labels.dim() == 1:
            return cross_entropy(
                outputs.logits,
                batch.labels,
                ignore_index=IGNORE,
                reduction="sum",
                token_weight=scale,
                label_smoothing=settings.label_smoothing,
                z_loss=settings.z_loss,
            )
        return self.row_losses(outputs, batch).sum() * scale

    def row_losses(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """(rows,) float32: the same of each row, without what the section ``loss`` adds in training."""
        from fastft.ops import cross_entropy

        if batch.labels.dim() == 1:
            return cross_entropy(outputs.logits, batch.labels, ignore_index=IGNORE, reduction="none")
        used = ~batch.labels.isnan()
        losses = torch.nn.functional.binary_cross_entropy_with_logits(
            outputs.logits.float(), batch.labels.nan_to_num(), reduction="none"
        )
        return (losses * used).sum(1) / batch.labels.shape[1]

    def objective(self, forward: Callable, model: torch.nn.Module, device: torch.device, learned: Learned) -> Objective:
        return OutputsObjective(self.loss)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        names = ("accuracy", "f1_macro", *(["f1_micro"] if self.config.data.multi_label else []))
        return (Metric("loss", lower_is_better=True), *map(Metric, names))

    def new_metrics(self, objective: Objective, learned: Learned) -> ClassificationMetrics:
        return ClassificationMetrics(self)

    def predictor(self, model: torch.nn.Module, learned: Learned, options: ClassificationOptions) -> Predictor:
        return Classifier(self, model, learned, options)


class LabelEncoder(SequenceEncoder):
    """Texts to tokens, labels to indices.

    Parameters
    ----------
    names : list of str or None
        The labels, where they are known before the data is read.
    """

    def __init__(self, task: Classification, names: list[str] | None):
        data = task.config.data
        super().__init__(task, data.text, data.text_pair, [data.label])
        self.data, self.names = data, names

    def extra(self, where: str, record: Record) -> list[str]:
        """The label names of a row: one, or any number when multi_label."""
        value, data = record[self.data.label], self.data
        nothing = isinstance(value, str) and not value.strip() and not data.multi_label
        if value is None or value != value or nothing:  # NaN
            raise RowError(f"{where}: the label is empty.", "Every row needs a label; remove the row or fix it.")
        if isinstance(value, Unreadable):
            raise RowError(f"{where}: the label cannot be read: {value.reason}.", "Fix or remove the row.")
        if not data.multi_label:
            if isinstance(value, (list, dict)):
                raise RowError(
                    f"{where}: the label is a {type(value).__name__}.",
                    "Set data.multi_label: true for several labels per row.",
                )
            return [_name(value)]
        if isinstance(value, str):
            value = [part.strip() for part in value.split(data.label_separator) if part.strip()]
        labels = value if isinstance(value, list) else [value]
        if wrong := [
            v for v in labels if v is None or v != v or isinstance(v, (list, dict, Unreadable)) or not str(v).strip()
        ]:
            raise RowError(
                f"{where}: {wrong[0]!r} among the labels is no label.",
                "A label is a string or a number; fix or remove the row.",
            )
        return [_name(v) for v in labels]

    def finish(self, store: Store, learned: Learned | None) -> dict:
        lengths = store.ragged("tokens").lengths()
        names = self.names if self.names is not None else _label_names(store.extras)
        store.write("labels", self._indices(store.extras, names))
        return {"totals": write_sizes(store, lengths, np.ones(len(lengths), np.int64)), "labels": names}

    def _indices(self, found: list[tuple[str, list[str]]], names: list[str]) -> np.ndarray:
        index = {name: i for i, name in enumerate(names)}
        from_file, many = self.data.labels is not None, self.data.multi_label
        # A file of names: rows may hold 0-based indices into it, unless a name is a number itself and 1 could mean
        # either. LABEL_i: as transformers calls the classes of a model that names none.
        nameless = all(name == f"LABEL_{i}" for i, name in enumerate(names))
        if nameless or (from_file and not any(map(_is_number, names))):
            index = {**{str(i): i for i in range(len(names))}, **index}
        unknown = [(where, label) for where, labels in found for label in labels if label not in index]
        if unknown:
            (where, label), rows = unknown[0], len({where for where, _ in unknown})
            origin = "the labels file" if from_file else "the training data"
            more = f"; {rows - 1:,} more rows have such labels" if rows > 1 else ""
            raise UserError(
                f"{where}: label {label!r} does not occur in {origin} ({len(names)} labels){more}.",
                did_you_mean(label, names),
            )
        out = np.zeros((len(found), len(names)) if many else len(found), dtype=np.float32 if many else np.int64)
        for row, (_, labels) in enumerate(found):
            for label in labels:
                if many:
                    out[row, index[label]] = 1
                else:
                    out[row] = index[label]
        return out


class ClassificationMetrics(SampleMetrics):
    """Accuracy and macro F1; for multi-label: micro and macro F1, and the share of rows with every label right."""

    def __init__(self, task: Classification):
        self.task = task
        self.losses: list[np.ndarray] = []
        self.logits: list[np.ndarray] = []
        self.labels: list[np.ndarray] = []

    def update(self, model: Callable, batch: Batch) -> None:
        outputs = model(**batch.inputs)
        if batch.tokens == 0:
            return
        self.losses.append(self.task.row_losses(outputs, batch).double().cpu().numpy())
        self.logits.append(outputs.logits.float().cpu().numpy())
        self.labels.append(batch.labels.cpu().numpy())

    def columns(self) -> dict[str, np.ndarray]:
        if not self.labels:
            return {}
        labels, logits = np.concatenate(self.labels), np.concatenate(self.logits)
        found = {"loss": np.concatenate(self.losses)}
        if labels.ndim == 1:
            return {**found, "labels": labels, "predicted": logits.argmax(-1)}
        return {**found, "labels": labels > 0.5, "predicted": logits > 0}  # probability above one half

    def numbers(self, columns: dict[str, np.ndarray]) -> dict[str, float]:
        labels, predicted = columns["labels"], columns["predicted"]
        right = (predicted == labels).reshape(len(labels), -1).all(-1)
        whole = {"loss": float(columns["loss"].mean()), "examples": len(labels), "accuracy": float(right.mean())}
        return {**whole, **_judged.f1_scores(labels, predicted)}

    def judged(self, learned: Learned) -> _judged.Judged:
        return _judged.classified(np.concatenate(self.logits), np.concatenate(self.labels), learned["labels"])

    def error_of(self, judged: dict[str, Any]) -> float:
        """One less the label's probability; of several labels the number that are wrong, then how far off they are."""
        if "gold_score" in judged:
            return 1 - judged["gold_score"]
        gold, scores = set(judged["gold"]), judged["scores"]
        off = sum(abs((name in gold) - score) for name, score in scores.items())
        return len(gold ^ set(judged["labels"])) + off / (1 + len(scores))

    def by_class(self, states: list, learned: Learned) -> dict[str, dict[str, float]]:
        columns = self.joined(states)
        return _judged.class_scores(columns["predicted"], columns["labels"], learned["labels"])


class Classifier(Predictor):
    """``label`` and ``scores`` (label -> probability), or ``labels`` where a text has any number of them; ``truncated``
    when the text was cut."""

    def __init__(self, task: Classification, model: torch.nn.Module, learned: Learned, options: ClassificationOptions):
        self.task, self.names = task, learned["labels"]
        self.model: Any = model
        self.limit = min(options.max_length or task.max_length, task.max_length)
        self.fields = {"text": task.config.data.text, "text_pair": task.config.data.text_pair}

    def run(self, rows: list[Row]) -> list[dict]:
        texts = [row["text"] for row in rows]
        inputs, lengths = self.task.encode_texts(texts, [row.get("text_pair") for row in rows], self.limit)
        logits = self.model(**{k: v.to(self.model.device) for k, v in inputs.items()}).logits.float()
        many = self.model.config.problem_type == "multi_label_classification"
        probabilities = (logits.sigmoid() if many else logits.softmax(-1)).cpu()
        records = []
        for text, length, row in zip(texts, lengths, probabilities.tolist(), strict=True):
            scores = {self.names[i]: p for i, p in sorted(enumerate(row), key=lambda pair: -pair[1])}
            found = {"labels": [n for n, p in scores.items() if p > 0.5]} if many else {"label": next(iter(scores))}
            cut = {"truncated": True} if length > self.limit else {}
            records.append({"text": text, **found, "scores": scores, **cut})
        return records


def doubtful(names: list[str], counts: list[int]) -> list[str]:
    """What looks like a mistake in a training set's labels, a sentence each: names that differ by case alone, a rare
    one that is nearly another's, numbers that measure something.
    """
    found = []
    by_fold: dict[str, list[str]] = {}
    for name in names:
        by_fold.setdefault(_plain(name), []).append(name)
    for same in filter(lambda same: len(same) > 1, by_fold.values()):
        found.append(f"labels {' and '.join(map(repr, same))} are the same but for case or signs that are not seen")
    rows = dict(zip(names, counts, strict=True))
    common = [name for name in names if rows[name] > 2]
    for name in [name for name in names if 0 < rows[name] <= 2][:20]:
        near = difflib.get_close_matches(name, common, n=1, cutoff=0.8)
        if near and not (_is_number(name) or _is_number(near[0])):
            of = f"{rows[name]} of {sum(counts):,} rows"
            found.append(f"label {name!r} ({of}) is nearly {near[0]!r} ({rows[near[0]]:,})")
    numbers = [name for name in names if re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", name)]
    if len(names) > 10 and len(numbers) == len(names) and sum("." in name for name in names) > len(names) / 2:
        found.append(f"the {len(names)} labels are decimal numbers: for measurements there is task: regression")
    return found


def _plain(name: str) -> str:
    """What a reader sees of a name: compatible characters are one, format characters and case are none."""
    seen = "".join(c for c in unicodedata.normalize("NFKC", name) if unicodedata.category(c) != "Cf")
    return " ".join(seen.casefold().split())


def _name(value: object) -> str:
    """Labels are strings, without blanks around them; whole numbers lose a trailing .0 (Parquet and JSON write 3.0 for
    3).
    """
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def _label_names(found: list[tuple[str, list[str]]]) -> list[str]:
    """All labels, sorted; numerically when all are whole numbers, so that index and name agree."""
    names = {label for _, labels in found for label in labels}
    return sorted(names, key=lambda name: (int(name), name)) if all(map(_is_number, names)) else sorted(names)


def _is_number(name: str) -> bool:
    return re.fullmatch("-?[0-9]{1,18}", name) is not None
