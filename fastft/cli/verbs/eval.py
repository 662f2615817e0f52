"""Metrics of a model on the evaluation sets."""

import json
from pathlib import Path
from typing import Annotated

import typer

from fastft import config as configuration
from fastft.cli.options import JsonOpt, OverridesArg
from fastft.errors import UserError


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
    config, is_run = configuration.load_either(target, overrides)
    if not is_run or any(o.startswith("model.path=") for o in overrides):
        return config
    if not (Path(target) / "model").is_dir():
        raise UserError(
            f"{target}: holds no exported model: the run has not come to its end.",
            f"fastft resume {target} goes on; fastft export {target} FOLDER makes a model of its newest checkpoint.",
        )
    model = config.model.changed(path=str(Path(target) / "model"), init="pretrained", tokenizer=None)
    return config.changed(model=model)
