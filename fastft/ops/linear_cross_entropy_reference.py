"""Linear layer and softmax cross-entropy in plain PyTorch: what the chunked implementations are tested against.

All logits at once, in float32 (float64 for float64 weights), through torch's own autograd: any number of derivatives.
"""

import torch
from torch import Tensor

from fastft.ops import cross_entropy_reference


def logits(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    hidden2: Tensor | None,  # (N, R)
    weight2: Tensor | None,  # (V, R)
) -> Tensor:
    """hidden weight^T + bias + hidden2 weight2^T, (N, V)."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    result = hidden.to(dtype) @ weight.to(dtype).t()
    if bias is not None:
        result = result + bias.to(dtype)
    if hidden2 is not None and weight2 is not None:
        result = result + hidden2.to(dtype) @ weight2.to(dtype).t()
    return result


def loss_per_row(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    hidden2: Tensor | None,
    weight2: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    token_weight: Tensor | None,
    *options,
) -> Tensor:
    """Loss of each row, (N,). Ignored rows have loss 0 and no gradient, whatever their hidden states.

    options: ignore_index, label_smoothing, z_loss, softcap (0.0: none), logit_scale.
    """
    valid = (target != options[0])[:, None]
    # Blanked before anything is computed: a nan or inf there would come back as 0 * nan, in the weight's gradient too.
    hidden = torch.where(valid, hidden, 0.0)
    hidden2 = None if hidden2 is None else torch.where(valid, hidden2, 0.0)
    z = logits(hidden, weight, bias, hidden2, weight2)
    return cross_entropy_reference.loss_per_row(z, target, class_weight, token_weight, *options)
