"""How much arithmetic a token takes in a model's matrix products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fastft.zero.parameters import whole_numel, whole_shape

FORMULA = (
    "2 FLOP a token for each parameter in a matrix product, forward; the same again backward for each from the first "
    "trained one on, and once more for each trained one. Of experts, those that a token goes to. Not counted: "
    "attention's own products, padding, recomputation."
)
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")  # what families call it in their configs


@dataclass(frozen=True)
class Work:
    """FLOP a token, by FORMULA."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        return self.forward + self.backward


def work(model: Any) -> Work:
    """Of a Hugging Face model, whole or in ZeRO-3's shards."""
    share, head = _share_of_experts(model.config), model.get_output_embeddings()
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    if head is not None:
        looked_up.discard(id(getattr(head, "weight", None)))  # tied: a table and a product
    used = passed = trained = 0.0
    begun = False
    for name, parameter in model.named_parameters():
        begun = begun or parameter.requires_grad
        if len(whole_shape(parameter)) < 2 or id(parameter) in looked_up:
            continue
        numel = whole_numel(parameter) * (share if ".experts." in name else 1.0)
        used += numel
        passed += numel * begun
        trained += numel * parameter.requires_grad
    return Work(2 * used, 2 * passed + 2 * trained)


def _share_of_experts(config: Any) -> float:
    text = config.get_text_config()
    experts = next((n for name in EXPERTS if (n := getattr(text, name, None))), None)
    return getattr(text, "num_experts_per_tok", experts) / experts if experts else 1.0
