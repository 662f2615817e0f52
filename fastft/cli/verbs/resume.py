"""Go on from the newest usable checkpoint, exactly where a run stopped."""

import os
from pathlib import Path
from typing import Annotated

import typer

from fastft import config as configuration
from fastft.cli.options import OverridesArg


def run(run_dir: Annotated[Path, typer.Argument(help="run.dir of the run.")], overrides: OverridesArg = None) -> None:
    """Go on from the newest usable checkpoint, exactly where the run stopped."""
    from fastft.cli.training import run_training
    from fastft.train import run_folder

    config = configuration.load_run(run_dir, overrides or [])
    if nothing_left := run_folder.finished(run_dir, config):  # no mistake: a job that is started again may meet it
        if os.environ.get("RANK", "0") == "0":
            print(nothing_left)
        return
    run_training(config, resume=True)
