"""sum_squares on every backend against float64 truth."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastft.ops import BackendError, sum_squares
from tests.ops.common import BACKENDS, DEVICE, NATIVE_BUILT, seeded

SIZES = [0, 1, 2, 15, 16, 17, 63, 64, 65, 1003, 32768, 32769, 70001]


def truth_of(tensors) -> torch.Tensor:
    return torch.stack([t.double().square().sum() for t in tensors]).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_float64(backend, dtype):
    """Products of float32 and bfloat16 are exact in float64, so only the order of the sum may show."""
    tensors = [torch.randn(n, generator=seeded(n)).to(DEVICE, dtype) for n in SIZES]
    got = sum_squares(tensors, backend=backend)
    assert got.dtype == torch.float64 and got.shape == () and got.device == tensors[0].device
    assert abs(got - truth_of(tensors)) <= 1e-13 * truth_of(tensors)
    assert torch.equal(got, sum_squares(tensors, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_trap_squares_beyond_float32(backend):
    """1e30 squared is no float32, and 1e-30 squared is 0 there."""
    tensors = [torch.full((100,), 1e30, device=DEVICE), torch.full((3,), 3e38, device=DEVICE, dtype=torch.bfloat16)]
    assert torch.isclose(sum_squares(tensors, backend=backend), truth_of(tensors), rtol=1e-13)
    small = [torch.full((100,), 1e-30, device=DEVICE)]
    assert sum_squares(small, backend=backend) > 0 and torch.isclose(
        sum_squares(small, backend=backend), truth_of(small), rtol=1e-13, atol=0
    )


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_trap_one_bad_element_is_seen_anywhere(backend, dtype, bad):
    for at in (0, 30, 997, 1002):
        x = torch.randn(1003, generator=seeded(at)).to(DEVICE, dtype)
        x[at] = bad
        assert not sum_squares([torch.ones(5, device=DEVICE, dtype=dtype), x], backend=backend).isfinite()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40), st.booleans(), st.booleans()), max_size=6),
    st.integers(0, 2**32),
)
def test_property_any_shapes_strides_and_mixes(shapes, seed):
    tensors = []
    for rows, columns, half, transposed in shapes:
        x = torch.randn(rows, 2 * columns, generator=seeded(seed, rows, columns))[:, ::2].to(
            torch.bfloat16 if half else torch.float32
        )
        tensors.append(x.t() if transposed else x)
    expected = truth_of(tensors) if tensors else torch.zeros((), dtype=torch.float64)
    assert torch.isclose(sum_squares(tensors), expected, rtol=1e-13, atol=0)


@pytest.mark.skipif(not NATIVE_BUILT, reason="fastft._C is not built")
def test_threads_do_not_change_the_bits():
    x = torch.randn(1_000_003, generator=seeded(1))
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(sum_squares([x, x[:77]], backend="native"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_opcheck_and_compile():
    tensors = [torch.randn(33), torch.randn(4, 5)]
    torch.library.opcheck(torch.ops.fastft.sum_squares.default, (tensors, "reference"))
    compiled = torch.compile(lambda a, b: sum_squares([a, b]) * 2, fullgraph=True, backend="aot_eager")
    assert torch.isclose(compiled(*tensors), 2 * truth_of(tensors), rtol=1e-13)


def test_refuses():
    with pytest.raises(ValueError, match=r"not torch.int64"):
        sum_squares([torch.arange(3)])
    with pytest.raises(ValueError, match="of one device"):
        sum_squares([torch.ones(2), torch.ones(2, device="meta")])
    with pytest.raises(BackendError, match="float64"):
        sum_squares([torch.ones(2, dtype=torch.float64)], backend="native")
    assert sum_squares([torch.ones(2, dtype=torch.float64)]) == 2 and sum_squares([]) == 0


def test_a_sparse_gradient_counts_by_its_values():
    table = torch.nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1, 1])).sum().backward()
    assert float(sum_squares([table.weight.grad, torch.ones(2)])) == 3 * 2**2 + 2
    with pytest.raises(ValueError, match="sparse_csr"):
        sum_squares([torch.eye(3).to_sparse_csr()])
