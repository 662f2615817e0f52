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
    columns = lambda spread: gptq.rounded(weight, moment, spread, VALUES)
    found = cost(weight - numbers(best, columns), moment)
    assert found < 0.4 * scaled and found < 0.4 * nearest
    descended = numbers(best, lambda spread: gptq.descended(weight, moment, spread, VALUES, columns(spread)))
    assert cost(weight - descended, moment) < 0.97 * found
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


def test_no_weight_alone_could_be_better():
    """After sweeps enough: of all values, each has the one with the least error beside the others."""
    torch.manual_seed(6)
    weight, moment = torch.randn(3, 150), moment_of(150, 20)  # more than one block of columns
    scale = torch.full_like(weight, 2.5)
    found = torch.randint(0, 16, weight.shape)
    for _ in range(20):
        found = gptq.descended(weight, moment, scale, VALUES, found)
    h = moment + gptq.DAMPING * moment.diagonal().mean() * torch.eye(150)
    costs = lambda codes: (((weight - VALUES[codes] * 2.5) @ h) * (weight - VALUES[codes] * 2.5)).sum(1)
    least = costs(found)
    for j in range(150):
        for value in range(16):
            other = found.clone()
            other[:, j] = value
            assert (costs(other) >= least * (1 - 1e-5)).all()


def test_scales_are_fitted_to_their_indices():
    torch.manual_seed(7)
    weight, moment = torch.randn(6, 192), moment_of(192, 20)
    scale = gptq.scales(weight, moment, VALUES, 64)
    found = gptq.rounded(weight, moment, scale.repeat_interleave(64).view_as(weight), VALUES)
    h = moment + gptq.DAMPING * moment.diagonal().mean() * torch.eye(192)
    error = lambda scale: cost(weight - VALUES[found] * scale.repeat_interleave(64).view_as(weight), h)
    better = scale
    for _ in range(30):
        better = gptq.refitted(weight, moment, better, VALUES, found)
    assert error(better) < 0.99 * error(scale)
    for i in range(len(scale)):
        for change in (0.99, 1.01):
            other = better.clone()
            other[i] *= change
            assert error(other) > error(better)
    uneven = torch.randn(6, 100)  # blocks go on from row to row
    scale = gptq.scales(uneven, torch.eye(100), VALUES, 64)
    assert gptq.refitted(uneven, torch.eye(100), scale, VALUES, torch.zeros(6, 100).long()) is scale


def test_zeros_stay_zeros():
    weight, moment = torch.zeros(4, 64), torch.zeros(64, 64)
    values = torch.tensor([-1.0, 0.0, 1.0])
    scale = gptq.scales(weight, moment, values, 64)
    assert scale.isfinite().all()
    found = gptq.rounded(weight, moment, torch.zeros_like(weight), values)
    assert (found == 1).all()
    assert (gptq.descended(weight, moment, torch.zeros_like(weight), values, found) == 1).all()


def known_of(x, p, r=None) -> gptq.Inputs:
    return gptq.Inputs(len(x), x.T @ x / len(x), (p - x).T @ x / len(x), None if r is None else r.T @ x / len(x))


def test_what_layers_before_lost_is_made_good():
    """Inputs that are off by what other inputs tell, and a sum behind the output that is off: on other tokens, too."""
    torch.manual_seed(4)
    weight, off, behind = torch.randn(24, 32), 0.1 * torch.randn(32, 32), 0.5 * torch.randn(24, 32)

    def tokens(n: int) -> tuple:
        x = torch.randn(n, 32)
        return x, x + x @ off.T + 0.05 * torch.randn(n, 32), x @ behind.T + 0.2 * torch.randn(n, 24)

    halves = [known_of(*tokens(300)), known_of(*tokens(300))]
    found = gptq.recovered(weight, halves, gptq.joined(halves))
    x, p, r = tokens(1000)
    error = lambda w: (x @ w.T - p @ weight.T - r).square().mean().item()
    assert error(found) < 0.15 * error(weight)


def test_what_the_other_half_does_not_confirm_is_left():
    torch.manual_seed(5)
    weight = torch.randn(24, 64)
    noise = [known_of(x, x + 0.1 * torch.randn(80, 64)) for x in torch.randn(2, 80, 64)]  # tokens as few as inputs
    one = [noise[0], gptq.Inputs(0, torch.zeros(64, 64), torch.zeros(64, 64))]
    for halves in (noise, one, [gptq.Inputs(9, torch.eye(64))]):
        assert gptq.recovered(weight, halves, gptq.joined(halves)) is weight


def test_halves_count_by_their_tokens():
    few, many = gptq.Inputs(10, torch.eye(4), torch.ones(4, 4)), gptq.Inputs(30, 3 * torch.eye(4), torch.zeros(4, 4))
    assert gptq.joined([few, many]).tokens == 40
    torch.testing.assert_close(gptq.joined([few, many]).moment, 2.5 * torch.eye(4))
    torch.testing.assert_close(gptq.joined([few, many]).drift, torch.full((4, 4), 0.25))
    assert gptq.joined([few, many]).behind is None
