"""Generated texts for sources."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fastft.errors import UserError
from fastft.inference.base import Predictor, Row
from fastft.inference.forward import Forward
from fastft.tasks.seq2seq.metrics import decoded

if TYPE_CHECKING:
    from fastft.tasks.seq2seq import Seq2Seq, Seq2SeqOptions


class Writer(Predictor):
    """``text`` (the source) and ``generated``; ``truncated`` when the source was cut."""

    def __init__(self, task: Seq2Seq, model: Any, options: Seq2SeqOptions):
        self.task, self.model = task, model
        self.encoder = task.encoder(None)
        self.limit = min(options.max_length or task.max_length, task.max_length)
        given: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "num_beams": options.num_beams}
        self.given: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        limit = task.limit("decoder")
        if limit is not None and (options.max_new_tokens or 0) > limit:
            raise UserError(
                f"max_new_tokens = {options.max_new_tokens} is beyond the limit of {limit} positions of the model's "
                "decoder.",
                f"Set it to at most {limit}.",
            )
        if "max_new_tokens" in self.given:
            self.given["max_length"] = None  # of the model's generation config
        self.fields = {"text": task.config.data.source}

    def run(self, rows: list[Row]) -> list[dict]:
        texts = [row["text"] for row in rows]
        sources = self.encoder.source_ids([self.task.prefix + text for text in texts])
        long = [len(ids) > self.limit for ids in sources]
        for i in np.flatnonzero(long):
            sources[i] = self.encoder.source_ids([self.task.prefix + texts[i]], self.limit)[0]
        inputs = self.task.padded_inputs([np.array(ids) for ids in sources])
        inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
        written = decoded(self.task.tokenizer, Forward(self.model, self.model).generate(inputs, **self.given))
        return [
            {"text": text, "generated": more, **({"truncated": True} if cut else {})}
            for text, more, cut in zip(texts, written, long, strict=True)
        ]
