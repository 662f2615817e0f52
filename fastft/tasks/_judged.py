"""What metrics kept of each sample, beside what was expected; and scores by class."""

from __future__ import annotations

from typing import Any

import numpy as np

Judged = list[tuple[int, dict[str, Any]]]  # the sample's place in the order of update, and what is known of it


def classified(logits: np.ndarray, labels: np.ndarray, names: list[str]) -> Judged:
    """``gold``, ``label``, ``score`` (the label's probability) and ``gold_score``; where a row has any number of labels
    ``gold``, ``labels`` and ``scores`` of both.

    Parameters
    ----------
    logits : (rows, classes) float
    labels : (rows,) int or (rows, classes) float of 0 and 1
    """
    logits = logits.astype(np.float64)
    if labels.ndim == 2:
        found, wanted, scores = logits > 0, labels > 0.5, 1 / (1 + np.exp(-logits))
        return [(i, _many(found[i], wanted[i], scores[i], names)) for i in range(len(labels))]
    raised = np.exp(logits - logits.max(-1, keepdims=True))
    scores, best = raised / raised.sum(-1, keepdims=True), logits.argmax(-1)
    return [
        (i, {"gold": names[gold], "label": names[label], "score": float(row[label]), "gold_score": float(row[gold])})
        for i, (gold, label, row) in enumerate(zip(labels, best, scores, strict=True))
    ]


def _many(found: np.ndarray, wanted: np.ndarray, scores: np.ndarray, names: list[str]) -> dict[str, Any]:
    shown = {names[c]: float(scores[c]) for c in np.flatnonzero(found | wanted)}
    gold, labels = ([names[c] for c in np.flatnonzero(which)] for which in (wanted, found))
    return {"gold": gold, "labels": labels, "scores": shown}


def class_scores(predicted: np.ndarray, labels: np.ndarray, names: list[str]) -> dict[str, dict[str, float]]:
    """``precision``, ``recall``, ``f1`` and ``support`` (rows that have it) by label.

    ``predicted``, ``labels``: (rows,) int, or (rows, labels) bool where a row has any number of them.
    """
    from sklearn.metrics import precision_recall_fscore_support

    which = None if labels.ndim == 2 else range(len(names))
    found = precision_recall_fscore_support(labels, predicted, labels=which, average=None, zero_division=0)
    return by_class(names, *found)


def f1_scores(labels: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """``f1_macro``, and ``f1_micro`` where a row has any number of labels: those of sklearn with zero_division=0, which
    takes tens of times as long; an interval is drawn from a thousand of them.

    Parameters
    ----------
    labels, predicted : (rows,) int or (rows, classes) bool
    """
    if labels.ndim == 2:
        both, sizes = (labels & predicted).sum(0), labels.sum(0) + predicted.sum(0)
        micro = {"f1_micro": 2.0 * both.sum() / max(int(sizes.sum()), 1)}
        return {name: float(f1) for name, f1 in {**micro, "f1_macro": (2 * both / np.maximum(sizes, 1)).mean()}.items()}
    classes = int(max(labels.max(), predicted.max())) + 1
    counts = [np.bincount(of, minlength=classes) for of in (labels[labels == predicted], labels, predicted)]
    seen = counts[1] + counts[2] > 0  # a class that no row has and none is given does not count
    return {"f1_macro": float((2 * counts[0][seen] / (counts[1] + counts[2])[seen]).mean())}


def by_class(names: list[str], precision, recall, f1, support) -> dict[str, dict[str, float]]:
    columns = zip(*(np.asarray(column).tolist() for column in (precision, recall, f1, support)), strict=True)
    keys = ("precision", "recall", "f1", "support")
    return {name: dict(zip(keys, row, strict=True)) for name, row in zip(names, columns, strict=True)}


def rated(predicted: np.ndarray, values: np.ndarray, names: list[str]) -> Judged:
    """``gold``, ``value`` and ``error`` (their difference): numbers, or by target where there are several; a missing
    value is None.

    ``predicted``, ``values``: (rows, targets) float64, in the targets' own units.
    """

    def shown(row: np.ndarray) -> Any:
        numbers = [None if np.isnan(number) else float(number) for number in row]
        return numbers[0] if len(names) == 1 else dict(zip(names, numbers, strict=True))

    return [
        (i, {"gold": shown(wanted), "value": shown(found), "error": shown(found - wanted)})
        for i, (found, wanted) in enumerate(zip(predicted, values, strict=True))
    ]
