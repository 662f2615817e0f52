"""Parameters that a token uses, and those that only wait for others: mixtures of experts."""

from __future__ import annotations

from typing import Any

from fastft.errors import UserError

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")  # as configs call their number
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "num_selected_experts")  # of a token


def active(model: Any) -> int | None:
    """Parameters that a token uses, of a mixture of experts; None: all of them.

    UserError when it has experts, and its config does not say how many of them a token uses.
    """
    config = model.config.get_text_config()
    count, chosen = (next((v for n in names if (v := getattr(config, n, None))), None) for names in (EXPERTS, CHOSEN))
    held = sum(p.numel() for name, p in model.named_parameters() if "experts." in name and "shared" not in name)
    if not held:
        return None
    if not isinstance(count, int) or not isinstance(chosen, int):
        raise UserError(
            f"{type(model).__name__} has experts, and its config.json does not say how many a token uses.",
            "Give --params instead.",
        )
    return round(sum(p.numel() for p in model.parameters()) - held * (1 - chosen / count))
