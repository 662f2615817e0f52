"""Proof, on the model at hand, that packed documents do not see each other, and that no token sees those after it.

Restarting position ids are all that fastft passes; whether a model's attention honours them depends on its code, its
attention backend and the transformers version (state-space layers never do). So it is measured before training, not
assumed.
"""

import inspect
from collections.abc import Callable

import torch

from fastft.errors import UserError
from fastft.models.load import vocabulary_rows, written_rows

HINT = "Set data.packing: none for this model (one document per row), or choose another model.attention."


def check_isolation(forward: Callable, model: torch.nn.Module, length: int, device: torch.device, flat: bool) -> float:
    """Compare logits of two random documents packed in one row with those of each alone.

    Parameters
    ----------
    forward : callable
        The model, or the engine around it, on ``device``.
    length : int
        Tokens in the packed row, at least 2.
    flat : bool
        Whether training flattens the batch into one row (flash attention).

    Returns
    -------
    float
        Largest difference, relative to the largest logit.

    Raises
    ------
    UserError
        The model takes no position ids, or the logits differ by more than rounding explains.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise UserError(
            f"{type(model).__name__} takes no position_ids, so documents in one sequence cannot be kept apart.", HINT
        )
    was_training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary_rows(model), (1 if flat else 2, length), generator=generator).to(device)
    cut = length // 2 - (length > 3)  # uneven parts
    positions = torch.cat([torch.arange(cut), torch.arange(length - cut)]).to(device).expand_as(tokens)

    def logits(ids: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
        return forward(input_ids=ids, position_ids=pos, use_cache=False).logits.float()

    with torch.no_grad():
        packed = logits(tokens, positions)
        alone = torch.cat(
            [logits(tokens[:, :cut], positions[:, :cut]), logits(tokens[:, cut:], positions[:, cut:])], dim=1
        )
    model.train(was_training)
    return refuse_leak(model, packed, alone, HINT)


def refuse_leak(model: torch.nn.Module, packed: torch.Tensor, alone: torch.Tensor, hint: str) -> float:
    """The largest difference of logits of packed documents from those of each alone, relative to the largest logit.

    Raises UserError when it is more than rounding explains.
    """
    difference = ((packed - alone).abs().max() / alone.abs().max().clamp_min(1e-6)).item()
    # fp32: sums in another order; bf16: a few roundings per layer. A leaking document moves logits by tenths.
    allowed = 1e-4 if next(model.parameters()).dtype == torch.float32 else 5e-2
    if not difference <= allowed:
        raise UserError(
            f"{type(model).__name__}: logits of packed documents differ from unpacked ones by {difference:.2g} of the "
            f"largest (allowed {allowed:.0e}): documents in one sequence see each other.",
            hint,
        )
    return difference


def check_causality(
    forward: Callable,
    model: torch.nn.Module,
    length: int,
    device: torch.device,
    source: dict[str, torch.Tensor] | None = None,
) -> None:
    """Change the second half of a row of random tokens: the logits of the first half must stay.

    ``source``: of an encoder-decoder model, the encoder's inputs; the row is then the decoder's.

    Raises UserError when they do not: such a model (an encoder with a language modeling head, whose config does not say
    is_decoder) would read the answer, and its loss fall to 0.
    """
    from fastft.models.trial import trial

    rows = vocabulary_rows(model) if source is None else written_rows(model)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(rows, (1, length), generator=generator)
    other, half = tokens.clone(), max(length // 2, 1)
    other[:, half:] = (
        other[:, half:] + 1 + torch.randint(max(rows - 1, 1), (1, length - half), generator=generator)
    ) % rows

    def logits(ids: torch.Tensor) -> torch.Tensor:
        with trial(model, device):  # the same random numbers for both: some models hash by them
            own = {"input_ids": ids.to(device)} if source is None else {**source, "decoder_input_ids": ids.to(device)}
            return forward(**own, use_cache=False).logits[:, :half].float()

    before, after = logits(tokens), logits(other)
    difference = ((before - after).abs().max() / before.abs().max().clamp_min(1e-6)).item()
    if not difference <= (1e-4 if next(model.parameters()).dtype == torch.float32 else 5e-2):
        raise UserError(
            f"{type(model).__name__} is not causal: its logits change by {difference:.2g} of the largest when tokens "
            "after them change, so it would see what it has to predict.",
            "Set is_decoder: true in the model's config.json, or choose task: masked_lm, which trains encoders.",
        )
