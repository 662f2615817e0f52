"""Small WordPiece and Unigram tokenizers that are the same in every process.

The trainers of ``tokenizers`` for these two go through hash tables in an order of each process's own: they give other
vocabularies each time. Its trainer for BPE over bytes does not, nor does sentencepiece.
"""

import math
from collections import Counter
from collections.abc import Iterable

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def word_pieces(texts: Iterable[str], size: int):
    """A BERT tokenizer of ``tokenizers``: at most ``size`` pieces: all letters, alone and
    within a word, and the most frequent words."""
    from tokenizers import BertWordPieceTokenizer

    blank = BertWordPieceTokenizer({token: i for i, token in enumerate(SPECIAL)})
    words = Counter(
        word for text in texts for word, _ in blank.pre_tokenizer.pre_tokenize_str(blank.normalizer.normalize_str(text))
    )
    letters = sorted({letter for word in words for letter in word})
    frequent = sorted((word for word in words if len(word) > 1), key=lambda word: (-words[word], word))
    pieces = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters), *frequent]
    assert size > len(SPECIAL) + 2 * len(letters)
    return BertWordPieceTokenizer({piece: i for i, piece in enumerate(pieces[:size])})


def unigram(texts: Iterable[str], size: int) -> list[tuple[str, float]]:
    """At most ``size`` pieces and the logarithms of their frequencies: all letters, and parts of words with a mark of
    their beginning that are there three times."""
    from tokenizers import pre_tokenizers

    split = pre_tokenizers.Metaspace().pre_tokenize_str
    found = Counter(
        word[start:stop]
        for text in texts
        for word, _ in split(text)
        for start in range(len(word))
        for stop in range(start + 1, min(start + 6, len(word)) + 1)
    )
    letters = sorted(part for part in found if len(part) == 1)
    longer = sorted(
        (part for part, count in found.items() if len(part) > 1 and count >= 3),
        key=lambda part: (-found[part] * len(part), part),
    )
    total = sum(found.values())
    return [(part, math.log(found[part] / total)) for part in [*letters, *longer][:size]]
