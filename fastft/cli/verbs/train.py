"""Train a model as a configuration says."""

import os
from pathlib import Path
from typing import Annotated

import typer

from fastft import config as configuration
from fastft.cli.options import ConfigArg, OverridesArg
from fastft.cli.training import QuietOpt, SummaryOpt, VerboseOpt, run_training
from fastft.errors import UserError
from fastft.streams import results_only


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
    as_json: SummaryOpt = False,
    quiet: QuietOpt = False,
    verbose: VerboseOpt = False,
) -> None:
    """Train a model as a configuration says."""
    if go_on and overwrite:
        raise UserError("--continue and --overwrite exclude each other.", "--overwrite starts over what is there.")
    loaded, resume = configuration.load(config, overrides or []), False
    if go_on:
        with results_only():
            from fastft.train import run_folder
            from fastft.train.resuming import begun

            state = begun(loaded)
        if state == "finished":
            if os.environ.get("RANK", "0") == "0":
                print(run_folder.finished(Path(loaded.run.dir), loaded))
            return
        resume, overwrite = state == "saved", overwrite or state == "not saved"
    run_training(loaded, resume=resume, overwrite=overwrite, as_json=as_json, quiet=quiet, verbose=verbose)
