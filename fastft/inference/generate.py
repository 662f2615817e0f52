"""Generated continuations of texts, by causal models."""

from __future__ import annotations

from typing import Any

from fastft.errors import UserError
from fastft.inference.base import Predictor, Row
from fastft.models import load


class Generator(Predictor):
    """``text`` and ``generated``.

    Parameters
    ----------
    temperature : float
        0: the likeliest token; otherwise sampling at this temperature, at least 0.01.
    """

    def __init__(self, model: Any, tokenizer: Any, column: str, max_new_tokens: int, temperature: float):
        if 0 < temperature < 0.01:
            raise UserError(
                f"temperature {temperature}: sampling below 0.01 overflows.", "0 takes the likeliest token."
            )
        self.model, self.tokenizer = model, tokenizer
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.fields = {"text": column}

    def run(self, rows: list[Row]) -> list[dict]:
        texts = [row["text"] for row in rows]
        continued = self.continued(self._prompts(texts))
        return [{"text": text, "generated": more} for text, more in zip(texts, continued, strict=True)]

    def continued(self, prompts: list[list[int]], streamer: Any = None) -> list[str]:
        """What the model writes behind each prompt. Raises UserError when the longest leaves no room for it.

        ``streamer``: of transformers; is given the tokens of a single prompt as they come.
        """
        tokenizer = self.tokenizer
        encoded = prompts_padded(tokenizer, prompts, self.model.device)
        width, limit = encoded["input_ids"].shape[1], load.length_limit(self.model.config)
        if limit is not None and width + self.max_new_tokens > limit:
            raise UserError(
                f"The longest prompt ({width} tokens) and {self.max_new_tokens} new ones exceed the model's limit of "
                f"{limit} positions.",
                "Shorten the prompt or lower --max-new-tokens.",
            )
        how = {"do_sample": True, "temperature": self.temperature} if self.temperature > 0 else {"do_sample": False}
        pad = tokenizer.pad_token_id
        out = self.model.generate(
            **encoded, max_new_tokens=self.max_new_tokens, pad_token_id=pad, streamer=streamer, **how
        )
        return [tokenizer.decode(row[width:], skip_special_tokens=True) for row in out]

    def _prompts(self, texts: list[str]) -> list[list[int]]:
        """Tokens of texts that go on: with what the tokenizer puts before a text, without what ends one."""
        whole, bare = (
            self.tokenizer(texts, add_special_tokens=add, verbose=False)["input_ids"] for add in (True, False)
        )
        found = []
        for ids, own in zip(whole, bare, strict=True):
            extra = len(ids) - len(own)
            before = next((n for n in range(extra + 1) if ids[n : n + len(own)] == own), extra)
            ids = ids[: before + len(own)]
            found.append(ids[1:] if load.starts_twice(self.tokenizer, ids) else ids)
        return found


def prompts_padded(tokenizer: Any, prompts: list[list[int]], device: Any) -> Any:
    """``input_ids`` and ``attention_mask``, (rows, width) int64, padded on the left: what is written comes behind."""
    padded = [{"input_ids": ids} for ids in prompts]
    return tokenizer.pad(padded, padding=True, padding_side="left", return_tensors="pt").to(device)
