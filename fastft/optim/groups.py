"""Parameter groups."""

import torch


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Trainable parameters in two named groups: matrices get weight decay; biases, norms and other vectors do not.

    Returns
    -------
    list of dict
        ``params``, ``weight_decay``, ``name``; empty groups are left out.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"name": "decay", "params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"name": "no_decay", "params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]
