"""The cheapest changes of a configuration that make it fit, each with its price."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fastft.errors import UserError
from fastft.plan.configured import Planned

# Of a plan's options what a change costs beside time, in words.
NOTHING, ROUNDING = "the same gradient", "moments rounded at random"
HOST = "the host's memory"
MOST_RANKS = 4096


@dataclass(frozen=True)
class Change:
    """One change, or several together.

    Attributes
    ----------
    overrides : tuple of str
        As the command line takes them.
    ranks : int
        With which it is meant.
    words : str
        What it costs beside time.
    """

    overrides: tuple[str, ...]
    ranks: int
    words: str

    @property
    def keys(self) -> tuple[str, ...]:
        """Of the configuration, that it changes."""
        return tuple(override.partition("=")[0] for override in self.overrides)

    def __add__(self, other: Change) -> Change:
        words = dict.fromkeys([*self.words.split("; "), *other.words.split("; ")])
        told = [w for w in words if w and w != NOTHING] or [NOTHING]
        return Change((*self.overrides, *other.overrides), max(self.ranks, other.ranks), "; ".join(told))


@dataclass(frozen=True)
class Offer:
    """A change, its plan, and its price: how many times the step's time it takes, and of all ranks' time together."""

    change: Change
    planned: Planned
    fits: bool
    time: float
    work: float


Replan = Callable[[Sequence[str], int], Planned]  # overrides, ranks
Seconds = Callable[[Planned], float]  # of a step


def candidates(planned: Planned) -> Iterator[Change]:
    """Single changes that fastft can make, those that cost least first."""
    config, ranks, batch = planned.config, planned.setting.ranks, planned.batching
    zero = config.parallel.zero
    for rows in sorted({batch.rows // 2, 1}, reverse=True):
        if 0 < rows < batch.rows:
            auto = config.batch.micro == "auto"
            tokens = rows * batch.width // config.parallel.sequence  # of one rank
            key = f"batch.micro_tokens={tokens}" if auto else f"batch.micro={rows}"
            yield Change((key,), ranks, NOTHING)
    if ranks > 1:
        for stage in range(zero + 1, 4):
            yield Change((f"parallel.zero={stage}",), ranks, NOTHING)
    if planned.setting.device == "cuda" and config.parallel.offload is None:
        for what, least in (("optimizer", 1), ("parameters", 3)):
            needed = () if zero >= least else (f"parallel.zero={least}",)
            yield Change((f"parallel.offload={what}", *needed), ranks, HOST)
    parts = 2
    while config.parallel.sequence == 1 and parts <= ranks:
        if ranks % parts == 0:
            yield Change((f"parallel.sequence={parts}",), ranks, NOTHING)
        parts *= 2
    if not config.parallel.activation_checkpointing:
        yield Change(("parallel.activation_checkpointing=true",), ranks, NOTHING)
    if planned.setting.states and hasattr(config.optim, "state_dtype"):
        order = ["fp32", "bf16", "int8"]
        for dtype in order[order.index(config.optim.state_dtype) + 1 :]:
            yield Change((f"optim.state_dtype={dtype}",), ranks, ROUNDING)
    if not planned.setting.bf16:
        yield Change(("model.dtype=bf16",), ranks, "weights and gradients in bf16")
    elif planned.setting.master == "fp32" and hasattr(config.optim, "master"):
        yield Change(("optim.master=remainder",), ranks, "the step in two passes")
        yield Change(("optim.master=stochastic",), ranks, "weights rounded at random; the step in two passes")
    rows = getattr(config.model.chosen().get("quantize"), "calibrate", 0)
    while rows > 0 and planned.setting.device == "cpu":  # a GPU has none of it
        rows = rows // 2 if rows >= 32 else 0
        words = "the base rounded by fewer rows" if rows else "the base rounded by its weights alone"
        yield Change((f"model.quantize.calibrate={rows}",), ranks, words)
    more = 2 * ranks
    while more <= min(MOST_RANKS, 64 * ranks) and planned.setting.device == "cuda":
        # More ranks divide only what the stage divides.
        keys = () if zero == 3 else ("parallel.zero=3",)
        yield Change(keys, more, f"{more} GPUs")
        more *= 2
    chosen = config.model.chosen()
    if "lora" in chosen and "quantize" not in chosen and zero < 3:
        yield Change(("model.quantize=nf4",), ranks, "the base rounded to 4 bits")
    if not chosen:
        yield Change(("model.lora={r: 16}",), ranks, "an adapter instead of all weights")


def offers(planned: Planned, fits: Callable[[Planned], bool], replan: Replan, seconds: Seconds) -> list[Offer]:
    """Changes that make it fit, the cheapest first; where no single one does, the fewest that do together. [] where
    it fits as it is, and where nothing helps.
    """
    if fits(planned):
        return []
    before = seconds(planned)

    def offer(change: Change) -> Offer | None:
        try:
            new = replan(change.overrides, change.ranks)
        except UserError:  # not with this model
            return None
        ratio = seconds(new) / before
        sequences = new.batching.size / planned.batching.size
        return Offer(
            change, new, fits(new), ratio / sequences, ratio / sequences * change.ranks / planned.setting.ranks
        )

    single = [found for change in candidates(planned) if (found := offer(change))]
    fitting = _cheapest(o for o in single if o.fits)
    own = [o for o in fitting if o.change.ranks == planned.setting.ranks]
    if any("model.lora" not in o.change.keys for o in own):
        return fitting
    adapters = [o.change for o in single if "model.lora" in o.change.keys and not o.fits]
    starts = [[], *([adapter] for adapter in adapters)]
    together = [found for start in starts if (found := _together(planned, single, offer, start))]
    return _cheapest([*fitting, *together])


def _cheapest(found: Iterator[Offer] | list[Offer]) -> list[Offer]:
    """One of each kind (the key that is changed; the fewest ranks), by work and then time."""
    kinds: dict[tuple, Offer] = {}
    for o in sorted(found, key=lambda o: (round(o.work, 3), round(o.time, 3))):
        grown = o.change.words.endswith("GPUs")
        kinds.setdefault(("ranks",) if grown else o.change.keys, o)
    return sorted(kinds.values(), key=lambda o: (round(o.work, 3), round(o.time, 3)))


def _together(
    planned: Planned, single: list[Offer], offer: Callable[[Change], Offer | None], start: list[Change]
) -> Offer | None:
    """Changes on the ranks that there are, without or with an adapter (``start``): added in the order of their price
    until it fits; those taken away again that it fits without, and others made as small as it fits with.
    """
    usable = [o for o in single if o.change.ranks == planned.setting.ranks and "model.lora" not in o.change.keys]
    need = _sizes(planned)
    best: dict[str, Offer] = {}  # the one of each key that helps most
    for o in usable:
        key, sizes = o.change.keys[0], _sizes(o.planned)
        if any(size < 0.99 * before for size, before in zip(sizes, need, strict=True)) and (
            key not in best or sizes < _sizes(best[key].planned)
        ):
            best[key] = o
    chosen = list(start)
    found: Offer | None = None
    for o in sorted(best.values(), key=lambda o: o.work):
        chosen.append(o.change)
        found = offer(_sum(chosen))
        if found and found.fits:
            break
    if found is None or not found.fits:
        return None
    for change in [c for c in reversed(chosen) if c not in start]:  # those that cost most first
        fewer = [c for c in chosen if c is not change]
        if fewer and (less := offer(_sum(fewer))) and less.fits:
            chosen, found = fewer, less
    for change in [c for c in chosen if c not in start]:
        same = [o.change for o in usable if o.change.keys[0] == change.keys[0]]
        for smaller in same[: same.index(change)]:
            changed = [smaller if c is change else c for c in chosen]
            if (less := offer(_sum(changed))) and less.fits:
                chosen, found = changed, less
                break
    return found


def _sizes(planned: Planned) -> tuple[int, int]:
    """Of a step at its fullest; and of loading, checkpoint and whatever else counts before or after it."""
    moments, step = planned.plan.moments, planned.plan.step
    return max(moments[name] for name in step), sum(size for name, size in moments.items() if name not in step)


def _sum(changes: list[Change]) -> Change:
    total = changes[0]
    for change in changes[1:]:
        total = total + change
    return total
