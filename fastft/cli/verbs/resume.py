"""Go on from the newest usable checkpoint, exactly where a run stopped."""

import os
from pathlib import Path
from typing import Annotated

import typer

from fastft import config as configuration
from fastft.cli.options import OverridesArg
from fastft.cli.training import QuietOpt, SummaryOpt, VerboseOpt, run_training


def run(
    run_dir: Annotated[Path, typer.Argument(help="run.dir of the run.")],
    overrides: OverridesArg = None,
    as_json: SummaryOpt = False,
    quiet: QuietOpt = False,
    verbose: VerboseOpt = False,
) -> None:
    """Go on from the newest usable checkpoint, exactly where the run stopped."""
    from fastft.train import run_folder

    loaded = configuration.load_run(run_dir, overrides or [])
    if nothing_left := run_folder.finished(run_dir, loaded):  # no mistake: a job that is started again may meet it
        if os.environ.get("RANK", "0") == "0":
            print(nothing_left)
        return
    run_training(loaded, resume=True, as_json=as_json, quiet=quiet, verbose=verbose)
