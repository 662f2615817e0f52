"""What language modelling tasks share: the loss at the output head, and perplexity."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from fastft.config import Loss
from fastft.errors import UserError
from fastft.lazy import torch
from fastft.objectives.base import Objective
from fastft.tasks.base import IGNORE, Batch, Metric, SampleMetrics

if TYPE_CHECKING:
    from fastft.models.head import FusedHead
    from fastft.models.sequence_parallel import SequenceParallel

log = logging.getLogger(__name__)


class LanguageModelLoss(Loss):
    """The loss over a vocabulary."""

    implementation: Literal["auto", "linear_cross_entropy", "cross_entropy"] = Field(
        "auto",
        description="linear_cross_entropy goes from hidden states to the loss without holding all logits; "
        "cross_entropy takes the model's logits; auto: the former where a check on the model finds the same loss.",
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Share of the target spread over all classes.")
    z_loss: float = Field(0.0, ge=0, description="Weight of logsumexp^2 (keeps logits small).")


class LanguageModelObjective(Objective):
    """Cross-entropy of a batch's labels, taken at the model's head where that was found to be the same loss.

    Parameters
    ----------
    forward : callable
        The model, or the engine around it.
    sample : dict
        Inputs to compare the two on.
    sequences : SequenceParallel, optional
        What cuts the model's sequences over ranks: each then takes the loss of its part.
    """

    def __init__(
        self,
        settings: LanguageModelLoss,
        forward: Callable,
        model: torch.nn.Module,
        sample: dict,
        sequences: SequenceParallel | None = None,
    ):
        from fastft.models.head import install

        self.settings, self.sequences = settings, sequences
        self.aux_loss: torch.Tensor | None = None  # of the last forward
        self.head: FusedHead | None
        with nullcontext() if sequences is None else sequences.off():  # the head is the same for any part
            self.head, why = install(forward, model, sample, settings.implementation)
        chosen = "cross_entropy" if self.head is None else "linear_cross_entropy"
        log.info("loss by %s: %s", chosen, why)
        self.record = {"loss": {"implementation": chosen, "why": why}}
        config: Any = model.config
        self.balance = float(getattr(config, "router_aux_loss_coef", 0.0) or 0.0)
        if not getattr(config, "output_router_logits", False):
            self.balance = 0.0
        if self.balance and sequences is not None:
            raise UserError(
                f"parallel.sequence: {sequences.world}: {type(model).__name__} trains a balancing loss of its experts "
                "(output_router_logits), which is not the sum of those of parts of its sequences.",
                "Set parallel.sequence: 1, or output_router_logits: false in the model's config.json.",
            )
        if self.balance:
            log.info("the experts' balancing loss is trained too, %g times (router_aux_loss_coef)", self.balance)
            self.record["loss"]["router_aux_loss_coef"] = self.balance

    def compute_loss(self, model: Callable, batch: Batch, scale: torch.Tensor) -> torch.Tensor:
        smoothing = {"label_smoothing": self.settings.label_smoothing, "z_loss": self.settings.z_loss}
        loss = self._sum(model, batch, token_weight=self.token_weight(batch, scale), **smoothing)
        if self.balance and self.aux_loss is not None:
            # transformers adds it to the mean over a batch's targets: here it has the weight of those targets.
            loss = loss + self.balance * self.aux_loss * self.targets(batch) * scale
        return loss

    def token_weight(self, batch: Batch, scale: torch.Tensor) -> torch.Tensor:
        """What each label's loss is multiplied by: 0-dim, or of the labels' shape."""
        return scale

    def targets(self, batch: Batch) -> torch.Tensor:
        """0-dim: what the batch contributes to the step's denominator."""
        return (batch.labels != IGNORE).sum()

    def token_losses(self, model: Callable, batch: Batch) -> torch.Tensor:
        """Of the labels' shape, float32: each target's negative log-likelihood, without smoothing; 0 elsewhere."""
        losses = self._sum(model, batch, reduction="none")
        if self.sequences is not None:
            rows, length = batch.labels.shape
            losses = self.sequences.gather(losses.reshape(rows, -1), length)
        return losses.reshape(batch.labels.shape)

    def _sum(self, model: Callable, batch: Batch, **options: Any) -> torch.Tensor:
        """The loss of the batch; where sequences are cut over ranks, of this rank's part of it."""
        labels, options = batch.labels, {"ignore_index": IGNORE, "reduction": "sum", **options}
        if self.sequences is None:
            return self._loss(model, batch, labels, options)
        labels = self.sequences.cut(labels, IGNORE)
        if (weight := options.get("token_weight")) is not None and weight.ndim:
            options["token_weight"] = self.sequences.cut(weight)
        with self.sequences.parts():
            return self._loss(model, batch, labels, options)

    def _loss(self, model: Callable, batch: Batch, labels: torch.Tensor, options: dict) -> torch.Tensor:
        from fastft.ops import cross_entropy

        if self.head is not None:
            loss = self.head.loss(model, dict(batch.inputs), labels, **options)
            self.aux_loss = self.head.aux_loss
            return loss
        outputs = model(**batch.inputs)
        self.aux_loss = getattr(outputs, "aux_loss", None)
        logits = outputs.logits.flatten(0, 1)  # (B*T, V)
        options["inplace"] = logits.requires_grad
        if (weight := options.get("token_weight")) is not None and weight.ndim:
            options["token_weight"] = weight.flatten()
        return cross_entropy(logits, labels.flatten(), **options)


def sample_inputs(model: torch.nn.Module, length: int, device: torch.device) -> dict:
    """Two rows of random tokens, to try a model on."""
    from fastft.models.load import vocabulary_rows

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary_rows(model), (2, min(length, 16)), generator=generator)
    return {"input_ids": tokens.to(device)}


class Perplexity(SampleMetrics):
    """Mean negative log-likelihood per target token, and its exponential."""

    names = (Metric("loss", lower_is_better=True), Metric("perplexity", lower_is_better=True))

    def __init__(self, objective: Any):  # a LanguageModelObjective
        self.objective = objective
        self.losses: list[np.ndarray] = []
        self.targets: list[np.ndarray] = []

    def update(self, model: Callable, batch: Batch) -> None:
        losses = self.objective.token_losses(model, batch)
        if batch.samples == 0:
            return
        # Some attention wants all samples in one row.
        self.losses.append(losses.detach().reshape(batch.samples, -1).double().sum(1).cpu().numpy())
        self.targets.append((batch.labels != IGNORE).reshape(batch.samples, -1).sum(1).cpu().numpy())

    def columns(self) -> dict[str, np.ndarray]:
        if not self.losses:
            return {}
        return {"loss": np.concatenate(self.losses), "targets": np.concatenate(self.targets)}

    def numbers(self, columns: dict[str, np.ndarray]) -> dict[str, float]:
        tokens = int(columns["targets"].sum())
        loss = float(columns["loss"].sum()) / tokens if tokens else math.nan
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": tokens}
