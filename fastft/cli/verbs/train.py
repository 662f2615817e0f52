"""Train a model as a configuration says."""

from typing import Annotated

import typer

from fastft import config as configuration
from fastft.cli.options import ConfigArg, OverridesArg


def run(
    config: ConfigArg,
    overrides: OverridesArg = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start over when run.dir already holds a run.")
    ] = False,
) -> None:
    """Train a model as a configuration says."""
    from fastft.cli.training import run_training

    run_training(configuration.load(config, overrides or []), overwrite=overwrite)
