"""Train and adapt a small model on text that is on every machine; no network needed."""

from pathlib import Path
from typing import Annotated

import typer


def run(
    run_dir: Annotated[Path, typer.Option(help="Folder for corpus, runs and report.")] = Path("runs/quickstart"),
    configs: Annotated[Path, typer.Option(help="Folder of general.yaml and domain.yaml.")] = Path("configs/quickstart"),
) -> None:
    """Train and adapt a small model on text that is on every machine; no network needed."""
    from fastft.quickstart import quickstart

    quickstart(run_dir, configs)
