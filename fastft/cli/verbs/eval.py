"""Metrics of a model on the evaluation sets."""

import json
from typing import Annotated

import typer

from fastft.cli.options import JsonOpt, OverridesArg


def run(
    target: Annotated[
        str, typer.Argument(help="Run folder (its exported model) or configuration file (its model.path).")
    ],
    overrides: OverridesArg = None,
    as_json: JsonOpt = False,
) -> None:
    """Metrics of a model on the evaluation sets."""
    from fastft.cli.training import format_metrics
    from fastft.evaluate.metrics import config_of, evaluate_model

    results = evaluate_model(config_of(target, overrides or []))
    if as_json:
        print(json.dumps(results))
    for name, metrics in {} if as_json else results.items():
        print(f"{name}: {format_metrics(metrics)}")
