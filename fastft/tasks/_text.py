"""What tasks over text share: the tokenizer, the length limit, the truncation policy, padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from functools import cached_property
from typing import Any

import numpy as np

from fastft.corpus.tokens import tokenizer_key
from fastft.data.encoder import Counts, Encoder, RowError, check_text
from fastft.data.formats import Record
from fastft.data.prepared import Ragged
from fastft.errors import UserError, did_you_mean
from fastft.lazy import torch
from fastft.models import load
from fastft.tasks._ids import Ids
from fastft.tasks.base import Task


class TextTask(Task):
    """A task whose processor is a tokenizer."""

    @cached_property
    def tokenizer(self) -> Any:
        return load.tokenizer(self.config.model)

    @property
    def processor(self) -> Any:
        return self.tokenizer

    @cached_property
    def max_length(self) -> int:
        limit, wanted = load.length_limit(self.model_config), self.config.data.max_length
        if wanted is None:
            return min(limit or 1024, 1024)
        if limit is not None and wanted > limit:
            raise UserError(
                f"data.max_length = {wanted} is beyond the model's limit of {limit} positions.",
                f"Set data.max_length to at most {limit}.",
            )
        return wanted

    @property
    def room(self) -> int:
        """Tokens of a document that a sequence takes."""
        return self.max_length

    def width(self, rows: Sequence[Sized]) -> int:
        """Tokens that rows are padded to."""
        multiple = self.config.batch.pad_to_multiple_of
        return -(-max(map(len, rows)) // multiple) * multiple

    def check_model(self, forward: Callable, model: torch.nn.Module, device: torch.device) -> None:
        check_vocabulary(self.tokenizer, model)

    def unpad(
        self,
        forward: Callable,
        model: torch.nn.Module,
        inputs: Callable[[list[np.ndarray]], dict],
        device: torch.device,
    ) -> None:
        """Let an encoder run without padding where that is the same. ``inputs``: how the task pads rows of tokens."""
        from fastft.models import unpadded
        from fastft.models.trial import random_rows

        self.pads = False
        rows = random_rows(self.tokenizer, model, tuple(min(n, self.max_length) for n in (3, 11, 11, 1, 7)))
        found, why = unpadded.install(forward, model, self.config.model.attention, inputs(rows), device)
        self.pads = found is None
        self.settled = {"attention": f"{'varlen' if found else 'padded'}: {why}"}

    def places(self, documents: np.ndarray) -> dict[str, Any]:
        """Inputs that say where tokens and documents are; none where the model runs with padding.

        ``documents``: (rows, width) int, the document in its row that each token belongs to, below 0 for padding.
        """
        if self.pads:
            return {}
        from fastft.models import unpadded

        return unpadded.positions(documents)

    def named_outputs(self, names: list[str], **more: Any) -> dict[str, Any]:
        """Config attributes of a model with a head whose outputs have names (labels, targets)."""
        index = {name: i for i, name in enumerate(names)}
        outputs = {"num_labels": len(names), "id2label": dict(enumerate(names)), "label2id": index}
        return {**outputs, "pad_token_id": self.tokenizer.pad_token_id, **more}

    def output_names(self, kind: str) -> list[str]:
        """Those names, of a trained model. UserError when ``model.path`` is not a trained one of this ``kind``."""
        names = self.model_config.id2label
        if not self.fits(self.model_config):
            raise UserError(
                f"model path {self.config.model.path}: is not a trained {kind}.",
                "Give a model that fastft exported (<run.dir>/model), or train one first.",
            )
        return [names[i] for i in range(len(names))]

    def processor_key(self) -> dict:
        return self._tokenizer_key

    @cached_property
    def _tokenizer_key(self) -> dict:
        return tokenizer_key(self.tokenizer)


class TextEncoder(Encoder):
    """Rows of text under a length limit.

    Parameters
    ----------
    texts : list of str
        Columns that hold text; a row whose first is blank is passed over as empty.
    others : list of str
        Columns that must be there beside them.
    truncation : str
        What ``data.truncation`` says.
    choices : tuple of str
        Its values that make sense for this task, for messages.
    """

    choices: tuple[str, ...] = ("truncate", "drop")

    def __init__(self, task: TextTask, texts: list[str], others: list[str] | None = None):
        super().__init__()
        self.tokenizer, self.max_length = task.tokenizer, task.max_length
        self.ids = Ids(self.tokenizer)
        self.texts, self.others = texts, others or []
        self.truncation = task.config.data.truncation
        self.model_limit = load.length_limit(task.model_config)

    def accepts(self, where: str, record: Record) -> bool:
        for column in [*self.texts, *self.others]:
            if column not in record:
                raise RowError(
                    f"{where}: no column {column!r}.",
                    f"{did_you_mean(column, record)} Set data.text / data.label to the columns of your data.",
                )
        for column in self.texts:
            check_text(where, column, record[column])
        return bool(str(record[self.texts[0]]).strip())

    def again(self) -> None:
        self.ids.by_tokenizer()

    def settle(self, counts: Counts) -> None:
        """With policy 'error': raise once everything is read, so that the message can count."""
        if self.truncation == "error" and counts.overlong_total:
            raise UserError(
                f"{counts.overlong_total} of {counts.rows} texts are longer than max_length = {self.max_length} tokens "
                f"(longest: {counts.longest}), first: {'; '.join(counts.overlong)}.",
                f"Choose data.truncation: {', '.join(self.choices)}, or raise data.max_length"
                f" (the model's limit is {self.model_limit or 'not set'}).",
            )


def padded(
    rows: list[np.ndarray],
    fill: int | float,
    dtype: Any = np.int64,
    width: int | None = None,
    side: str = "right",
) -> np.ndarray:
    """(len(rows), width or longest): rows padded on a side with ``fill``."""
    width = width or max(len(row) for row in rows)
    out = np.full((len(rows), width), fill, dtype=dtype)
    for r, row in enumerate(rows):
        start = width - len(row) if side == "left" else 0
        out[r, start : start + len(row)] = row
    return out


def rows_of(column: Ragged | np.ndarray, ids: np.ndarray) -> list[np.ndarray]:
    """The sequences of some samples."""
    return [column[int(i)] for i in ids]


def check_vocabulary(tokenizer: Any, model: torch.nn.Module) -> None:
    """UserError when the tokenizer knows more tokens than the model's embedding has rows."""
    from fastft.models.load import vocabulary_rows

    rows = vocabulary_rows(model)
    if len(tokenizer) > rows:
        beyond = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= rows)
        named = ", ".join(repr(token) for _, token in beyond[:5])
        raise UserError(
            f"The tokenizer knows {len(tokenizer)} tokens, the model's embedding has only {rows} rows: none for {named}"
            f"{', ...' if len(beyond) > 5 else ''}.",
            "Set model.resize_embeddings: true to train rows for them, or use the tokenizer that belongs to the model "
            "(model.tokenizer).",
        )
