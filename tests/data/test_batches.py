import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastft.data import batches


@given(st.lists(st.integers(1, 300), min_size=1, max_size=80), st.sampled_from([1, 2, 4]), st.integers(1, 2000))
@settings(max_examples=80, deadline=None)
def test_every_sample_once_within_the_budget(lengths, ranks, micro_tokens):
    lengths = np.array(lengths)
    ids = np.arange(100, 100 + len(lengths))
    plan = batches.by_length(ids, lengths, ranks, micro_tokens)
    assert sorted(np.concatenate([part for micro in plan for part in micro])) == ids.tolist()
    for micro in plan:
        assert len(micro) == ranks
        for part in micro:
            if len(part) > 1:
                assert len(part) * max(lengths[part - 100]) <= micro_tokens


@given(st.lists(st.integers(1, 300), min_size=1, max_size=80), st.sampled_from([1, 2, 4]), st.integers(1, 2000))
@settings(max_examples=80, deadline=None)
def test_without_padding_parts_are_even(lengths, ranks, micro_tokens):
    lengths = np.array(lengths)
    ids = np.arange(100, 100 + len(lengths))
    plan = batches.by_tokens(ids, lengths, ranks, micro_tokens)
    assert sorted(np.concatenate([part for micro in plan for part in micro])) == ids.tolist()
    assert all(len(micro) == ranks for micro in plan)
    rows = [part for micro in plan for part in micro]
    for part in rows:
        assert lengths[part - 100].sum() <= micro_tokens or len(part) < 2
    sizes = np.concatenate([lengths[part - 100] for part in rows])
    assert (np.diff(sizes) >= 0).all()  # neighbours in length share a part
    if len(plan) == -(-lengths.sum() // (micro_tokens * ranks)):
        sums = [int(lengths[part - 100].sum()) for part in rows]
        assert max(sums) - min(sums) <= 2 * lengths.max()


def test_one_part_where_all_fits():
    plan = batches.by_tokens(np.arange(7), np.array([5, 9, 1, 3, 3, 8, 2]), 1, 31)
    assert [part.tolist() for micro in plan for part in micro] == [[2, 6, 3, 4, 0, 5, 1]]
    plan = batches.by_tokens(np.arange(7), np.array([5, 9, 1, 3, 3, 8, 2]), 1, 30)
    assert len(plan) == 2
    assert [
        [part.tolist() for part in micro] for micro in batches.by_tokens(np.arange(2), np.array([50, 60]), 2, 10)
    ] == [[[0], [1]]]


def test_a_gpu_splits_only_what_pays():
    """17 micro-steps of 128 uneven rows are cheap on 2 cores; a GPU waits for the host."""
    lengths = np.clip(np.random.default_rng(0).lognormal(4.1, 1, 128), 8, 500).astype(int)
    ids = np.arange(128)

    def steps(device: str, padded: bool) -> int:
        overhead = batches.overhead(50, 10_800_000, device)
        return len(batches.auto(ids, lengths, 1, 16384, padded, device, overhead))

    few, many = steps("cuda", True), steps("cpu", True)
    assert few <= 3 < 10 < many
    assert steps("cuda", False) == 1
    assert steps("cpu", False) > 4


def test_sorting_cuts_padding():
    lengths = np.random.default_rng(0).geometric(1 / 16, 32) + 3
    ids = np.arange(32)

    def padded(plan):
        return sum(len(part) * lengths[part].max() for micro in plan for part in micro)

    assert padded(batches.by_length(ids, lengths, 1, 10**6)) < 0.75 * padded(batches.fixed(ids, 1, 32))


@pytest.mark.parametrize("n, ranks, micro", [(32, 2, 4), (7, 2, 2), (1, 4, 8)])
def test_fixed_keeps_the_order(n, ranks, micro):
    plan = batches.fixed(np.arange(n), ranks, micro)
    assert np.concatenate([part for step in plan for part in step]).tolist() == list(range(n))
    assert all(len(step) == ranks for step in plan)
