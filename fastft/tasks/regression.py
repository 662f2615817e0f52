"""Regression: one number or several for a text, or a pair of texts, with encoder or decoder models."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from pydantic import Field

from fastft import rooms
from fastft.config import Config, Data, Section
from fastft.data.encoder import Counts, Example, Learned, RowError, write_sizes
from fastft.data.formats import Record
from fastft.data.split import Split
from fastft.data.store import Store
from fastft.errors import UserError, did_you_mean
from fastft.inference.base import Predictor, Row
from fastft.lazy import torch
from fastft.objectives.base import Objective, OutputsObjective
from fastft.tasks import _judged
from fastft.tasks._sequence import HEADS, SequenceEncoder, SequenceTask
from fastft.tasks.base import Batch, Draw, Metric, ModelSpec, SampleMetrics

MEASURES = (("mse", True), ("mae", True), ("pearson", False), ("spearman", False))  # name, lower is better


class RegressionData(Data):
    """Texts with one number or several."""

    text: str = Field("text", description="Column of the text.")
    text_pair: str | None = Field(None, description="Column of a second text.")
    target: str | None = Field(None, description="Column of the number; default: score.")
    targets: list[str] = Field([], description="Columns of several numbers, instead of target.")
    missing: Literal["error", "drop", "ignore"] = Field(
        "error",
        description="A target that is empty or NaN: drop leaves out the row, ignore takes no loss of that target.",
    )
    normalize: bool = Field(
        True, description="Train on standardized targets (by the training set's mean and standard deviation)."
    )

    def check(self, config: Config) -> None:
        if self.target is not None and self.targets:
            raise ValueError("data.target and data.targets exclude each other: give one")
        if twice := {name for name in self.targets if self.targets.count(name) > 1}:
            raise ValueError(f"data.targets names {', '.join(sorted(twice))} twice")
        if self.truncation == "split":
            raise ValueError(
                "data.truncation: split makes no sense for regression (a number belongs to the whole text): "
                "choose truncate, drop or error"
            )

    @property
    def names(self) -> list[str]:
        """The columns of the targets, in order."""
        return self.targets or [self.target or "score"]


class RegressionOptions(Section):
    """How texts are rated."""

    max_length: int | None = Field(
        None, ge=2, description="Longer texts are cut to so many tokens; default: the run's."
    )


@rooms.TASKS.register("regression")
class Regression(SequenceTask):
    """Prepared columns: ``tokens``, ``segments`` (token types, pairs only), and ``values``: (n, targets) float64 in
    their own units, NaN where ignored. Learned: "targets" (names), their "mean" and "std" (0 and 1: not normalized)."""

    Data = RegressionData
    Predict = RegressionOptions

    def __init__(self, config: Config):
        super().__init__(config)
        self.data: Any = config.data

    def encoder(self, learned: Learned | None) -> TargetEncoder:
        return TargetEncoder(self)

    def learned_key(self, learned: Learned | None) -> dict:
        return {"targets": self.data.names}  # mean and std are applied to batches, not to what is prepared

    def learned(self, split: Split) -> Learned:
        values, names = np.asarray(split.data["values"]), self.data.names
        means, stds = [], []
        for name, column in zip(names, values.T, strict=True):
            used = column[~np.isnan(column)]
            if len(used) == 0 or used.min() == used.max():
                what = f"the value {used[0]:g}" if len(used) else "no value"
                raise UserError(
                    f"data.train: target {name!r} has {what} in all {len(values)} rows.",
                    "There is nothing to learn; set data.target / data.targets to the columns of the numbers.",
                )
            means.append(float(used.mean()) if self.data.normalize else 0.0)
            stds.append(float(used.std()) if self.data.normalize else 1.0)
        return {"targets": names, "mean": means, "std": stds}

    def learned_of_model(self) -> Learned:
        config, names = self.model_config, self.output_names("regression model")
        mean = getattr(config, "target_mean", [0.0] * len(names))
        return {"targets": names, "mean": mean, "std": getattr(config, "target_std", [1.0] * len(names))}

    def model(self, learned: Learned) -> ModelSpec:
        scale = {"target_mean": learned["mean"], "target_std": learned["std"]}  # a value is logit * std + mean
        overrides = self.named_outputs(learned["targets"], problem_type="regression", **scale)
        return ModelSpec(self.auto_class, HEADS, overrides)

    @classmethod
    def fits(cls, model_config: Any) -> bool:
        named = any("ForSequenceClassification" in a for a in model_config.architectures or [])
        return named and model_config.problem_type == "regression"

    def collate(self, split: Split, ids: np.ndarray, draw: Draw) -> Batch:
        inputs, real, padded = self.inputs(split, ids)
        column: Any = split.data["values"]
        values = np.asarray(column[np.asarray(ids, dtype=np.int64)], np.float64)
        if len(ids) == 0:  # a dummy row, all of whose targets are ignored
            values = np.full((1, len(self.data.names)), np.nan)
        return Batch({**inputs}, torch.from_numpy(values), len(ids), real, padded)

    def objective(self, forward: Callable, model: torch.nn.Module, device: torch.device, learned: Learned) -> Objective:
        return OutputsObjective(SquaredError(learned))

    @property
    def metrics(self) -> tuple[Metric, ...]:
        names = self.data.names
        suffixes = ["", *(f"_{name}" for name in names if len(names) > 1)]
        measures = [Metric(name + suffix, lower) for suffix in suffixes for name, lower in MEASURES]
        return (Metric("loss", lower_is_better=True), *measures)

    def new_metrics(self, objective: Objective, learned: Learned) -> RegressionMetrics:
        return RegressionMetrics(learned)

    def predictor(self, model: torch.nn.Module, learned: Learned, options: RegressionOptions) -> Predictor:
        return Rater(self, model, learned, options)


class SquaredError:
    """Mean over the targets of the squared error of standardized values, summed over rows; NaN targets are left out."""

    def __init__(self, learned: Learned):
        self.mean, self.std = (torch.tensor(learned[name], dtype=torch.float64) for name in ("mean", "std"))

    def __call__(self, outputs: Any, batch: Batch, scale: torch.Tensor) -> torch.Tensor:
        return self.rows(outputs, batch).sum() * scale

    def rows(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """(rows,) float32"""
        logits, values = outputs.logits.float(), batch.labels  # (rows, targets); float64: large values differ by little
        wanted = ((values - self.mean.to(values.device)) / self.std.to(values.device)).float()
        errors = (logits - wanted.nan_to_num()).square() * ~values.isnan()
        return errors.sum(1) / values.shape[1]


class TargetEncoder(SequenceEncoder):
    """Texts to tokens, targets to numbers."""

    def __init__(self, task: Regression):
        self.names, self.missing = task.data.names, task.data.missing
        super().__init__(task, task.data.text, task.data.text_pair, self.names)

    def accepts(self, where: str, record: Record) -> bool:
        if absent := [name for name in self.names if name not in record]:
            hint = f"{did_you_mean(absent[0], record)} Set data.target / data.targets to the columns of the numbers."
            raise RowError(f"{where}: no column {absent[0]!r}.", hint)
        return super().accepts(where, record)

    def encode(self, rows: list[tuple[str, Record]], counts: Counts) -> list[Example]:
        kept = []
        for where, record in rows:
            values = [self._number(where, name, record[name]) for name in self.names]
            empty = [name for name, value in zip(self.names, values, strict=True) if math.isnan(value)]
            if empty and self.missing == "error":
                raise RowError(
                    f"{where}: target {empty[0]!r} is empty.",
                    "Fix the row, or set data.missing: drop (the row) or ignore (that target).",
                )
            if len(empty) == len(values) or (empty and self.missing == "drop"):
                counts.dropped += 1
                continue
            counts.add("targets_ignored", len(empty))
            kept.append((where, record))
        return super().encode(kept, counts) if kept else []

    def extra(self, where: str, record: Record) -> list[float]:
        return [self._number(where, name, record[name]) for name in self.names]

    def _number(self, where: str, name: str, value: Any) -> float:
        """NaN for what is missing. Raises RowError, naming the row."""
        if value is None or (isinstance(value, str) and not value.strip()):
            return math.nan
        try:
            number = math.inf if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.inf
        if math.isinf(number):
            raise RowError(f"{where}: target {name!r} is no number: {value!r}.", "Write it like 3.5; fix the row.")
        return number

    def finish(self, store: Store, learned: Learned | None) -> dict:
        lengths = store.ragged("tokens").lengths()
        values = np.array([found for _, found in store.extras], np.float64).reshape(len(lengths), len(self.names))
        store.write("values", values)
        return {"totals": write_sizes(store, lengths, (~np.isnan(values)).mean(1))}


class RegressionMetrics(SampleMetrics):
    """Squared and absolute error in the targets' own units, Pearson's and Spearman's correlation: per target, and their
    mean. NaN where it is not defined (all predictions are equal)."""

    def __init__(self, learned: Learned):
        self.names, self.squared_error = learned["targets"], SquaredError(learned)
        self.mean, self.std = (np.array(learned[name]) for name in ("mean", "std"))
        self.losses: list[np.ndarray] = []
        self.predicted: list[np.ndarray] = []
        self.values: list[np.ndarray] = []

    def update(self, model: Callable, batch: Batch) -> None:
        outputs = model(**batch.inputs)
        if batch.tokens == 0:
            return
        self.losses.append(self.squared_error.rows(outputs, batch).double().cpu().numpy())
        self.predicted.append(outputs.logits.double().cpu().numpy() * self.std + self.mean)
        self.values.append(batch.labels.double().cpu().numpy())

    def columns(self) -> dict[str, np.ndarray]:
        if not self.values:
            return {}
        found = {"loss": self.losses, "predicted": self.predicted, "values": self.values}
        return {name: np.concatenate(parts) for name, parts in found.items()}

    def numbers(self, columns: dict[str, np.ndarray]) -> dict[str, float]:
        predicted, values = columns["predicted"], columns["values"]
        used = ~np.isnan(values)
        each = [_measures(p[mask], v[mask]) for p, v, mask in zip(predicted.T, values.T, used.T, strict=True)]
        result: dict[str, float] = {"loss": float(columns["loss"].sum() / used.mean(1).sum()), "examples": len(values)}
        result |= {name: float(np.mean([found[name] for found in each])) for name, _ in MEASURES}
        if len(each) > 1:
            for target, found in zip(self.names, each, strict=True):
                result |= {f"{name}_{target}": value for name, value in found.items()}
        return result

    def judged(self, learned: Learned) -> _judged.Judged:
        return _judged.rated(np.concatenate(self.predicted), np.concatenate(self.values), self.names)

    def error_of(self, judged: dict[str, Any]) -> float:
        """The largest of its targets."""
        errors = judged["error"].values() if isinstance(judged["error"], dict) else [judged["error"]]
        return max((abs(error) for error in errors if error is not None), default=0.0)


class Rater(Predictor):
    """``value``, or ``values`` (name -> value) where there are several, in the units of the training data;
    ``truncated`` when the text was cut."""

    def __init__(self, task: Regression, model: torch.nn.Module, learned: Learned, options: RegressionOptions):
        self.model: Any = model
        self.task, self.learned = task, learned
        self.limit = min(options.max_length or task.max_length, task.max_length)
        self.fields = {"text": task.data.text, "text_pair": task.data.text_pair}

    def run(self, rows: list[Row]) -> list[dict]:
        texts = [row["text"] for row in rows]
        inputs, lengths = self.task.encode_texts(texts, [row.get("text_pair") for row in rows], self.limit)
        logits = self.model(**{k: v.to(self.model.device) for k, v in inputs.items()}).logits.double().cpu().numpy()
        values = logits * np.array(self.learned["std"]) + np.array(self.learned["mean"])
        names, records = self.learned["targets"], []
        for text, length, row in zip(texts, lengths, values.tolist(), strict=True):
            found = {"value": row[0]} if len(names) == 1 else {"values": dict(zip(names, row, strict=True))}
            records.append({"text": text, **found, **({"truncated": True} if length > self.limit else {})})
        return records


def _measures(predicted: np.ndarray, values: np.ndarray) -> dict[str, float]:
    """Of one target; NaN for all without a value."""
    if len(values) == 0:
        return {name: math.nan for name, _ in MEASURES}
    errors = predicted - values
    return {
        "mse": float(np.square(errors).mean()),
        "mae": float(np.abs(errors).mean()),
        "pearson": _correlation(predicted, values),
        "spearman": _correlation(_ranks(predicted), _ranks(values)),
    }


def _ranks(values: np.ndarray) -> np.ndarray:
    """From 1, equal values at the mean of theirs."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which]


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's; NaN where one of the two is constant."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    a, b = a - a.mean(), b - b.mean()
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))
