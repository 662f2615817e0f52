"""Metrics of a model on the evaluation sets."""

import json
from pathlib import Path
from typing import Annotated

import typer

from fastft import config as configuration
from fastft.cli.options import JsonOpt, OverridesArg


def run(
    target: Annotated[
        str, typer.Argument(help="Run folder (its exported model) or configuration file (its model.path).")
    ],
    overrides: OverridesArg = None,
    as_json: JsonOpt = False,
) -> None:
    """Metrics of a model on the evaluation sets."""
    config = _config_of(target, overrides or [])
    from fastft.cli.training import format_metrics
    from fastft.evaluate.metrics import evaluate_model  # imports torch, which a wrong key need not wait for

    results = evaluate_model(config)
    if as_json:
        print(json.dumps(results))
    for name, metrics in {} if as_json else results.items():
        print(f"{name}: {format_metrics(metrics)}")


def _config_of(target: str, overrides: list[str]) -> configuration.Config:
    """A YAML file's configuration; of a run folder that of its exported model."""
    if not Path(target).is_dir():
        return configuration.load(target, overrides)
    config = configuration.load_run(target, overrides)
    if any(o.startswith("model.path=") for o in overrides):
        return config
    model = config.model.changed(path=str(Path(target) / "model"), init="pretrained", tokenizer=None)
    return config.changed(model=model)
