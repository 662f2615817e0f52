"""Supervised fine-tuning on instructions: conversations, of which the answers are learned."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator

from fastft import rooms
from fastft.config import Config, Data
from fastft.data.encoder import Counts, Example, Learned
from fastft.data.formats import Record
from fastft.data.split import Split
from fastft.data.store import Store
from fastft.errors import did_you_mean
from fastft.inference.base import Predictor
from fastft.inference.forward import check_generates, mended, settle
from fastft.lazy import torch
from fastft.models import load
from fastft.objectives.base import Objective
from fastft.tasks._decoder import DecoderTask, GenerationOptions
from fastft.tasks._documents import pack, pieces, write_packs
from fastft.tasks._generated import GenerationEvaluation, Scores, names_of
from fastft.tasks._language import LanguageModelObjective, sample_inputs
from fastft.tasks._text import TextEncoder
from fastft.tasks.base import IGNORE, Batch, Draw, Metric
from fastft.tasks.sft import conversations
from fastft.tasks.sft.generated import LONGEST, Asked, ChatMetrics, asked
from fastft.tasks.sft.rendering import ChatTemplate, Plain, Sample

log = logging.getLogger(__name__)

# Arguments of apply_chat_template that are not the template's.
RESERVED = {
    "conversation",
    "messages",
    "tools",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
}


class SFTData(Data):
    """Conversations."""

    columns: dict[str, str] = Field(
        {}, description="Names of columns, where they are others: {prompt: question, completion: answer}."
    )
    train_on: Literal["all", "last"] = Field("all", description="Which answers are learned.")
    chat_template: str | None = Field(
        None,
        description="File with a chat template (Jinja), or its text, instead of the tokenizer's; it is kept in the "
        "run's configuration, and exported.",
    )
    template_options: dict[str, Any] = Field(
        {}, description="What the chat template gets beside the messages: {enable_thinking: false}."
    )
    plain: bool = Field(
        False, description="No chat template: rows of prompt and completion, one behind the other, and the end token."
    )
    packing: Literal["isolated", "none"] = Field(
        "isolated", description="Fill sequences with whole conversations that cannot see each other."
    )

    @field_validator("chat_template")
    @classmethod
    def _read(cls, value: str | None) -> str | None:
        """The text, so that a run knows its template whatever becomes of the file."""
        if value is None or "{{" in value or "{%" in value:
            return value
        path = Path(os.path.expandvars(value)).expanduser()
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise ValueError(f"data.chat_template: {value}: {e.strerror if isinstance(e, OSError) else e}") from None
        if "{{" not in text and "{%" not in text:
            raise ValueError(f"data.chat_template: {value} holds no Jinja template")
        return text

    def check(self, config: Config) -> None:
        if reserved := sorted(RESERVED & set(self.template_options)):
            raise ValueError(
                f"data.template_options: {reserved[0]!r} is no option of a template: fastft sets it itself"
            )
        if unknown := sorted(set(self.columns) - set(conversations.KNOWN)):
            hint = did_you_mean(unknown[0], conversations.KNOWN)
            raise ValueError(f"data.columns: {unknown[0]!r} is no column of a conversation. {hint}")
        if self.plain and (self.chat_template or self.template_options):
            raise ValueError("data.plain and data.chat_template, data.template_options exclude each other")
        if self.truncation == "split":
            raise ValueError(
                "data.truncation: split makes no sense for sft (the rest of an answer would have no question): choose "
                "truncate, drop or error"
            )


class ChatEvaluation(GenerationEvaluation):
    """What evaluations generate, and how it is judged."""

    def check(self, config: Config) -> None:
        super().check(config)
        if "max_length" in self.generation:
            raise ValueError("evaluation.generation: max_length counts the prompt, too: give max_new_tokens")


@dataclass
class WeightedBatch(Batch):
    """A batch whose targets count differently.

    Attributes
    ----------
    weights : Tensor or None
        (rows, width) float32, of each label; None: all count 1.
    asked : list of (int, Asked)
        Where evaluations generate: the last answer of each conversation, with its sequence's place in the batch.
    """

    weights: torch.Tensor | None = None
    asked: list[tuple[int, Asked]] = field(default_factory=list)


@rooms.TASKS.register("sft")
class SFT(DecoderTask):
    """Prepared columns: those of ``ConversationEncoder``; a document is a conversation, or a part that ends in an
    answer."""

    Data = SFTData
    Evaluation = ChatEvaluation
    code_version = 1

    @cached_property
    def tokenizer(self) -> Any:
        tokenizer = load.tokenizer(self.config.model)
        if (text := self.config.data.chat_template) is not None:
            tokenizer.chat_template = text
        return tokenizer

    @cached_property
    def template(self) -> ChatTemplate | Plain:
        data = self.config.data
        return Plain(self.tokenizer) if data.plain else ChatTemplate(self.tokenizer, data.template_options)

    @cached_property
    def end_of_turn(self) -> int | None:
        """The token that ends an answer; None: the template writes none."""
        return self.template.end_of_turn()

    def processor_key(self) -> dict:
        written = repr(self.tokenizer.chat_template).encode()
        return {**super().processor_key(), "chat_template": hashlib.sha256(written).hexdigest()}

    def encoder(self, learned: Learned | None) -> ConversationEncoder:
        return ConversationEncoder(self)

    def describe(self, split: Split) -> list[str]:
        tokens, targets = split.totals["tokens"], split.totals["targets"]
        said = [f"{split.data.meta['documents']:,} conversations; {targets / tokens:.1%} of their tokens are learned"]
        if self.end_of_turn is None:
            said.append(
                "warning: the chat template ends an answer with no token of its own: the model does not learn to stop"
            )
        return said

    def collate(self, split: Split, ids: np.ndarray, draw: Draw) -> WeightedBatch:
        batch = super().collate(split, ids, draw)
        weights = torch.zeros(batch.labels.numel(), dtype=torch.float32)
        width = batch.labels.numel() // max(len(ids), 1)  # of a row, before flash attention's rows become one
        answers: list[tuple[int, Asked]] = []
        for r, sample in enumerate(ids):
            at = r * width
            pieces_of_row = pack(split.data, int(sample), "weights")
            if self.config.evaluation.metrics:
                parts = (self.documents(split, int(sample)), pack(split.data, int(sample)), pieces_of_row)
                found = [asked(*part, self.end_of_turn) for part in zip(*parts, strict=True)]
                answers += [(r, one) for one in found if one is not None]
            for piece in pieces_of_row:
                weights[at : at + len(piece) - 1] = torch.from_numpy(np.array(piece[1:], np.float32))
                at += len(piece)
        weights = weights.view_as(batch.labels)
        labels = batch.labels.masked_fill(weights == 0, IGNORE)
        even = bool(((weights == 0) | (weights == 1)).all())
        counts = (batch.samples, batch.tokens, batch.padded)
        return WeightedBatch(batch.inputs, labels, *counts, weights=None if even else weights, asked=answers)

    @classmethod
    def fits(cls, model_config: Any) -> bool:
        return False  # nothing in a config tells it from causal_lm, but what an export writes there

    def objective(self, forward: Callable, model: torch.nn.Module, device: torch.device, learned: Learned) -> Objective:
        _stop_at(model, self.end_of_turn)
        sample = {**sample_inputs(model, self.max_length, device), "use_cache": False}
        objective = WeightedObjective(self.config.loss, forward, model, sample, self.sequences)
        evaluation = self.config.evaluation
        if evaluation.metrics:
            own: Any = model.generation_config
            own.max_length = None  # it counts the prompt, which may be longer
            settings = settle(model, evaluation.generation, min(LONGEST, self.max_length))
            ids = sample["input_ids"]
            check_generates(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, device)
            objective.record |= {"generation": settings, "signatures": Scores(evaluation).signatures}
        return objective

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (*super().metrics, *names_of(self.config.evaluation.metrics))

    def new_metrics(self, objective: Objective, learned: Learned) -> ChatMetrics:
        return ChatMetrics(objective, self.tokenizer, Scores(self.config.evaluation), self.config)

    def predictor(self, model: torch.nn.Module, learned: Learned, options: GenerationOptions) -> Predictor:
        from fastft.tasks.sft.chat import Chat

        _stop_at(model, self.end_of_turn)
        data = self.config.data
        columns = {"prompt": "prompt", **data.columns} if data.plain else data.columns  # of rows as they were trained
        return Chat(model, self.template, columns, options.max_new_tokens, options.temperature)


class WeightedObjective(LanguageModelObjective):
    """Cross-entropy of the answers' tokens, each by its weight."""

    def token_weight(self, batch: Any, scale: torch.Tensor) -> torch.Tensor:
        return scale if batch.weights is None else scale * batch.weights

    def targets(self, batch: Any) -> torch.Tensor:
        return super().targets(batch) if batch.weights is None else batch.weights.sum()


class ConversationEncoder(TextEncoder):
    """Conversations to tokens and their weights, then to packs.

    Columns: ``tokens`` and ``weights`` (a conversation per row; 0: not learned), and those of ``write_packs``.
    """

    columns = {"tokens": "ragged:<i4", "weights": "ragged:<f4"}
    choices = ("truncate", "drop")

    def __init__(self, task: SFT):
        super().__init__(task, [])
        self.data, self.template = task.config.data, task.template

    def accepts(self, where: str, record: Record) -> bool:
        return bool(record)

    def encode(self, rows: list[tuple[str, Record]], counts: Counts) -> list[Example]:
        examples = []
        for where, record in rows:
            conversation = conversations.read(where, record, self.data.columns, self.data.train_on)
            if not conversation.trained:
                counts.add("without_targets")
                continue
            samples = self.template.samples(where, conversation)
            counts.add("cut_into_answers", len(samples) > 1)
            found = [self._fitted(where, sample, counts) for sample in samples]
            examples += [example for example in found if example is not None]
        return examples

    def _fitted(self, where: str, sample: Sample, counts: Counts) -> Example | None:
        """The sample, or what the truncation policy makes of it; None: not used."""
        tokens, weights = sample.tokens, sample.weights
        if len(tokens) > self.max_length:
            counts.too_long(where, len(tokens))
            if self.truncation == "drop":
                counts.dropped += 1
                return None
            counts.truncated += 1
            tokens, weights = tokens[: self.max_length], weights[: self.max_length]
        targets = float(weights[1:].sum())  # nothing predicts the first token
        if targets == 0:
            counts.add("without_targets")
            return None
        return Example(where, {"tokens": tokens, "weights": weights}, targets)

    def settle(self, counts: Counts) -> None:
        super().settle(counts)
        if more := counts.more.get("without_targets"):
            log.warning(
                "%d conversations are left out: nothing of an answer is in their first tokens, or no answer "
                "has a weight",
                more,
            )

    def finish(self, store: Store, learned: Learned | None) -> dict:
        lengths = store.ragged("tokens").lengths()
        parts = pieces(lengths, self.max_length, "truncate", overlap=0)
        targets = np.array([targets for _, targets in store.extras], np.float64)
        if (targets % 1 == 0).all():  # no weights but 0 and 1: counted as tokens are
            targets = targets.astype(np.int64)
        groups, packed = np.searchsorted(parts[0], store.starts), self.data.packing == "isolated"
        totals = write_packs(store, parts, self.max_length, packed, 0, targets, groups)
        return {"totals": totals, "documents": len(lengths)}


def _stop_at(model: Any, token: int | None) -> None:
    """Have generation, here and from the exported folder, stop at the token that ends an answer, too."""
    settings = getattr(model, "generation_config", None)
    if settings is None or token is None:
        return
    known = settings.eos_token_id
    ends = known if isinstance(known, list) else [] if known is None else [known]
    if token not in ends:
        mended(settings).eos_token_id = [token, *ends]
