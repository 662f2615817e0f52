"""Text to token ids, as a task's own tokenizer gives them: by gigatoken where it is proven to be the same, else by
Hugging Face's tokenizers.

Every document becomes what causal_lm makes of it: the special tokens that the tokenizer puts before and behind a text,
and the end-of-sequence token. Tasks that want other ones take these off.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastft.errors import UserError

SAMPLE = 200  # documents that are compared before gigatoken is trusted
LOOKED = 8  # first documents of every block, later, of which the shortest is: tokenizers take a tenth of the time else
LONGEST = 100_000  # characters of one that is compared then: tokenizers take seconds for megabytes


@dataclass(frozen=True)
class TokenizerFacts:
    """What a process needs to tokenize.

    Attributes
    ----------
    content : str
        The tokenizer as JSON, of Hugging Face's tokenizers.
    key : dict
        What its ids depend on (``tokenizer_key``).
    before, after : list of int
        Tokens around every document; ``eos`` is the last of ``after`` where there is one.
    bos, eos : int or None
    vocabulary : int
        Ids are below it.
    special : tuple of int
        Special tokens that a text can have in it, written out.
    split : bool
        Whether they are plain text there.
    """

    content: str
    key: dict[str, Any]
    before: list[int]
    after: list[int]
    bos: int | None
    eos: int | None
    vocabulary: int
    special: tuple[int, ...] = ()
    split: bool = False

    @property
    def dtype(self) -> str:
        return "<u2" if self.vocabulary <= 1 << 16 else "<i4"


def tokenizer_key(tokenizer: Any) -> dict[str, Any]:
    """What a tokenizer's ids depend on, as JSON."""
    fast = tokenizer.is_fast
    vocabulary = tokenizer.backend_tokenizer.to_str() if fast else repr(sorted(tokenizer.get_vocab().items()))
    return {
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "special": {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
    }


def facts_of(path: str, revision: str | None) -> TokenizerFacts:
    """UserError for a tokenizer that cannot be had, or that is written in Python alone."""
    from fastft.config import Model
    from fastft.models import load

    found = load.tokenizer(Model(path=path, revision=revision))
    if not found.is_fast:
        raise UserError(f"tokenizer {path}: has no tokenizer.json.", "A corpus needs a fast tokenizer.")
    facts = facts_from(found, ends=True)
    if facts is None:
        raise UserError(f"tokenizer {path}: encodes a text otherwise with special tokens than without.")
    return facts


def facts_from(found: Any, ends: bool) -> TokenizerFacts | None:
    """Of a fast tokenizer; None for one that encodes a text otherwise with special tokens than without. ``ends``:
    whether texts end in the end-of-sequence token where the tokenizer puts none.
    """
    whole, bare = (found("a", add_special_tokens=add)["input_ids"] for add in (True, False))
    at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), None)
    if at is None:
        return None
    before, after, eos = whole[:at], whole[at + len(bare) :], found.eos_token_id
    if ends and eos is not None and after[-1:] != [eos]:
        after = [*after, eos]
    backend = found.backend_tokenizer
    content = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
    key = tokenizer_key(found)
    special = {id for id, token in found.added_tokens_decoder.items() if token.special} - {found.unk_token_id}
    split = bool(getattr(found, "split_special_tokens", False))
    around = before, after, found.bos_token_id, eos
    return TokenizerFacts(json.dumps(content), key, *around, len(found), tuple(sorted(special)), split)


class Encoder:
    """Texts to ids, in one process."""

    def __init__(self, facts: TokenizerFacts, fast: bool):
        self.facts = facts
        self.fast = _Gigatoken(facts) if fast else None
        self._plain: Any = None
        self.written = 0  # special tokens that texts had in them
        self.special = np.zeros(max([facts.vocabulary, *facts.special]) + 1, bool)
        self.special[list(facts.special)] = True
        self.lowest, self.highest = min(facts.special, default=0), max(facts.special, default=0)

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts, one behind the other, with those around each, (tokens,); and how many each has, (texts,): 0
        for a text without any of its own. ``Differs`` where gigatoken gives others than the tokenizer.
        """
        return self._whole(*self._bare(texts))

    def rows(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, with those that the tokenizer puts around every one. ``Differs`` as ``encode``."""
        found, lengths = self._bare(texts)
        values, ends = found.tolist(), np.cumsum(lengths).tolist()
        before, after = self.facts.before, self.facts.after
        starts = [0, *ends[:-1]]
        return [[*before, *values[start:end], *after] for start, end in zip(starts, ends, strict=True)]

    def _bare(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        if self.fast is None:
            return self.plain(texts)
        values, lengths = self.fast.encode(texts, self.plain)
        looked = range(min(len(texts), LOOKED))
        at = min(looked, key=lambda i: (not texts[i], len(texts[i])), default=None)
        if at is not None and len(texts[at]) <= LONGEST:
            start = int(lengths[:at].sum())
            if not np.array_equal(self.plain([texts[at]])[0], values[start : start + lengths[at]]):
                raise Differs(texts[at])
        return values, lengths

    def plain(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The same without special tokens, by Hugging Face's tokenizers."""
        if self._plain is None:
            from tokenizers import Tokenizer

            self._plain = Tokenizer.from_str(self.facts.content)
            self._plain.encode_special_tokens = self.facts.split
        return flat([encoding.ids for encoding in self._plain.encode_batch(texts, add_special_tokens=False)])

    def _whole(self, values: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """With the tokens around each text, as causal_lm's encoder has them: a text that says BOS or EOS itself gets no
        second one.
        """
        near = values[(values >= self.lowest) & (values <= self.highest)]  # of most texts none
        self.written += int(self.special[near].sum())
        facts, full = self.facts, lengths > 0
        ends = np.cumsum(lengths)[full]
        starts = ends - lengths[full]
        before, after = np.full(len(ends), len(facts.before)), np.full(len(ends), len(facts.after))
        if facts.bos is not None and facts.before[-1:] == [facts.bos]:
            before -= values[starts] == facts.bos
        if facts.eos is not None and facts.after == [facts.eos]:
            after -= values[ends - 1] == facts.eos
        whole = lengths.copy()
        whole[full] += before + after
        found = np.empty(int(whole.sum()), np.uint32)
        own = np.ones(len(found), bool)
        last = np.cumsum(whole)[full]
        first = last - whole[full]
        for i, token in enumerate(facts.before):
            at = first[before > i] + i
            found[at], own[at] = token, False
        for i, token in enumerate(facts.after):
            at = last[after > i] - len(facts.after) + i
            found[at], own[at] = token, False
        found[own] = values
        return found, whole


def flat(rows: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids, one behind the other, uint32, and their lengths."""
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    parts = [np.asarray(row, np.uint32) for row in rows]
    return np.concatenate([np.zeros(0, np.uint32), *parts]), lengths


class Differs(RuntimeError):
    """gigatoken's ids of a text are not the tokenizer's."""


class _Gigatoken:
    """gigatoken, which wants a token for every single byte. A vocabulary without some is given them under ids that it
    does not have; a text in which one comes up is left to the tokenizer itself.
    """

    def __init__(self, facts: TokenizerFacts):
        import gigatoken
        from tokenizers.pre_tokenizers import ByteLevel

        content = json.loads(facts.content)
        vocabulary = content["model"].get("vocab")
        ids = [token["id"] for token in content.get("added_tokens", [])]
        self.first = 1 << 32
        if content["model"].get("type") == "BPE" and "ByteLevel" in json.dumps(content.get("pre_tokenizer")):
            missing = [char for char in sorted(ByteLevel.alphabet()) if char not in vocabulary]
            self.first = max([*vocabulary.values(), *ids]) + 1
            vocabulary |= {char: self.first + i for i, char in enumerate(missing)}
        self.tokenizer = gigatoken.Tokenizer.from_json(json.dumps(content))

    def encode(self, texts: list[str], plain: Any) -> tuple[np.ndarray, np.ndarray]:
        if len(texts) <= SAMPLE:  # without awkward, which takes half a second to import
            values, lengths = flat([self.tokenizer.encode(text) for text in texts])
        else:
            layout = self.tokenizer.encode_batch(texts, parallel=False).layout
            values, lengths = np.asarray(layout.content.data), np.diff(np.asarray(layout.offsets.data))
        if not len(values) or values.max() < self.first:
            return values, lengths
        rows = np.split(values, np.cumsum(lengths)[:-1])
        for i, row in enumerate(rows):
            if len(row) and row.max() >= self.first:
                rows[i] = plain([texts[i]])[0]
        return flat(rows)


def choose(facts: TokenizerFacts, wanted: str, sample: list[str]) -> tuple[bool, str]:
    """Whether gigatoken is used, and why: ids of a sample are compared. UserError where it cannot be, but must."""
    if wanted == "tokenizers":
        return False, "asked for"
    try:
        if facts.split:
            raise ValueError("split_special_tokens")
        if not sample:
            raise ValueError("there is no document to compare them on")
        fast = _Gigatoken(facts)
    except ImportError:
        why = "gigatoken is not installed"
    except Exception as e:  # what its Rust code says of a tokenizer that it does not know
        why = f"gigatoken does not take this tokenizer: {str(e).strip().splitlines()[0]}"
    else:
        exact = Encoder(facts, fast=False)
        got, right = (_rows(*encode(sample)) for encode in (lambda t: fast.encode(t, exact.plain), exact.plain))
        wrong = sum(not np.array_equal(a, b) for a, b in zip(got, right, strict=True))
        if not wrong:
            return True, f"the same ids on {len(sample)} of {len(sample)} documents"
        why = f"gigatoken gives other ids on {wrong} of {len(sample)} documents"
    if wanted == "gigatoken":
        raise UserError(f"encoder: {why}.", "Set encoder: auto, or pip install 'fastft[data]'.")
    return False, why


def _rows(values: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    return np.split(values, np.cumsum(lengths)[:-1])
