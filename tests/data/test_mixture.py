"""Mixtures: shares of the targets after any number of samples, how often sources are read, stages, any position."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastft.config.mixture import Share, Shares
from fastft.data.mixture import Mixture
from fastft.errors import UserError


class Sources:
    """A split of several sources, with the targets of their samples."""

    def __init__(self, *targets):
        self.targets = np.concatenate(targets).astype(np.float64)
        self.starts = np.cumsum([0, *map(len, targets)])

    def __len__(self):
        return len(self.targets)

    def sample_starts(self):
        return self.starts


def sources(*sizes, seed=0, longest=100) -> Sources:
    rng = np.random.default_rng(seed)
    return Sources(*(rng.integers(1, longest + 1, n) for n in sizes))


def shares(weights=None, epochs=None, stages=()) -> Shares:
    n = len(weights or epochs)
    given = zip(weights or [0.0] * n, epochs or [None] * n, strict=True)
    parts = [Share(f"s{i}", i, i + 1, w, e) for i, (w, e) in enumerate(given)]
    return Shares(parts, weights is None, list(stages))


def taken(split: Sources, found) -> np.ndarray:
    """(samples, sources): targets of each source after each sample."""
    source = np.searchsorted(split.starts, found.ids, side="right") - 1
    each = split.targets[found.ids]
    return np.cumsum(np.where(source[:, None] == np.arange(len(split.starts) - 1), each[:, None], 0), axis=0)


@pytest.mark.parametrize("longest", [1, 100])
def test_shares_of_three_sources_are_off_by_less_than_one_sample_at_every_step(longest):
    """0.7, 0.2 and 0.1; the last is read over and over."""
    split = sources(500, 300, 40, longest=longest)
    weights = np.array([0.7, 0.2, 0.1])
    mixed = Mixture(shares(weights.tolist()), split, seed=3, batch=8)
    steps = [mixed.samples(start, start + 8) for start in range(0, 6000, 8)]
    after = np.concatenate([taken(split, mixed.samples(0, 6000))])
    off = np.abs(after - weights * after.sum(1, keepdims=True)) / split.targets.max()
    assert off.max() < 1
    for step in (1, 10, 100, 749):
        said = mixed.seen(8 * step)
        assert [part.targets for part in said] == after[8 * step - 1].tolist()
        assert np.allclose([part.planned for part in said], weights)
        assert np.allclose([part.seen for part in said], after[8 * step - 1] / after[8 * step - 1].sum())
    assert said[2].passes > 10 and said[2].rows == said[2].passes * 40
    ids, epochs = (np.concatenate([getattr(s, name) for s in steps]) for name in ("ids", "epochs"))
    for first, last in zip(split.starts[:-1], split.starts[1:], strict=True):  # each in passes of its own
        own = ids[(ids >= first) & (ids < last)]
        read = epochs[(ids >= first) & (ids < last)]
        assert np.array_equal(read, np.arange(len(own)) // (last - first))
        whole = own[: len(own) // (last - first) * (last - first)].reshape(-1, last - first)
        assert (np.sort(whole, 1) == np.arange(first, last)).all()


@given(
    seed=st.integers(0, 1000),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    longest=st.integers(1, 50),
    batch=st.integers(1, 20),
    data=st.data(),
)
@settings(max_examples=25, deadline=None)
def test_a_pure_function_of_the_position_within_the_bound(seed, sizes, longest, batch, data):
    split = sources(*sizes, seed=seed, longest=longest)
    given = data.draw(st.lists(st.floats(0.01, 1), min_size=len(sizes), max_size=len(sizes)))
    whole = Mixture(shares(given), split, seed, batch).samples(0, 300)
    mixed, starts = Mixture(shares(given), split, seed, batch), list(range(0, 300, batch))
    data.draw(st.randoms()).shuffle(starts)
    for start in starts:
        part, stop = mixed.samples(start, min(start + batch, 300)), min(start + batch, 300)
        assert np.array_equal(part.ids, whole.ids[start:stop]) and np.array_equal(part.epochs, whole.epochs[start:stop])
    weights, after = np.array(given) / sum(given), taken(split, whole)
    bound = np.maximum(1, (1 + weights * (len(sizes) - 2)) / 2) * split.targets.max()
    assert (np.abs(after - weights * after.sum(1, keepdims=True)) <= bound + 1e-6).all()


def test_epochs_alone_say_how_often_each_is_read():
    split = sources(50, 30, 7)
    mixed = Mixture(shares(epochs=[1, 2.0, None]), split, seed=3, batch=8)
    assert mixed.rows_per_epoch == 50 + 60 + 7
    found = mixed.samples(0, 117)
    assert np.array_equal(np.bincount(found.ids), np.repeat([1, 2, 1], [50, 30, 7]))
    after = taken(split, found) / (split.targets[:50].sum() + 2 * split.targets[50:80].sum() + split.targets[80:].sum())
    assert (np.abs(after - after[-1] * after.sum(1, keepdims=True)).max(0) * 5000 < 100).all(), "spread evenly"


def test_a_source_ends_after_its_epochs_and_the_others_share_what_was_its():
    split = sources(50, 30, 7)
    mixed = Mixture(shares([0.5, 0.3, 0.2], [1, 1, 2]), split, seed=3, batch=8)
    assert mixed.limit == 50 + 30 + 14 and [round(max(p.weights), 3) for p in mixed.phases] == [0.5, 0.625, 1.0]
    assert np.array_equal(np.bincount(mixed.samples(0, mixed.limit).ids), np.repeat([1, 1, 2], [50, 30, 7]))
    endless = Mixture(shares([0.5, 0.3, 0.2], [None, None, 2]), split, seed=3, batch=8)
    assert endless.limit is None
    found = endless.samples(0, 400)
    assert np.bincount(found.ids)[80:].tolist() == [2] * 7
    after = taken(split, found)
    rest = after[-1] - after[endless.phases[1].start - 1]
    assert abs(rest[0] - 0.625 * rest.sum()) < 100


def test_a_curriculum_changes_the_shares_at_its_steps():
    split = sources(500, 300, 40)
    stages = [(0.25, [1.0, 0.0, 0.0]), (0.5, [0.0, 2.0, 2.0])]
    mixed = Mixture(shares([0.5, 0.3, 0.2], stages=stages), split, seed=3, batch=8, steps=100)
    assert [phase.start for phase in mixed.phases] == [0, 200, 400]
    after = taken(split, mixed.samples(0, 800))
    assert (after[199, 1:] == 0).all() and after[399, 0] == after[199, 0]
    parts = np.diff(after[[199, 399, 799]], axis=0)
    shares_of = parts / parts.sum(1, keepdims=True)
    assert np.allclose(shares_of, [[0, 0.5, 0.5], [0.5, 0.3, 0.2]], atol=100 / 10_000)
    planned = [part.planned for part in mixed.seen(800)]
    assert sum(planned) == pytest.approx(1) and np.allclose(planned, [p.seen for p in mixed.seen(800)], atol=0.005)
    in_steps = [(25, stages[0][1]), (50, stages[1][1])]
    same = Mixture(shares([0.5, 0.3, 0.2], stages=in_steps), split, seed=3, batch=8, steps=10_000)
    assert np.array_equal(same.samples(390, 420).ids, mixed.samples(390, 420).ids)
    assert "shares from step 1 (s0 1, s1 0, s2 0); 26 (s0 0, s1 0.5, s2 0.5); 51 (" in mixed.describe(800)[-1]


def test_what_cannot_be_mixed():
    with pytest.raises(UserError, match="the source 's1' has nothing to learn from"):
        Mixture(shares([1, 1]), sources(5, 0), seed=3, batch=8)
    Mixture(shares([1, 0]), sources(5, 0), seed=3, batch=8).samples(0, 20)
    with pytest.raises(UserError, match="stage until step 10 has nothing left to read from step 2 on"):
        Mixture(shares([1, 1], [1, None], [(10, [1, 0])]), sources(8, 5), seed=3, batch=8, steps=20)


@pytest.mark.alone
def test_a_far_position_of_large_sources_is_found_at_once():
    """A million rows and more; a new run does not wait, nor one that is resumed at the 10^9th sample."""
    split = sources(10**6, 3 * 10**5, 1000)
    seconds = []
    start = time.perf_counter()
    mixed = Mixture(shares([0.7, 0.2, 0.1]), split, seed=3, batch=64)
    for at in (0, 10**9, 10**9 + 64):
        mixed.samples(at, at + 64)
        seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
    assert max(seconds[:2]) < 2 and seconds[2] < 0.1, seconds  # 0.2 s and 2 ms; the margin is for a busy machine
