"""Metrics of a model on the evaluation sets."""

import json
import os
from typing import Annotated

import typer

from fastft import config as configuration
from fastft.cli.lines import KeepOpt, OutOpt, OverwriteOpt, check_out, names_in, write_lines
from fastft.cli.options import JsonOpt, OverridesArg
from fastft.errors import UserError
from fastft.streams import results_only


def run(
    target: Annotated[
        str, typer.Argument(help="Run folder (its exported model) or configuration file (its model.path).")
    ],
    overrides: OverridesArg = None,
    as_json: JsonOpt = False,
    out: OutOpt = None,
    overwrite: OverwriteOpt = False,
    keep: KeepOpt = None,
) -> None:
    """Metrics of a model on the evaluation sets, also by class; with --out what each row was judged by."""
    check_out(out, overwrite)
    if keep and out is None:
        raise UserError("--keep: belongs to --out.", "For example: --out rows.jsonl --keep id")
    config = configuration.of_trained(target, overrides or [])
    check_out(out, overwrite, configuration.inputs(config).values())
    with results_only():
        from fastft.evaluate.metrics import evaluate_model  # imports torch, which a wrong key need not wait for
        from fastft.zero.engine import stop_process_group

        try:
            found = evaluate_model(config, rows=out is not None, keep=names_in(keep))
        finally:
            stop_process_group()
    if os.environ["RANK"] != "0":
        return
    if out is not None:
        write_lines((row for evaluation in found.values() for row in evaluation.rows or []), out)
    if as_json:
        more = {name: {"classes": e.classes, "intervals": e.intervals} for name, e in found.items()}
        parts = {name: {part: value for part, value in more[name].items() if value} for name in found}
        print(json.dumps({name: {**e.metrics, **parts[name]} for name, e in found.items()}))
        return
    from fastft.cli.training import format_metrics

    for name, evaluation in found.items():
        print(f"{name}: {format_metrics(evaluation.metrics)}")
        if evaluation.intervals:
            ends = (f"{metric} {low:.4g} to {high:.4g}" for metric, (low, high) in evaluation.intervals.items())
            print(f"{name}: 95 % intervals: {'  '.join(ends)}")
        if evaluation.classes:
            _print_classes(evaluation.classes)


def _print_classes(classes: dict[str, dict[str, float]]) -> None:
    """The weakest first."""
    from rich.markup import escape

    from fastft import terminal

    weakest = sorted(classes.items(), key=lambda pair: pair[1]["f1"])
    rows = [
        [escape(name), *(f"{scores[k]:.4f}" for k in ("precision", "recall", "f1")), f"{scores['support']:,}"]
        for name, scores in weakest
    ]
    columns = ("class", "precision", "recall", "f1", "support")
    terminal.print_table(terminal.console(), columns, rows, text=("class",))
