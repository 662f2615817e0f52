"""Texts to token ids as the tokenizer gives them, by gigatoken where it is proven to be the same."""

from __future__ import annotations

import logging
from typing import Any

from fastft.corpus.tokens import SAMPLE, Differs, Encoder, choose, facts_from
from fastft.data.encoder import Again

log = logging.getLogger(__name__)

LEAST = 1 << 20  # characters of texts for which it is worth the half second that it takes to load


class Ids:
    """What ``tokenizer(texts)["input_ids"]`` is.

    The first texts that are many enough are tokenized both ways. Where all ids are the same, gigatoken does it from
    there on, and of every call the shortest of its first texts is compared; it raises ``Again`` for other ids.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.encoder: Encoder | None = None
        self.decided = not tokenizer.is_fast

    def by_tokenizer(self) -> None:
        """From here on."""
        self.encoder, self.decided = None, True

    def __call__(self, texts: list[str]) -> list[list[int]]:
        if not self.decided and sum(map(len, texts)) >= LEAST:
            self.decided, self.encoder = True, self._proven(texts[:SAMPLE])
        if self.encoder is None:
            return self._plain(texts)
        try:
            return self.encoder.rows(texts)
        except Differs as e:
            raise Again(f"gigatoken gives other ids for {str(e)[:60]!r}") from None

    def _plain(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]

    def _proven(self, texts: list[str]) -> Encoder | None:
        facts = facts_from(self.tokenizer, ends=False)
        if facts is None:
            return None
        fast, why = choose(facts, "auto", texts)
        encoder = Encoder(facts, fast) if fast else None
        few = min(texts, key=len), ""  # with the tokens around a text
        if encoder is not None and encoder.rows(list(few)) != self._plain(list(few)):
            encoder, why = None, "gigatoken gives other special tokens"
        log.info("ids by %s: %s", "gigatoken" if encoder is not None else "the tokenizer", why)
        return encoder
