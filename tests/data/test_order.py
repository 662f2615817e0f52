import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastft.data import order


@given(n=st.integers(1, 5000), seed=st.integers(0, 2**32), epoch=st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_it_is_a_permutation(n, seed, epoch):
    assert np.array_equal(np.sort(order.permute(n, seed, epoch, np.arange(n))), np.arange(n))


def test_pure_function_of_its_arguments():
    whole = order.permute(10_007, 3, 5, np.arange(10_007))
    assert np.array_equal(order.permute(10_007, 3, 5, np.array([17, 9_000])), whole[[17, 9_000]])
    assert not np.array_equal(order.permute(10_007, 3, 6, np.arange(10_007)), whole)
    assert not np.array_equal(order.permute(10_007, 4, 5, np.arange(10_007)), whole)
    # pinned: a change would reorder every run that is resumed
    assert order.permute(10, 17, 0, np.arange(10)).tolist() == PINNED


PINNED = [8, 1, 3, 4, 9, 0, 2, 5, 6, 7]


@pytest.mark.parametrize("n", [2, 10, 1000])
def test_ids_cross_epochs(n):
    ids = order.sample_ids(n, 1, n - 1, 2 * n + 1)
    assert len(ids) == n + 2
    assert np.array_equal(np.sort(ids[1 : n + 1]), np.arange(n))


def test_no_position_is_favoured():
    """Mean position of each id over 400 epochs is near the middle: 6 standard errors."""
    n, epochs = 50, 400
    where = np.array([np.argsort(order.permute(n, 9, e, np.arange(n))) for e in range(epochs)])
    error = np.abs(where.mean(0) - (n - 1) / 2) / (np.sqrt((n * n - 1) / 12 / epochs))
    assert error.max() < 6


def test_seek_is_constant_time_at_a_billion():
    order.sample_ids(10**9, 1, 0, 32)
    start = time.perf_counter()
    order.sample_ids(10**9, 1, 999_999_000, 999_999_032)
    assert time.perf_counter() - start < 0.05  # about 0.2 ms; the margin is for a busy machine


class Lengths:
    """A split of samples of these lengths."""

    def __init__(self, lengths):
        self.sizes = np.asarray(lengths)
        self.lengths = self.sizes.reshape(len(self.sizes), -1).sum(1)

    def __len__(self):
        return len(self.lengths)


@pytest.mark.parametrize(("n", "window", "block"), [(1000, 200, 8), (1003, 200, 8), (7, 200, 8), (50, 50, 50)])
def test_length_groups_take_every_sample_once_and_hold_little_padding(n, window, block):
    from fastft.data.orders.length_groups import LengthGroups, LengthGroupsSettings

    split = Lengths(np.random.default_rng(0).integers(1, 500, n))
    found = LengthGroups(LengthGroupsSettings(window=window), split, seed=3, batch=block)
    epochs = [found.samples(e * n, (e + 1) * n) for e in range(2)]
    for e, epoch in enumerate(epochs):
        assert np.array_equal(np.sort(epoch.ids), np.arange(n)) and (epoch.epochs == e).all()
    parts = [found.samples(start, min(start + 13, 2 * n)).ids for start in range(0, 2 * n, 13)]
    assert np.array_equal(np.concatenate(parts), np.concatenate([epoch.ids for epoch in epochs])), "a pure function"
    if n == 1000:
        lengths = split.lengths[epochs[0].ids].reshape(-1, block)
        assert lengths.sum() / (lengths.max(1).sum() * block) > 0.9
        tops = lengths.max(1)[: window // block]
        assert not np.array_equal(tops, np.sort(tops)), "blocks come in a random order"
        assert not np.array_equal(epochs[0].ids, epochs[1].ids)


@pytest.mark.parametrize("n", [10, 33, 70])
def test_few_samples_come_in_no_order_of_length(n):
    from fastft.data.orders.length_groups import LengthGroups, LengthGroupsSettings

    split = Lengths(np.arange(n) + 1)
    found = LengthGroups(LengthGroupsSettings(), split, seed=3, batch=32)
    lengths = [split.lengths[found.samples(e * n, (e + 1) * n).ids] for e in range(3)]
    assert all((np.diff(one) < 0).sum() > n // 4 for one in lengths)


@pytest.mark.parametrize("block", [8, 32])
def test_pairs_are_grouped_by_both_lengths(block):
    """Less padding than sorted by their sum, or by either length, whichever is less."""
    from fastft.data.orders.length_groups import by_size

    rng = np.random.default_rng(0)
    source = rng.integers(5, 60, 1003)
    for target in (rng.integers(5, 60, 1003), source + rng.integers(0, 20, 1003), rng.integers(5, 9, 1003)):
        sizes = np.stack([source, target], 1)

        def padded(order):
            cuts = [sizes[order[at : at + block]] for at in range(0, len(order), block)]  # noqa: B023
            return sum(len(cut) * cut.max(0).sum() for cut in cuts)

        found = by_size(sizes, block)
        assert np.array_equal(np.sort(found), np.arange(1003))
        assert padded(found) <= min(padded(np.argsort(key, kind="stable")) for key in (sizes.sum(1), source, target))
    assert np.array_equal(by_size(sizes[:, :1], block), by_size(sizes[:, 0], block))


def test_steps_of_a_window_sort_it_once(monkeypatch):
    from fastft.data.orders.length_groups import LengthGroups, LengthGroupsSettings

    found = LengthGroups(LengthGroupsSettings(window=64), Lengths(np.arange(200) + 1), seed=3, batch=8)
    made, sort = [], LengthGroups._made
    monkeypatch.setattr(LengthGroups, "_made", lambda *place: made.append(place[1:3]) or sort(*place))
    for start in range(0, 400, 8):
        found.samples(start, start + 8)
    assert len(made) == len(set(made)) == 8 and len(found.windows) <= 2
