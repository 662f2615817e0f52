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
