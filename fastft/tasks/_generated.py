"""Scores of generated texts: BLEU and chrF by sacrebleu, ROUGE, exact match, the answer of a calculation."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
from pydantic import Field

from fastft.config import Config, Evaluation
from fastft.data import batches
from fastft.errors import UserError
from fastft.tasks.base import Metric

TextMetric = Literal["bleu", "chrf", "rouge", "exact_match", "answer"]
ROUGE = ("rouge1", "rouge2", "rougeL")


class GenerationEvaluation(Evaluation):
    """What evaluations generate, and how it is judged."""

    metrics: list[TextMetric] = Field(
        [],
        description="Scores of what the model generates: bleu and chrf by sacrebleu, rouge (1, 2 and L), exact_match, "
        "answer (the last number, or that behind ####: GSM8K). An empty list: nothing is generated.",
    )
    generation: dict[str, Any] = Field(
        {},
        description="Keys of transformers' GenerationConfig, over the model's own, and exported with it: "
        "{num_beams: 4, max_new_tokens: 128}.",
    )
    bleu_tokenize: str = Field(
        "auto",
        description="How sacrebleu cuts words: 13a, zh, char, intl, ja-mecab, ko-mecab, flores200; auto: with seq2seq "
        "zh for Chinese targets, char for Japanese, Thai, Lao, Burmese and Khmer, 13a for others; with sft 13a.",
    )

    def check(self, config: Config) -> None:
        if len(set(self.metrics)) < len(self.metrics):
            raise ValueError("evaluation.metrics names one twice")
        if self.generation.get("do_sample"):
            raise ValueError("evaluation.generation: do_sample: evaluations do not sample: they are to be compared")
        if fixed := sorted({"num_return_sequences", "return_dict_in_generate"} & set(self.generation)):
            raise ValueError(f"evaluation.generation: {fixed[0]}: an evaluation takes one text for each row")


def names_of(chosen: list[TextMetric]) -> tuple[Metric, ...]:
    """What ``evaluation.metrics`` measures."""
    each = {"rouge": ROUGE}
    return tuple(Metric(name) for kind in chosen for name in each.get(kind, (kind,)))


STEP = 64  # what one step of generation costs beside its tokens, in tokens (data/batches.py: a forward's)


def generation_steps(
    sizes: np.ndarray, settings: Any, micro_tokens: int, most: Callable[[int], int]
) -> Iterator[np.ndarray]:
    """Rows that are generated together, by length; as many arrays on every rank, empty ones where there are no more.

    Parameters
    ----------
    sizes : (rows, 2) int
        Tokens of each row's prompt or source, and about how many it will be answered with.
    settings : GenerationConfig
    micro_tokens : int
        Most padded tokens computed at once; a beam counts as a row.
    most : callable
        ``most(n)``: the largest n of any rank.
    """
    plan: batches.Plan = []
    if len(sizes):
        beams, overhead = settings.num_beams or 1, int(STEP * sizes[:, 1].mean())
        plan = batches.by_length(np.arange(len(sizes)), sizes, 1, max(1, micro_tokens // beams), overhead)
    for i in range(most(len(plan))):
        yield plan[i][0] if i < len(plan) else np.zeros(0, np.int64)


class Scores:
    """Scores by text, in arrays that add up to those of a set.

    Parameters
    ----------
    settings : GenerationEvaluation
    tokenize : str
        What ``bleu_tokenize: auto`` stands for.

    Raises
    ------
    UserError
        sacrebleu is needed and not installed, or does not know this way to cut words.
    """

    def __init__(self, settings: GenerationEvaluation, tokenize: str = "13a"):
        self.chosen = settings.metrics
        self.sacre: dict[str, Any] = {}
        if {"bleu", "chrf"} & set(self.chosen):
            wanted = tokenize if settings.bleu_tokenize == "auto" else settings.bleu_tokenize
            every = _sacrebleu(wanted, "bleu" in self.chosen)
            self.sacre = {name: every[name] for name in ("bleu", "chrf") if name in self.chosen}

    @property
    def signatures(self) -> dict[str, str]:
        """sacrebleu's, which say what its scores can be compared with."""
        return {name: _signature(metric) for name, metric in self.sacre.items()}

    def columns(self, texts: list[str], references: list[str]) -> dict[str, np.ndarray]:
        """A row per text: sacrebleu's statistics, ROUGE's F1, and whether it matches."""
        pairs = list(zip(texts, references, strict=True))
        found = {name: _statistics(metric, texts, references) for name, metric in self.sacre.items()}
        if "rouge" in self.chosen:
            found["rouge"] = np.array([rouge(*pair) for pair in pairs]).reshape(-1, len(ROUGE))
        if "exact_match" in self.chosen:
            found["exact_match"] = np.array([text.strip() == wanted.strip() for text, wanted in pairs], float)
        if "answer" in self.chosen:
            numbers = [(answer(text), answer(wanted)) for text, wanted in pairs]
            found["answer"] = np.array([wanted is not None and text == wanted for text, wanted in numbers], float)
        return found

    def finish(self, columns: dict[str, np.ndarray]) -> dict[str, float]:
        """BLEU and chrF from 0 to 100, as sacrebleu has them; the others from 0 to 1."""
        found = {name: self.score(name, columns[name].sum(0)) for name in self.sacre}
        if "rouge" in self.chosen:
            found |= dict(zip(ROUGE, columns["rouge"].mean(0).tolist(), strict=True))
        return found | {name: float(columns[name].mean()) for name in ("exact_match", "answer") if name in self.chosen}

    def each(self, columns: dict[str, np.ndarray]) -> list[dict[str, float]]:
        """The same of each text by itself."""
        rows = range(len(next(iter(columns.values()))))
        return [self.finish({name: column[i : i + 1] for name, column in columns.items()}) for i in rows]

    def worth(self, scores: dict[str, float]) -> float:
        """What texts are ordered by, of their own scores: the first of chrF, ROUGE-L, answer, exact match and BLEU."""
        known = ("chrf", "rougeL", "answer", "exact_match", "bleu")
        return next(scores[name] for name in known if name in scores)

    def score(self, name: str, statistics: np.ndarray) -> float:
        """BLEU or chrF of summed statistics."""
        return float(self.sacre[name]._compute_score_from_stats(statistics.tolist()).score)


def _sacrebleu(tokenize: str, bleu: bool) -> dict[str, Any]:
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError:
        raise UserError(
            "evaluation.metrics: bleu and chrf need sacrebleu, which is not installed.",
            "pip install 'fastft[seq2seq]', or leave them out: evaluation: {metrics: [rouge]}",
        ) from None
    found: dict[str, Any] = {"chrf": CHRF()}
    if bleu:
        if tokenize not in BLEU.TOKENIZERS:
            known = ", ".join(BLEU.TOKENIZERS)
            raise UserError(f"evaluation.bleu_tokenize: sacrebleu knows no {tokenize!r}.", f"It knows: {known}.")
        try:
            found["bleu"] = BLEU(tokenize=tokenize)
        except (ImportError, RuntimeError) as e:  # MeCab and its dictionaries are packages of their own
            raise UserError(
                f"evaluation.bleu_tokenize: {tokenize}: {str(e).strip()}", "Install it, or choose char."
            ) from None
    return found


def _statistics(metric: Any, texts: list[str], references: list[str]) -> np.ndarray:
    """(rows, statistics) int64: what sacrebleu sums over a corpus. It has no public name, and is what its own bootstrap
    takes.
    """
    width = len(metric._extract_corpus_statistics(["a"], [["a"]])[0])
    if not texts:
        return np.zeros((0, width), np.int64)
    return np.array(metric._extract_corpus_statistics(texts, [references]), np.int64).reshape(-1, width)


def _signature(metric: Any) -> str:
    metric.corpus_score(["a"], [["a"]])  # the number of references is part of it
    return str(metric.get_signature())


# Letters and digits in a row are a word; of scripts without spaces each character is.
WORD = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]"
    r"|(?:(?![\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])[^\W_])+"
)


def rouge(text: str, reference: str) -> tuple[float, float, float]:
    """F1 of ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004, aclanthology.org/W04-1013), without stemming.

    Equal to the package rouge-score on ASCII text; that one drops all other letters.
    """
    found, wanted = WORD.findall(text.lower()), WORD.findall(reference.lower())
    grams = [_overlap(found, wanted, n) for n in (1, 2)]
    return grams[0], grams[1], _f1(_common(found, wanted), len(found), len(wanted))


def _overlap(found: list[str], wanted: list[str], n: int) -> float:
    grams = [Counter(zip(*(words[i:] for i in range(n)), strict=False)) for words in (found, wanted)]
    return _f1((grams[0] & grams[1]).total(), grams[0].total(), grams[1].total())


def _f1(common: int, found: int, wanted: int) -> float:
    return 2 * common / (found + wanted) if common else 0.0


def _common(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence, a bit per word of ``a`` (Hyyro 2004)."""
    places: dict[str, int] = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    full = (1 << len(a)) - 1
    row = full
    for word in b:
        match = row & places.get(word, 0)
        row = ((row + match) | (row - match)) & full
    return len(a) - row.bit_count()


NUMBER = re.compile(r"-?[$€£]?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def answer(text: str) -> float | None:
    """The number behind the last ``####``, or else the last one; None: there is none."""
    numbers = NUMBER.findall(text.rpartition("####")[2]) if "####" in text else NUMBER.findall(text)[-1:]
    return float(re.sub(r"[,$€£]", "", numbers[0])) if numbers else None
