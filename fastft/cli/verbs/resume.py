"""Go on from the newest usable checkpoint, exactly where a run stopped."""

from pathlib import Path
from typing import Annotated

import typer

from fastft import config as configuration
from fastft.cli.options import OverridesArg


def run(run_dir: Annotated[Path, typer.Argument(help="run.dir of the run.")], overrides: OverridesArg = None) -> None:
    """Go on from the newest usable checkpoint, exactly where the run stopped."""
    from fastft.cli.training import run_training

    run_training(configuration.load_run(run_dir, overrides or []), resume=True)
