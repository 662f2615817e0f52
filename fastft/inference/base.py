"""What a predictor is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from fastft.errors import UserError

Row = dict[str, Any]
SCORE_DIGITS, DIGITS = 6, 9  # significant ones of a probability, and of any other number
SCORES = ("score", "scores", "gold_score")


class Predictor(ABC):
    """Turns rows into predictions: ``fastft predict`` is a loop over it, and so is whatever else serves a model.

    Attributes
    ----------
    fields : dict of str
        What a row holds (text, text_pair, ...) -> the column of a data file that holds it; None: it has no such field.
    optional : set of str
        Those that a row may lack.
    """

    fields: dict[str, str | None]
    optional: frozenset[str] = frozenset()

    def prepare(self, where: str, row: Row) -> Row:
        """A row, checked: ``fields``' names to values. Raises UserError, naming the row."""
        for name, column in list(self.fields.items())[1:]:  # the first, or another form of it, is what was given
            if column is not None and row.get(name) is None and name not in self.optional:
                wanted = ", ".join(field for field, column in self.fields.items() if column is not None)
                raise UserError(f"{where}: no {name}.", f"This model was trained on rows with {wanted}.")
        for name, value in row.items():
            if isinstance(value, str) and not value.strip() and name not in self.optional:
                raise UserError(f"{where}: the {name} is empty.", "Remove it, or give it some text.")
        return row

    @abstractmethod
    def run(self, rows: list[Row]) -> list[dict]:
        """One record per row, in order, as JSON."""


def kept_beside(columns: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """The record behind columns of its row; one whose name the record has, too, becomes ``input_NAME``."""
    return {**{f"input_{name}" if name in record else name: value for name, value in columns.items()}, **record}


def rounded(value: Any, digits: int = DIGITS) -> Any:
    """A record as people read it: what float32 computed has no 17 digits."""
    if isinstance(value, dict):
        return {name: rounded(item, SCORE_DIGITS if name in SCORES else digits) for name, item in value.items()}
    if isinstance(value, list):
        return [rounded(item, digits) for item in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value
