"""Rounding by second moments: what it makes of outputs, beside rounding each weight by itself."""

import pytest
import torch

from fastft.models import gptq

VALUES = torch.linspace(-1, 1, 16).sign() * torch.linspace(-1, 1, 16).abs() ** 1.5


def moment_of(inputs: int, rank: int) -> torch.Tensor:
    """Of inputs that hang together, some far larger than others."""
    torch.manual_seed(0)
    x = torch.randn(4 * inputs, rank) @ torch.randn(rank, inputs) + 0.3 * torch.randn(4 * inputs, inputs)
    x *= torch.linspace(0.2, 3, inputs)
    return x.T @ x / len(x)


def cost(error: torch.Tensor, moment: torch.Tensor) -> float:
    return ((error @ moment) * error).sum().item()


@pytest.mark.parametrize("shape", [(48, 192), (30, 100)], ids=str)  # the second's blocks go on from row to row
def test_outputs_change_less_than_by_the_nearest_values(shape):
    torch.manual_seed(1)
    weight, moment = torch.randn(shape), moment_of(shape[1], 24)
    whole = gptq.in_blocks(weight, 64).abs().amax(1)

    def numbers(scale, codes=None):
        spread = scale.repeat_interleave(64)[: weight.numel()].view(shape)
        codes = gptq.nearest(weight / spread, VALUES) if codes is None else codes(spread)
        assert codes.min() >= 0 and codes.max() <= 15
        return VALUES[codes] * spread

    best = gptq.scales(weight, moment, VALUES, 64)
    assert (best <= whole).all()
    nearest, scaled = cost(weight - numbers(whole), moment), cost(weight - numbers(best), moment)
    rounded = numbers(best, lambda spread: gptq.rounded(weight, moment, spread, VALUES))
    found = cost(weight - rounded, moment)
    assert found < 0.4 * scaled and found < 0.4 * nearest
    diagonal = moment.diagonal()
    assert ((numbers(best) - weight) ** 2 * diagonal).sum() < ((numbers(whole) - weight) ** 2 * diagonal).sum()


def test_a_column_at_a_time():
    """The definition: each column's error is taken out of the rest by the inverse of what is left of H."""
    torch.manual_seed(2)
    weight, moment = torch.randn(5, 40, dtype=torch.float64), moment_of(40, 8).double()
    scale = torch.full_like(weight, 0.9)
    found = gptq.rounded(weight, moment, scale, VALUES.double())
    order = moment.diagonal().argsort(descending=True, stable=True).tolist()
    h = moment + gptq.DAMPING * moment.diagonal().mean() * torch.eye(40, dtype=torch.float64)
    rest, wanted = weight.clone(), torch.empty_like(found)
    while order:
        inverse = torch.linalg.inv(h[order][:, order])
        column = order[0]
        wanted[:, column] = gptq.nearest(rest[:, column] / 0.9, VALUES.double())
        error = rest[:, column] - VALUES.double()[wanted[:, column]] * 0.9
        rest[:, order] -= error[:, None] * inverse[0] / inverse[0, 0]
        order = order[1:]
    assert torch.equal(found, wanted)


def test_without_ties_between_inputs_each_weight_is_rounded_by_itself():
    torch.manual_seed(3)
    weight = torch.randn(6, 64)
    scale = torch.full_like(weight, weight.abs().max().item())
    assert torch.equal(gptq.rounded(weight, torch.eye(64), scale, VALUES), gptq.nearest(weight / scale, VALUES))


def test_zeros_stay_zeros():
    weight, moment = torch.zeros(4, 64), torch.zeros(64, 64)
    values = torch.tensor([-1.0, 0.0, 1.0])
    scale = gptq.scales(weight, moment, values, 64)
    assert scale.isfinite().all()
    assert (gptq.rounded(weight, moment, torch.zeros_like(weight), values) == 1).all()
