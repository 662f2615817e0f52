"""Word lists to tokens, and back: tokenizers that know which word each token is of, and windows that cut no word."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastft.errors import UserError

PROBE = "the"


def for_words(tokenizer: Any, path: str) -> Any:
    """The tokenizer, made to give words of a list the tokens that they have after a space in running text.

    Byte-level tokenizers (GPT-2, RoBERTa, Llama 3, Qwen) write the space into the word's first token; a list has no
    spaces, so each word is given one. What is changed is part of the tokenizer, so it is exported with it.

    Raises
    ------
    UserError
        A slow tokenizer: it cannot say which word a token is of.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"tokenizer {path}: token classification needs a fast tokenizer (tokenizer.json); "
            f"{type(tokenizer).__name__} cannot say which word a token belongs to.",
            "Set model.tokenizer to a folder or hub id that has a tokenizer.json, or save one with transformers.",
        )
    backend = tokenizer.backend_tokenizer
    if not _is_byte_level(backend) or _has_space(tokenizer):
        return tokenizer
    from tokenizers import normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        backend.pre_tokenizer.add_prefix_space = True
        tokenizer.add_prefix_space = tokenizer.init_kwargs["add_prefix_space"] = True  # RoBERTa's class reads it back
    else:  # something splits before the byte level, whose own option would put a space before every part
        old = [backend.normalizer] if backend.normalizer is not None else []
        backend.normalizer = normalizers.Sequence([*old, normalizers.Prepend(" ")])
        tokenizer = PreTrainedTokenizerFast(  # a class that reads tokenizer.json as it is
            tokenizer_object=backend,
            model_max_length=tokenizer.model_max_length,
            padding_side=tokenizer.padding_side,
            **tokenizer.special_tokens_map,
        )
    if not _has_space(tokenizer):
        raise UserError(
            f"tokenizer {path}: is byte-level, and could not be made to give words of a list their leading space.",
            "Set model.tokenizer to one that was saved with add_prefix_space=True.",
        )
    return tokenizer


def _is_byte_level(backend: Any) -> bool:
    step = json.loads(backend.to_str()).get("pre_tokenizer") or {}
    steps = step.get("pretokenizers", [step])
    return any(s.get("type") == "ByteLevel" for s in steps)


def _has_space(tokenizer: Any) -> bool:
    def ids(*words: str) -> list[int]:
        return tokenizer(list(words), is_split_into_words=True, add_special_tokens=False)["input_ids"]

    running = tokenizer(f"{PROBE} {PROBE}", add_special_tokens=False)["input_ids"]
    both = ids(PROBE, PROBE)
    return both == ids(PROBE) * 2 and running[-len(both) // 2 :] == ids(PROBE)


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a sequence."""
    encoded = tokenizer([PROBE], is_split_into_words=True)
    ids, words = encoded["input_ids"], encoded.word_ids()
    real = [i for i, word in enumerate(words) if word is not None]
    return list(ids[: real[0]]), list(ids[real[-1] + 1 :])


@dataclass
class Pieces:
    """The tokens of a sentence's words, without special ones.

    Attributes
    ----------
    ids, words : (n,) int64
        Token, and the index of its word. A word that has no token (a control character) is not among them.
    """

    ids: np.ndarray
    words: np.ndarray

    def part(self, start: int, end: int) -> Pieces:
        return Pieces(self.ids[start:end], self.words[start:end])


def pieces_of(tokenizer: Any, sentences: Sequence[list[str]]) -> list[Pieces]:
    """The pieces of some sentences."""
    encoded = tokenizer(list(sentences), is_split_into_words=True, add_special_tokens=False, verbose=False)
    return [
        Pieces(np.asarray(ids, np.int64), np.asarray(encoded.word_ids(i), np.int64))
        for i, ids in enumerate(encoded["input_ids"])
    ]


def windows(pieces: Pieces, room: int, joined: np.ndarray) -> list[Pieces]:
    """Consecutive parts of at most ``room`` tokens, cut between words, and outside of entities where that is possible.

    A word that is longer than ``room`` stands alone, with its first tokens only.

    Parameters
    ----------
    joined : (words,) bool
        Whether an entity goes on from the word before to this one.
    """
    words = pieces.words
    starts = np.flatnonzero(np.diff(words, prepend=-1))  # where a word begins
    ends = np.append(starts[1:], len(words))
    found, first = [], 0
    while first < len(starts):
        last = int(np.searchsorted(ends, starts[first] + room, side="right"))  # the first word that does not fit
        if last < len(starts):
            cut = last
            while cut > first and joined[words[starts[cut]]]:
                cut -= 1
            last = cut if cut > first else max(last, first + 1)
        found.append(pieces.part(starts[first], min(ends[last - 1], starts[first] + room)))
        first = last
    return found


def is_unspaced(text: str) -> bool:
    """Whether a text has no white space and is written in Chinese characters or kana: its words are not apart."""
    return len(text.split()) == 1 and any("\u3040" <= c <= "\u30ff" or "\u3400" <= c <= "\u9fff" for c in text)
