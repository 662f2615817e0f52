import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fastft.data.pack import best_fit_decreasing


@given(st.lists(st.integers(1, 50), max_size=200))
@settings(max_examples=100, deadline=None)
def test_every_piece_once_and_nothing_overflows(lengths):
    bins = best_fit_decreasing(np.array(lengths, dtype=np.int64), 50)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in b) <= 50 for b in bins)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=60))
@settings(max_examples=60, deadline=None)
def test_same_bins_as_the_plain_algorithm(lengths):
    """Against best-fit decreasing written the slow way: same number of bins, same fill."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [i for i, room in enumerate(rooms) if room >= length]
        if fits:
            rooms[min(fits, key=lambda i: rooms[i])] -= length
        else:
            rooms.append(30 - length)
    bins = best_fit_decreasing(np.array(lengths), 30)
    assert sorted(rooms) == sorted(30 - sum(lengths[i] for i in b) for b in bins)


def test_a_large_plan_is_tight_and_fast():
    lengths = np.random.default_rng(0).integers(1, 1024, 50_000)
    bins = best_fit_decreasing(lengths, 1024)
    assert lengths.sum() / (1024 * len(bins)) > 0.99
