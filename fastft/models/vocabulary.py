"""New tokens of a domain: chosen from texts, put into a tokenizer, and given rows that begin as their pieces' mean.

BPE: the training of the tokenizer goes on. The texts are cut as the tokenizer cuts them, the most frequent pair of
neighbors in a word becomes a token, and so on (Sennrich et al. 2016, arXiv 1508.07909); its merge comes behind all that
were there, so that a text without new tokens keeps its ids, and any new token stands for exactly the old ids of its
pieces. WordPiece: whole words, those first that save the most tokens. A new row is the mean of the pieces' rows.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from fastft.errors import UserError
from fastft.files import replacing
from fastft.lazy import torch

Pair = tuple[str, str]
SAMPLE = 200  # texts that the new tokenizer is compared with the old one on


@dataclass
class Extension:
    """New tokens.

    Attributes
    ----------
    tokens : dict
        Token, as the tokenizer writes it, -> the old tokens that it stands for.
    merges : list of (left, right)
        Of BPE, a merge for each token in their order.
    before, after : int
        Tokens of the texts, special ones apart.
    characters : int
    """

    tokens: dict[str, list[str]]
    merges: list[Pair]
    before: int
    after: int
    characters: int


def chosen(tokenizer: Any, texts: Iterable[str], count: int, least: int) -> Extension:
    """At most ``count`` new tokens, each of which stands at least ``least`` times in the texts.

    Raises
    ------
    UserError
        A tokenizer of another kind, or texts in which no pair is that frequent.
    """
    kind, words, characters = _counted(tokenizer, texts)
    backend: Any = tokenizer.backend_tokenizer
    known = set(backend.get_vocab(with_added_tokens=True))
    pieces = {word: [token.value for token in backend.model.tokenize(word)] for word in words}
    before = sum(times * len(pieces[word]) for word, times in words.items())
    if kind == "BPE":
        found = _merged(words, pieces, known, count, least)
        after = before - sum(times for *_, times in found)
        tokens: dict[str, list[str]] = {}
        for left, right, _ in found:
            tokens[left + right] = [*tokens.get(left, [left]), *tokens.get(right, [right])]
        merges = [(left, right) for left, right, _ in found]
    else:
        unknown = getattr(backend.model, "unk_token", None)
        saved = {
            word: n * (len(pieces[word]) - 1)
            for word, n in words.items()
            if n >= least and len(pieces[word]) > 1 and unknown not in pieces[word] and word not in known
        }
        best = sorted(saved, key=lambda word: (-saved[word], word))[:count]
        tokens, merges = {word: pieces[word] for word in best}, []
        after = before - sum(saved[word] for word in best)
    if not tokens:
        raise UserError(
            f"no new token stands {least} times or more in the texts.", "Lower --min-count, or give more texts."
        )
    return Extension(tokens, merges, before, after, characters)


def of_words(tokenizer: Any, words: list[str], texts: Iterable[str]) -> Extension:
    """Words as new tokens, as they stand behind a space. Of BPE, what a word is merged from becomes a token, too.

    Raises UserError as ``chosen`` does, and for a word that the tokenizer cuts in two or knows as one token.
    """
    kind, _, _ = _counted(tokenizer, [])
    backend: Any = tokenizer.backend_tokenizer
    known = set(backend.get_vocab(with_added_tokens=True))
    tokens: dict[str, list[str]] = {}
    merges: list[Pair] = []
    for word in words:
        parts = _cut(backend, f" {word}")
        if len(parts) != 1:
            raise UserError(f"{word!r} is no word to this tokenizer: it is cut into {', '.join(parts) or 'nothing'}.")
        pieces = [token.value for token in backend.model.tokenize(parts[0])]
        if len(pieces) == 1:
            raise UserError(f"{word!r} is a token already.", "Leave it out.")
        if kind == "WordPiece":
            tokens[parts[0]] = pieces
            continue
        for i in range(1, len(pieces)):
            left, right = "".join(pieces[:i]), pieces[i]
            if left + right not in known | set(tokens):
                tokens[left + right] = pieces[: i + 1]
                merges.append((left, right))
    extension = Extension(tokens, merges, 0, 0, 0)
    new = _with(tokenizer, extension)
    for text in texts:
        extension.characters += len(text)
        extension.before += len(backend.encode(text, add_special_tokens=False).ids)
        extension.after += len(new.encode(text, add_special_tokens=False).ids)
    return extension


def _counted(tokenizer: Any, texts: Iterable[str]) -> tuple[str, Counter[str], int]:
    """The kind of a tokenizer, how often every word is in the texts, and their characters."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    kind = "no fast tokenizer" if backend is None else type(backend.model).__name__
    marks = kind == "BPE" and (backend.model.continuing_subword_prefix or backend.model.end_of_word_suffix)
    if kind not in ("BPE", "WordPiece") or marks or backend.pre_tokenizer is None:
        what = kind + (" with marks in its words" if marks else " of whole texts" if kind == "BPE" else "")
        raise UserError(
            f"tokenizer {tokenizer.name_or_path}: new tokens are put into WordPiece, and into BPE that cuts text into "
            f"words first (byte-level BPE does); this one is {what}."
        )
    words, characters = Counter[str](), 0
    for text in texts:
        characters += len(text)
        words.update(_cut(backend, text))
    return kind, words, characters


def _cut(backend: Any, text: str) -> list[str]:
    """The words of a text, as the tokenizer's model gets them."""
    text = backend.normalizer.normalize_str(text) if backend.normalizer is not None else text
    return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]


def _merged(
    words: Counter[str], pieces: dict[str, list[str]], known: set[str], count: int, least: int
) -> list[tuple[str, str, int]]:
    """Merges in their order, with how often each was made."""
    pairs, places = Counter[Pair](), defaultdict[Pair, set[str]](set)
    for word, parts in pieces.items():
        _add(word, parts, words[word], pairs, places)
    taken, found = set(known), list[tuple[str, str, int]]()
    while len(found) < count:
        (best, times) = max(pairs.items(), key=lambda item: (item[1], item[0]), default=(("", ""), 0))
        if times < least:
            break
        del pairs[best]
        if "".join(best) in taken:  # another way to a token that there is: the model did not learn it so
            continue
        taken.add("".join(best))
        made = 0
        for word in sorted(places.pop(best)):
            old = pieces[word]
            _add(word, old, -words[word], pairs, places)
            pieces[word] = _joined(old, best)
            made += words[word] * (len(old) - len(pieces[word]))
            _add(word, pieces[word], words[word], pairs, places)
        del pairs[best]
        found.append((*best, made))
    return found


def _add(word: str, parts: list[str], times: int, pairs: Counter[Pair], places: defaultdict[Pair, set[str]]) -> None:
    for pair in pairwise(parts):
        pairs[pair] += times
        if times > 0:
            places[pair].add(word)


def _joined(parts: list[str], pair: Pair) -> list[str]:
    out, i = list[str](), 0
    while i < len(parts):
        if (parts[i], parts[i + 1] if i + 1 < len(parts) else "") == pair:
            out.append(parts[i] + parts[i + 1])
            i += 2
        else:
            out.append(parts[i])
            i += 1
    return out


def _with(tokenizer: Any, extension: Extension) -> Any:
    """The tokenizer's own model with the new tokens, numbered behind all that there are."""
    import tokenizers

    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    model, first = whole["model"], len(tokenizer)
    model["vocab"] |= {token: first + i for i, token in enumerate(extension.tokens)}
    as_text = bool(model.get("merges")) and isinstance(model["merges"][0], str)
    if "merges" in model:
        model["merges"] += [" ".join(pair) if as_text else list(pair) for pair in extension.merges]
    return tokenizers.Tokenizer.from_str(json.dumps(whole))


def extended(model: Any, tokenizer: Any, extension: Extension) -> None:
    """Rows of the embedding (and of an output head of its own, and its bias) for the new tokens, in place.

    A row is the mean of the rows of the old tokens that the new one stands for, in float32.
    """
    first, rows = len(tokenizer), model.get_input_embeddings().weight.shape[0]
    if (wanted := first + len(extension.tokens)) > rows:
        model.resize_token_embeddings(wanted, mean_resizing=False)
    ids = tokenizer.convert_tokens_to_ids
    tables = [model.get_input_embeddings().weight]
    if (head := model.get_output_embeddings()) is not None:
        tables += [table for table in (head.weight, getattr(head, "bias", None)) if table is not None]
    with torch.no_grad():
        for table in {table.data_ptr(): table for table in tables}.values():
            for i, parts in enumerate(extension.tokens.values()):
                table[first + i] = table[ids(parts)].float().mean(0).to(table.dtype)


def save(path: str, out: Path, tokenizer: Any, extension: Extension, samples: list[str]) -> None:
    """Write the model of a folder or hub id, with the new tokens and their rows, into a folder that is not there yet.

    Raises
    ------
    UserError
        A model that cannot be loaded; a tokenizer that is another one when it is read again.
    """
    import transformers

    from fastft.config import Model
    from fastft.models import load

    settings = load.config(Model(path=path))
    name = (settings.architectures or [""])[0]
    if not hasattr(transformers, name):
        raise UserError(f"model path {path}: {name or 'its class'} is no class of transformers.")
    model = load._from_pretrained(getattr(transformers, name), path, "model", dtype="auto")
    extended(model, tokenizer, extension)
    with replacing(out) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        for stale in ("vocab.json", "merges.txt", "vocab.txt"):  # without the new tokens
            (scratch / stale).unlink(missing_ok=True)
        _with(tokenizer, extension).save(str(scratch / "tokenizer.json"))
        _check(tokenizer, transformers.AutoTokenizer.from_pretrained(scratch), extension, samples)


def _check(old: Any, new: Any, extension: Extension, samples: list[str]) -> None:
    """UserError unless the tokenizer that was read again cuts texts as it should: by BPE, into the old ids once every
    new token is replaced by what it stands for; by WordPiece, into tokens that make up the same words.
    """
    tokens = extension.tokens
    for text in samples[:SAMPLE]:
        found = new.convert_ids_to_tokens(new(text, add_special_tokens=False, verbose=False)["input_ids"])
        wanted = old.convert_ids_to_tokens(old(text, add_special_tokens=False, verbose=False)["input_ids"])
        if extension.merges:
            found = [part for token in found for part in tokens.get(token, [token])]
        else:
            found, wanted = ("".join(t if t[:2] != "##" else t[2:] for t in part) for part in (found, wanted))
        if found != wanted:
            raise UserError(f"{old.name_or_path}: with new tokens it cuts a text otherwise: {text[:80]!r}.")
    if missing := [token for token in tokens if new.convert_tokens_to_ids(token) < len(old)]:
        raise UserError(f"{old.name_or_path}: the tokenizer does not keep new tokens ({missing[0]!r}).")
