"""What runs learned of a domain, and what of general text they forgot."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fastft.cli.options import JsonOpt
from fastft.errors import UserError


def run(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, in one picture.")],
    out: Annotated[Path, typer.Option(help="Folder for pictures (PNG) and data (JSON, CSV).")] = Path("forgetting"),
    domain: Annotated[
        str | None, typer.Option(help="Evaluation set of the domain; default: train.forgetting's, or 'domain'.")
    ] = None,
    general: Annotated[str | None, typer.Option(help="That of general text; default as above, or 'general'.")] = None,
    budget: Annotated[
        float | None,
        typer.Option(help="Suggest a weight of general text that keeps the rise of general loss within this."),
    ] = None,
    replay: Annotated[
        str, typer.Option(help="--budget: the source of general text, by its name in the mixtures.")
    ] = "general",
    data_only: Annotated[bool, typer.Option("--data-only", help="No pictures, which need matplotlib.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what --out holds.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Draw domain and general perplexity of runs, and their gain against what was forgotten."""
    from fastft.evaluate.forgetting import FILES, PICTURES, curves, suggest, write

    names = FILES if data_only else (*FILES, *PICTURES)
    if there := [name for name in names if (out / name).exists() and not overwrite]:
        raise UserError(f"--out {out}: holds {there[0]} already.", "Give another folder, or --overwrite.")
    found = curves(runs, domain, general)
    suggestion = None if budget is None else suggest(runs, found, replay, budget)
    files = write(found, out, suggestion, not data_only)
    if as_json:
        from fastft import track

        more = {"suggestion": asdict(suggestion)} if suggestion else {}
        points = {name: [point.row() for point in curve] for name, curve in found.items()}
        print(json.dumps(track.finite({"runs": points, "files": list(map(str, files)), **more})))
        return
    from rich.markup import escape

    from fastft import terminal

    console, rows = terminal.console(), []
    for point in (point for curve in found.values() for point in curve):
        row, best = point.row(), "yes" if point.pareto else ""
        perplexities = [f"{row[f'{what}_perplexity']:.4g}" for what in ("domain", "general")]
        changes = [f"{point.domain_gain:+.4f}", f"{point.general_rise:+.4f}"]
        rows.append([escape(point.run), f"{point.step:,}", *perplexities, *changes, best])
    columns = ("run", "step", "domain ppl", "general ppl", "domain gain", "general rise", "Pareto")
    terminal.print_table(console, columns, rows, text=("run", "Pareto"))
    if suggestion is not None:
        tried = ", ".join(f"{weight:.3g} {rise:+.4f}" for weight, rise in suggestion.measured)
        console.print(
            f"A weight of {suggestion.weight:.3f} for {replay} keeps the rise at {budget:g} at step "
            f"{suggestion.step:,}, between the weights tried ({tried}).",
            highlight=False,
            markup=False,
        )
    console.print(f"Written: {', '.join(map(str, files))}", highlight=False, markup=False)
