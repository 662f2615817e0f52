"""Tags of words: the schemes that mark entities by them, and the entities that they mark.

Schemes: IOB1 (B- only between neighbors of one type), IOB2 (every entity begins with B-), BIOES (E- ends, S- stands
alone; also spelled BILOU and BMES), raw (the type alone). All are read as conlleval and seqeval's default mode read
them: an I- with nothing to go on from begins an entity.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np

from fastft.data.encoder import RowError
from fastft.errors import UserError
from fastft.tasks._judged import by_class

OUTSIDE = "O"
LOOK_LIKE_O = {"0": "the digit 0", "o": "a small o", "\u041e": "the Cyrillic O", "\u039f": "the Greek Omicron"}
LETTERS = {"B": "B", "I": "I", "M": "I", "E": "E", "L": "E", "S": "S", "U": "S"}  # every spelling -> IOBES
PREFIXED = re.compile("([BIMELSU])-(.+)", re.DOTALL)


class Starts:
    """Which scheme a stream of tag sequences is in: what of entities' beginnings was seen."""

    def __init__(self) -> None:
        self.letters: set[str] = set()
        self.bare: set[str] = set()  # tags without a prefix
        self.unmarked = self.free = 0  # entities that begin with I-; B- where no neighbor of its type ends

    def add(self, tags: Sequence[str]) -> None:
        """The tags of one sentence."""
        before = (OUTSIDE, "")
        for tag in tags:
            if (found := PREFIXED.fullmatch(tag)) is None:
                if tag != OUTSIDE:
                    self.bare.add(tag)
                before = (OUTSIDE, "")
                continue
            letter, kind = found[1], found[2]
            self.letters.add(letter)
            touches = before[0] != OUTSIDE and before[1] == kind
            self.unmarked += letter == "I" and not touches
            self.free += letter == "B" and not touches
            before = (letter, kind)

    def scheme(self) -> str:
        """iob1, iob2, bioes or raw. UserError for tags with a prefix beside others without."""
        if not self.letters:
            return "raw"
        if self.bare:
            known = ", ".join(sorted(self.bare)[:5])
            raise UserError(
                f"data.tags: some tags have a prefix ({'-, '.join(sorted(self.letters))}-), others have none: {known}.",
                "Fix the tags; or, if they are names without prefixes, set data.scheme: raw.",
            )
        if self.letters - {"B", "I"}:
            return "bioes"
        return "iob1" if self.unmarked and not self.free else "iob2"


def check_outside(where: str, tags: Iterable[str]) -> None:
    """RowError when a tag looks like the letter O beside tags with prefixes, but is another sign."""
    if (look := next((tag for tag in tags if tag in LOOK_LIKE_O), None)) is not None:
        raise RowError(
            f"{where}: tag {look!r} is {LOOK_LIKE_O[look]}, not the letter O.",
            "Words outside of entities have the tag O (the capital letter).",
        )


def continues(tag: str, before: str) -> bool:
    """Whether an entity goes on from a word to the next, in whichever scheme."""
    now, then = PREFIXED.fullmatch(tag), PREFIXED.fullmatch(before)
    if now is None:
        return tag == before != OUTSIDE
    return now[1] in "IMEL" and then is not None and then[2] == now[2] and then[1] not in "ELSU"


def later_piece(tag: str, scheme: str) -> str:
    """The tag of a word's further pieces: what begins an entity becomes what is inside of it."""
    found = None if scheme == "raw" else PREFIXED.fullmatch(tag)
    return f"I-{found[2]}" if found and found[1] in "BSU" else tag


def readable(tag: str, scheme: str) -> str:
    """A tag as seqeval reads it: IOBES prefixes; a raw type as inside."""
    if tag == OUTSIDE:
        return tag
    found = None if scheme == "raw" else PREFIXED.fullmatch(tag)
    return f"{LETTERS[found[1]]}-{found[2]}" if found else f"I-{tag}"


def entities(tags: Sequence[str], scheme: str) -> list[tuple[str, int, int]]:
    """Type, first word and the word after the last of every entity, as seqeval's default mode finds them."""
    from seqeval.metrics.sequence_labeling import get_entities

    found = get_entities([readable(tag, scheme) for tag in tags])
    return [(kind, start, end + 1) for kind, start, end in found]


def scores(truth: list[list[str]], predicted: list[list[str]], scheme: str) -> dict[str, float]:
    """precision, recall and f1 over all entities (micro), as seqeval's default mode counts them."""
    return of_counts(*counts(truth, predicted, scheme).sum(0).tolist())


def counts(truth: list[list[str]], predicted: list[list[str]], scheme: str) -> np.ndarray:
    """(sentences, 3) int64: entities that are there and were found, that were found, and that are there."""
    pairs = ((set(entities(a, scheme)), set(entities(b, scheme))) for a, b in zip(truth, predicted, strict=True))
    found = [(len(wanted & found), len(found), len(wanted)) for wanted, found in pairs]
    return np.array(found, np.int64).reshape(-1, 3)


def of_counts(right: int, found: int, there: int) -> dict[str, float]:
    """precision, recall and f1; 0 where nothing was found, or is there."""
    precision, recall = right / max(found, 1), right / max(there, 1)
    return {"precision": precision, "recall": recall, "f1": 2 * right / max(found + there, 1)}


def scores_by_type(truth: list[list[str]], predicted: list[list[str]], scheme: str) -> dict[str, dict[str, float]]:
    """precision, recall, f1 and support (entities that are there) by the entities' type."""
    types = sorted({kind for tags in (*truth, *predicted) for kind, *_ in entities(tags, scheme)})
    if not types:
        return {}
    from seqeval.metrics.sequence_labeling import precision_recall_fscore_support

    both = ([[readable(tag, scheme) for tag in tags] for tags in sentences] for sentences in (truth, predicted))
    return by_class(types, *precision_recall_fscore_support(*both, average=None, zero_division=0))
