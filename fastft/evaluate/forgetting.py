"""`fastft forgetting`: what runs learned of a domain, and what of general text they forgot meanwhile."""

from __future__ import annotations

import csv
import json
import logging
import math
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from fastft import config as configuration
from fastft import track
from fastft.config import Config
from fastft.errors import UserError, did_you_mean

log = logging.getLogger(__name__)

FILES = ("forgetting.json", "forgetting.csv")
PICTURES = ("forgetting.png", "pareto.png")


@dataclass(frozen=True)
class Point:
    """An evaluation of a run.

    Attributes
    ----------
    domain_loss, general_loss : float
        Mean over the tokens of each set.
    domain_gain, general_rise : float
        Domain loss of the model before training less this one; this general loss less that before training.
    pareto : bool
        Whether no other evaluation, of any of the runs, has at least this gain at no more rise, and one of them better.
    """

    run: str
    step: int
    domain_loss: float
    general_loss: float
    domain_gain: float
    general_rise: float
    pareto: bool = False

    def row(self) -> dict[str, Any]:
        perplexities = {
            "domain_perplexity": math.exp(min(self.domain_loss, 700.0)),
            "general_perplexity": math.exp(min(self.general_loss, 700.0)),
        }
        return {**asdict(self), **perplexities}


@dataclass(frozen=True)
class Suggestion:
    """A weight of general text by what runs with several weights forgot.

    Attributes
    ----------
    weight : float
        Share of the targets.
    step : int
        At which the runs were compared.
    measured : list of (weight, rise)
        Of general loss, by the runs' weights.
    """

    weight: float
    step: int
    measured: list[tuple[float, float]]


def curves(runs: list[Path], domain: str | None, general: str | None) -> dict[str, list[Point]]:
    """Evaluations of every run, by its name, ascending by step from 0.

    Parameters
    ----------
    runs : list of Path
        Run folders.
    domain, general : str, optional
        Evaluation sets; default: those of the run's train.forgetting, or the sets of these names.

    Raises
    ------
    UserError
        Not a run, a set that it does not have, a run that was not evaluated before its first step; runs whose losses
        are of other texts, or of other tokens of them.
    """
    names = _names(runs)
    configs = {folder: configuration.load_run(folder) for folder in runs}
    sets = {folder: _sets(config, folder, domain, general) for folder, config in configs.items()}
    for folder in runs[1:]:
        _check_alike([runs[0], folder], configs, sets)
    found = {name: _curve(name, folder, *sets[folder]) for name, folder in names.items()}
    return marked(found)


def marked(found: dict[str, list[Point]]) -> dict[str, list[Point]]:
    """The same with ``pareto`` of every point."""
    points = [point for curve in found.values() for point in curve]
    return {
        name: [replace(p, pareto=_measured(p) and not any(_dominates(q, p) for q in points)) for p in curve]
        for name, curve in found.items()
    }


def _names(runs: list[Path]) -> dict[str, Path]:
    """Folders by their last part; in full where two have the same."""
    last = [run.resolve().name for run in runs]
    if len({run.resolve() for run in runs}) < len(runs):
        raise UserError("fastft forgetting: the same run twice.", "Name each once.")
    return {name if last.count(name) == 1 else str(run): run for name, run in zip(last, runs, strict=True)}


def _sets(config: Config, folder: Path, domain: str | None, general: str | None) -> tuple[str, str]:
    own = config.train.chosen().get("forgetting")
    chosen = []
    for key, given in (("domain", domain), ("general", general)):
        name = given or (getattr(own, key) if own else key)
        if name not in config.data.eval:
            known = ", ".join(config.data.eval) or "(none)"
            raise UserError(
                f"{folder}: has no evaluation set {name!r}; data.eval has {known}.",
                f"{did_you_mean(name, config.data.eval)} --{key} names it.",
            )
        chosen.append(name)
    if chosen[0] == chosen[1]:
        raise UserError(f"{folder}: {chosen[0]!r} is both the domain and the general set.", "--general names another.")
    return chosen[0], chosen[1]


def _check_alike(runs: list[Path], configs: dict[Path, Config], sets: dict[Path, tuple[str, str]]) -> None:
    """UserError where the same set of two runs is of other files, another tokenizer or other settings."""
    for at, kind in enumerate(("domain", "general")):
        keys = [_eval_keys(run).get(sets[run][at]) for run in runs]
        if None in keys:
            silent = runs[keys.index(None)]
            log.warning("%s: does not say what its %s set was, which may be another than the others'", silent, kind)
        elif keys[0] != keys[1]:
            one, other = (_said(configs[run], sets[run][at]) for run in runs)
            differ = [f"{key} {one[key]} and {other[key]}" for key in one if one[key] != other[key]]
            raise UserError(
                f"{runs[0]} and {runs[1]}: their {kind} sets are not the same: "
                f"{'; '.join(differ) or 'the files have changed between them, or settings of data'}.",
                "Losses of other texts or other tokens say nothing of each other: draw the runs one by one.",
            )


def _eval_keys(run: Path) -> dict[str, str]:
    """What each evaluation set was: a digest of its files, the tokenizer and the settings."""
    return next((r.get("eval_keys", {}) for r in reversed(track.read(run)) if r["kind"] == "run"), {})


def _said(config: Config, name: str) -> dict[str, Any]:
    """What a configuration says of it."""
    return {
        "task": config.task,
        f"data.eval.{name}": ", ".join(source.path or str(source.dataset) for source in config.data.eval[name]),
        "model.tokenizer": config.model.tokenizer or config.model.path,
        "data.max_length": config.data.max_length,
    }


def _curve(name: str, folder: Path, domain: str, general: str) -> list[Point]:
    losses: dict[int, dict[str, float]] = {}
    for record in track.read(folder):
        if record["kind"] == "eval" and "loss" in record and record["set"] in (domain, general):
            loss = math.nan if record["loss"] is None else record["loss"]  # JSON has no NaN: it is written as null
            losses.setdefault(record["step"], {})[record["set"]] = loss
    whole = {step: both for step, both in sorted(losses.items()) if len(both) == 2}
    if 0 not in whole:
        raise UserError(
            f"{folder}: was not evaluated on {domain} and {general} before its first step: nothing to compare with.",
            "Set train.forgetting, or train.eval_at_start: true.",
        )
    before = whole[0]
    return [
        Point(name, step, d, g, before[domain] - d, g - before[general])
        for step, d, g in ((step, both[domain], both[general]) for step, both in whole.items())
    ]


def _measured(point: Point) -> bool:
    return math.isfinite(point.domain_gain) and math.isfinite(point.general_rise)


def _dominates(one: Point, other: Point) -> bool:
    no_worse = one.domain_gain >= other.domain_gain and one.general_rise <= other.general_rise
    return no_worse and (one.domain_gain > other.domain_gain or one.general_rise < other.general_rise)


def suggest(runs: list[Path], found: dict[str, list[Point]], source: str, budget: float) -> Suggestion:
    """The smallest weight of a source with which general loss would have risen by the budget.

    The rise is taken at the last step that all runs were evaluated at, and between two neighboring weights that were
    tried it is taken to be a straight line: nothing is said beyond the weights that were tried.

    Parameters
    ----------
    source : str
        The source of general text, by its name in the runs' mixtures; a run without it has the weight 0.

    Raises
    ------
    UserError
        No two weights, two runs of one weight, a loss that is no number, no common step, or a budget that none of the
        runs kept, or all of them did.
    """
    common = set.intersection(*({point.step for point in curve} for curve in found.values())) - {0}
    if not common:
        raise UserError("--budget: the runs have no evaluation at the same step.", "Give them one train.eval_every.")
    step = max(common)
    rises = dict[float, float]()
    for folder, curve in zip(runs, found.values(), strict=True):
        weight = _weight(folder, source)
        rise = next(point.general_rise for point in curve if point.step == step)
        if weight in rises:
            raise UserError(
                f"--budget: {folder} has the weight {weight:g} of {source!r}, as another run has.",
                "Give one run of each weight.",
            )
        if not math.isfinite(rise):
            raise UserError(f"--budget: {folder}: the general loss at step {step} is no number.", "Leave the run out.")
        rises[weight] = rise
    measured = sorted(rises.items())
    if len(measured) < 2:
        raise UserError(
            f"--budget: the runs have one weight of {source!r}, {measured[0][0]:g}.",
            "Give runs of two or more weights: 0 and 0.2, say.",
        )
    told = ", ".join(f"{weight:.3g}: {rise:+.4f}" for weight, rise in measured)
    for (low, above), (high, below) in pairwise(measured):
        if above > budget >= below:
            return Suggestion(low + (high - low) * (above - budget) / (above - below), step, measured)
    kept = "every" if measured[0][1] <= budget else "none"
    raise UserError(
        f"--budget {budget:g}: {kept} of the weights tried keeps it at step {step} ({told}).",
        "No replay is needed for it." if kept == "every" else "Try a larger weight, a lower optim.lr, or fewer steps.",
    )


def _weight(folder: Path, source: str) -> float:
    """Share of the targets that were planned to come from a source."""
    start = next((r for r in track.read(folder) if r["kind"] == "run"), {})
    mixture = start.get("mixture", {})
    if mixture and source not in mixture:
        raise UserError(
            f"{folder}: its mixture has no source {source!r} but {', '.join(mixture)}.",
            "--replay names the source of general text.",
        )
    return float(mixture[source]["planned"]) if mixture else 0.0


def write(found: dict[str, list[Point]], folder: Path, suggestion: Suggestion | None, pictures: bool) -> list[Path]:
    """forgetting.json, forgetting.csv and, where asked for, forgetting.png and pareto.png; the files.

    Raises UserError without matplotlib, before anything is written.
    """
    plt = _matplotlib() if pictures else None
    folder.mkdir(parents=True, exist_ok=True)
    rows = [point.row() for curve in found.values() for point in curve]
    more = {"suggestion": asdict(suggestion)} if suggestion else {}
    (folder / "forgetting.json").write_text(json.dumps(track.finite({"points": rows, **more}), indent=1))
    with open(folder / "forgetting.csv", "w", newline="") as f:
        table = csv.DictWriter(f, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    if plt is None:
        return [folder / name for name in FILES]
    _draw_curve(plt, found, folder / "forgetting.png")
    _draw_pareto(plt, found, folder / "pareto.png")
    return [folder / name for name in (*FILES, *PICTURES)]


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise UserError(
            "fastft forgetting: matplotlib is not installed, which draws the pictures.",
            "pip install 'fastft[plots]', or --data-only for the numbers alone.",
        ) from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _draw_curve(plt: Any, found: dict[str, list[Point]], path: Path) -> None:
    """Perplexity of both sets over the steps."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for name, curve in found.items():
        steps, rows = [point.step for point in curve], [point.row() for point in curve]
        for axis, what in zip(axes, ("domain", "general"), strict=True):
            axis.plot(steps, [row[f"{what}_perplexity"] for row in rows], marker=".", label=name)
    for axis, what in zip(axes, ("domain", "general"), strict=True):
        axis.set(xlabel="step", ylabel="perplexity", title=f"{what} text")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_pareto(plt: Any, found: dict[str, list[Point]], path: Path) -> None:
    """Domain gain against general rise, a point an evaluation; larger where no other is better in both."""
    figure, axis = plt.subplots(figsize=(6, 5), constrained_layout=True)
    for name, curve in found.items():
        x, y = [point.general_rise for point in curve], [point.domain_gain for point in curve]
        (line,) = axis.plot(x, y, linewidth=1, label=name)
        axis.scatter(x, y, s=[45 if point.pareto else 12 for point in curve], color=line.get_color())
    axis.set(xlabel="rise of general loss (nats a token)", ylabel="gain in domain loss (nats a token)")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
