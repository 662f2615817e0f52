"""What the tests of all ops share."""

import importlib.util

import pytest
import torch

NATIVE_BUILT = importlib.util.find_spec("fastft._C") is not None
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

NATIVE = pytest.param("native", marks=pytest.mark.skipif(not NATIVE_BUILT, reason="fastft._C is not built"))
TRITON = pytest.param("triton", marks=pytest.mark.skipif(not TRITON_INSTALLED, reason="triton is not installed"))
BACKENDS = [NATIVE, TRITON, "reference"]


def seeded(*numbers: int) -> torch.Generator:
    """A generator of its own for each case, so that cases do not depend on their order."""
    seed = 17
    for number in numbers:
        seed = seed * 1_000_003 + number
    return torch.Generator().manual_seed(seed % 2**63)


def rounded(x: torch.Tensor, dtype: torch.dtype, backend: str) -> torch.Tensor:
    """x in dtype, rounded as this backend can at best: Triton's
    interpreter (3.9) truncates to bfloat16 where a GPU rounds.
    """
    if dtype == torch.bfloat16 and backend == "triton" and DEVICE == "cpu":
        return (x.float().view(torch.int32) & -65536).view(torch.float32).to(dtype)
    return x.to(dtype)


def assert_as_good_as(
    ours: torch.Tensor, baseline: torch.Tensor, truth: torch.Tensor, what: str, *, terms: float = 0.0
) -> None:
    """quack's rule: our largest error against float64 is at most twice the baseline's in the same dtype,
    plus two float32 units.

    terms: size of the terms that make up the result, where they may cancel.
    """
    assert ours.dtype == baseline.dtype, f"{what}: {ours.dtype} instead of {baseline.dtype}"
    assert ours.shape == truth.shape, f"{what}: {tuple(ours.shape)} instead of {tuple(truth.shape)}"
    assert torch.isfinite(truth).all(), f"{what}: the truth itself is not finite"
    error = (ours.double() - truth).abs().max().item()
    allowed = 2 * (baseline.double() - truth).abs().max().item() + 2.5e-7 * max(truth.abs().max().item(), terms)
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


def assert_rounded_once(
    ours: torch.Tensor, truth: torch.Tensor, what: str, backend: str, *, terms: float = 0.0
) -> None:
    """Every element is the truth rounded to its dtype, up to float32 noise:
    half a unit in the last place, and 2 % of one more.
    """
    truncates = ours.dtype == torch.bfloat16 and backend == "triton" and DEVICE == "cpu"
    unit = torch.finfo(ours.dtype).eps * (2 if truncates else 1)
    noise = 4e-7 * truth.abs() + 3e-7 * max(truth.abs().max().item(), terms)
    excess = (ours.double() - truth).abs() - 0.52 * unit * truth.abs() - noise
    assert (excess <= 0).all(), f"{what}: off by {excess.max().item():.3g} more than one rounding"
