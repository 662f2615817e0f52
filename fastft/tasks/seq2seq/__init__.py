"""Sequence to sequence: translation, summarizing, and whatever else turns one text into another, with encoder-decoder
models.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from pydantic import Field, SerializeAsAny

from fastft import rooms
from fastft.config import Config, Data, Section
from fastft.data.encoder import Learned
from fastft.data.orders.length_groups import LengthGroupsSettings
from fastft.data.split import Split
from fastft.errors import UserError
from fastft.inference.base import Predictor
from fastft.inference.forward import check_generates, settle
from fastft.lazy import torch
from fastft.models import load, short_attention
from fastft.objectives.base import Objective
from fastft.tasks._generated import GenerationEvaluation, Scores, TextMetric, names_of
from fastft.tasks._language import LanguageModelLoss, Perplexity
from fastft.tasks._text import TextTask, padded, rows_of
from fastft.tasks.base import IGNORE, Batch, Draw, Metric, ModelSpec
from fastft.tasks.seq2seq import languages
from fastft.tasks.seq2seq.encoder import PairEncoder
from fastft.tasks.seq2seq.metrics import PairMetrics
from fastft.tasks.seq2seq.objective import Seq2SeqObjective, sample_pairs, shift

log = logging.getLogger(__name__)


class Seq2SeqData(Data):
    """Pairs of texts."""

    source: str = Field("source", description="Column of the source text; translation.en is a key of a mapping in it.")
    target: str = Field("target", description="Column of the target text.")
    source_prefix: str | None = Field(
        None,
        description='Text before every source ("summarize: "); it is exported. Default: that of the model, if it has '
        "one.",
    )
    source_lang: str | None = Field(
        None, description="Language code of the sources, for tokenizers that write one (mBART, NLLB, M2M100)."
    )
    target_lang: str | None = Field(None, description="Language code of the targets.")
    max_target_length: int | None = Field(
        None, ge=2, description="Longest target in tokens; default: max_length, at most the model's limit."
    )
    order: SerializeAsAny[LengthGroupsSettings] = Field(
        LengthGroupsSettings(name="length_groups"), description=Data.model_fields["order"].description
    )

    def check(self, config: Config) -> None:
        if self.source == self.target:
            raise ValueError(f"data.source and data.target are one column, {self.source!r}")
        if self.truncation == "split":
            raise ValueError(
                "data.truncation: split makes no sense for seq2seq (no part of a target belongs to a part of its "
                "source): choose truncate, drop or error"
            )


class Seq2SeqEvaluation(GenerationEvaluation):
    """What evaluations generate, and how it is judged."""

    metrics: list[TextMetric] = Field(
        ["bleu", "chrf", "rouge"],
        description="Scores of what the model generates: bleu and chrf by sacrebleu, rouge (1, 2 and L), exact_match, "
        "answer (the last number). An empty list: nothing is generated.",
    )


class Seq2SeqOptions(Section):
    """How texts are generated; what is not given is as the model's generation config has it."""

    max_new_tokens: int | None = Field(None, ge=1, description="Longest output in tokens.")
    num_beams: int | None = Field(None, ge=1, description="Beams of the search; 1: greedy.")
    max_length: int | None = Field(
        None, ge=2, description="Longer sources are cut to so many tokens; default: the run's."
    )


@dataclass
class PairBatch(Batch):
    """Attributes
    ----------
    references : list of str or None
        The targets as text, of an evaluation set.
    """

    references: list[str] | None = None


@rooms.TASKS.register("seq2seq")
class Seq2Seq(TextTask):
    """Prepared columns: those of ``PairEncoder``. Learned: "bleu_tokenize", how BLEU cuts the targets' script."""

    Data = Seq2SeqData
    Loss = LanguageModelLoss
    Evaluation = Seq2SeqEvaluation
    Predict = Seq2SeqOptions
    code_version = 1

    @cached_property
    def tokenizer(self) -> Any:
        tokenizer = load.tokenizer(self.config.model)
        languages.set_codes(tokenizer, self.config.data.source_lang, self.config.data.target_lang)
        return tokenizer

    @property
    def prefix(self) -> str:
        """Before every source."""
        own = self.config.data.source_prefix
        return own if own is not None else getattr(self.model_config, "prefix", None) or ""

    @cached_property
    def max_length(self) -> int:
        return self._limited("max_length", "encoder", 1024)

    @cached_property
    def target_length(self) -> int:
        """Longest target in tokens."""
        return self._limited("max_target_length", "decoder", self.max_length)

    def _limited(self, key: str, part: str, default: int) -> int:
        limit, wanted = self.limit(part), getattr(self.config.data, key)
        if wanted is not None and limit is not None and wanted > limit:
            raise UserError(
                f"data.{key} = {wanted} is beyond the limit of {limit} positions of the model's {part}.",
                f"Set data.{key} to at most {limit}.",
            )
        return wanted or min(default, limit or default)

    def limit(self, part: str) -> int | None:
        """Positions of the model's "encoder" or "decoder"; None: they are relative, and there is no limit."""
        config = self.model_config
        own = getattr(config, part, None) or config  # of two models made one
        if hasattr(own, "relative_attention_num_buckets"):
            return None
        return getattr(config, f"max_{part}_position_embeddings", None) or load.length_limit(own)

    def processor_key(self) -> dict:
        start, codes = load.start_of_decoder(self.model_config), languages.codes(self.tokenizer)
        own = {"prefix": self.prefix, "max_target_length": self.target_length, "decoder_start": start}
        return {**super().processor_key(), **own, **({"languages": codes} if any(codes) else {})}

    def learned_key(self, learned: Learned | None) -> dict:
        return {"references": learned is not None}  # the script only says how evaluations count

    def encoder(self, learned: Learned | None) -> PairEncoder:
        return PairEncoder(self, references=learned is not None)

    def learned_of_model(self) -> Learned:
        return {"bleu_tokenize": getattr(self.model_config, "bleu_tokenize", "13a")}

    def describe(self, split: Split) -> list[str]:
        unknown, targets = split.data.meta["counts"].get("unknown_target_tokens", 0), split.totals["targets"]
        if unknown <= 0.01 * targets:
            return []
        share = f"{unknown / targets:.1%} of the targets' tokens are unknown to the tokenizer"
        return [f"warning: {share}: the model cannot learn to write them; take one for the targets' language"]

    def collate(self, split: Split, ids: np.ndarray, draw: Draw) -> PairBatch:
        sources = rows_of(split.data["source"], ids) or [np.array([self.tokenizer.pad_token_id])]
        targets = rows_of(split.data["target"], ids) or [np.array([IGNORE])]
        inputs = self.padded_inputs(sources)
        labels = padded(targets, IGNORE, width=self.width(targets))
        references = None
        if "reference" in split.data.columns:
            references = [row.tobytes().decode() for row in rows_of(split.data["reference"], ids)]
        real = int(split.lengths[ids].sum()) if len(ids) else 0
        computed = inputs["input_ids"].numel() + labels.size
        return PairBatch(inputs, torch.from_numpy(labels), len(ids), real, computed, references)

    def padded_inputs(self, sources: list[np.ndarray]) -> dict[str, torch.Tensor]:
        """``input_ids`` and ``attention_mask`` of the encoder, (len(sources), width) int64, padded on the right."""
        width = self.width(sources)
        tokens = padded(sources, self.tokenizer.pad_token_id, width=width)
        mask = padded([np.ones(len(row)) for row in sources], 0, width=width)
        return {"input_ids": torch.from_numpy(tokens), "attention_mask": torch.from_numpy(mask)}

    # -- model ---------------------------------------------------------------------------------------------------------

    def model(self, learned: Learned) -> ModelSpec:
        own = {"prefix": self.prefix} if self.prefix else {}
        return ModelSpec("AutoModelForSeq2SeqLM", overrides={**own, **learned})

    @classmethod
    def fits(cls, model_config: Any) -> bool:
        return bool(model_config.is_encoder_decoder) and load.is_of(model_config, "AutoModelForSeq2SeqLM")

    def check_model(self, forward: Callable, model: torch.nn.Module, device: torch.device) -> None:
        from fastft.models.isolation import check_causality
        from fastft.models.trial import SHORT, check_runs

        super().check_model(forward, model, device)
        longest = max(self.max_length, self.target_length)
        self.settled = {"attention": short_attention.take(model, self.config.model.attention, longest, device)}

        def inputs(width: int) -> dict[str, Any]:
            row = np.resize(np.arange(8), width)
            decoder = shift(model, torch.from_numpy(row[None]))
            return {**self.padded_inputs([row]), "decoder_input_ids": decoder, "use_cache": False}

        shorter = min(self.max_length, self.target_length)
        width = self.width([range(min(SHORT, shorter))])
        check_runs(forward, model, inputs, width, shorter, device)
        source = {name: inputs(width)[name].to(device) for name in ("input_ids", "attention_mask")}
        check_causality(forward, model, self.width([range(min(self.target_length, 16))]), device, source)

    def objective(self, forward: Callable, model: torch.nn.Module, device: torch.device, learned: Learned) -> Objective:
        sample = sample_pairs(model, min(self.max_length, self.target_length), device)
        objective = Seq2SeqObjective(self.config.loss, forward, model, sample)
        settings = self.settle(model)
        if self.config.evaluation.metrics:
            rows = [np.array(ids) for ids in self.encoder(None).source_ids(["a", "a a"])]
            check_generates(model, self.padded_inputs(rows), device)
        if self.config.data.eval and (signatures := self.scores(learned).signatures):
            objective.record["signatures"] = signatures
        objective.record["generation"] = settings
        return objective

    def settle(self, model: Any) -> dict[str, Any]:
        """Have the model's generation config begin and end a text as the targets do; what it says then."""
        config, codes = model.generation_config, languages.codes(self.tokenizer)
        (row,) = self.encoder(None).target_ids(["a"])
        start = int(shift(model, torch.tensor([row]))[0, 0])
        if config.decoder_start_token_id != start:
            log.info("generation starts with token %d, as the targets do", start)
            config.decoder_start_token_id = start
        if codes[1] is not None:  # written as the first token, or it is what decoding starts with
            written = row[0] in self.tokenizer.all_special_ids and row[0] != start
            config.forced_bos_token_id = row[0] if written else None
        ends = {config.eos_token_id} if not isinstance(config.eos_token_id, list) else set(config.eos_token_id)
        if not ends & set(row):
            config.eos_token_id = self.tokenizer.eos_token_id
        limit = self.limit("decoder")
        longest = min(self.target_length, (limit or 1 << 62) - 1)
        return settle(model, self.config.evaluation.generation, longest, limit)

    def scores(self, learned: Learned) -> Scores:
        """What generated texts are judged by. Raises UserError where that is not installed."""
        return Scores(self.config.evaluation, learned.get("bleu_tokenize", "13a"))

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (*Perplexity.names, *names_of(self.config.evaluation.metrics))

    def new_metrics(self, objective: Objective, learned: Learned) -> PairMetrics:
        assert isinstance(objective, Seq2SeqObjective)
        return PairMetrics(objective, self, self.scores(learned))

    def predictor(self, model: torch.nn.Module, learned: Learned, options: Seq2SeqOptions) -> Predictor:
        from fastft.tasks.seq2seq.writer import Writer

        self.settle(model)
        return Writer(self, model, options)
