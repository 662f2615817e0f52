"""Train a model as a configuration says."""

from typing import Annotated

import typer

from fastft import config as configuration
from fastft.cli.options import ConfigArg, OverridesArg
from fastft.cli.training import QuietOpt, SummaryOpt, VerboseOpt, run_training


def run(
    config: ConfigArg,
    overrides: OverridesArg = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start over when run.dir already holds a run.")
    ] = False,
    as_json: SummaryOpt = False,
    quiet: QuietOpt = False,
    verbose: VerboseOpt = False,
) -> None:
    """Train a model as a configuration says."""
    loaded = configuration.load(config, overrides or [])
    run_training(loaded, overwrite=overwrite, as_json=as_json, quiet=quiet, verbose=verbose)
