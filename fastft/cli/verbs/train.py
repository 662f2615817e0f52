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
    go_on: Annotated[
        bool,
        typer.Option(
            "--continue",
            help="For jobs that are started again: go on from run.dir's newest checkpoint where there is one, start "
            "over where this run ended before its first, end with 0 where it is finished.",
        ),
    ] = False,
) -> None:
    """Train a model as a configuration says."""
    from fastft.cli.training import run_training

    loaded, resume = configuration.load(config, overrides or []), False
    if go_on:
        from fastft.train.resuming import begun

        state = begun(loaded)
        if state == "finished":
            print(f"{loaded.run.dir}: finished; its model is in model/.")
            return
        resume, overwrite = state == "saved", overwrite or state == "not saved"
    run_training(loaded, resume=resume, overwrite=overwrite)
