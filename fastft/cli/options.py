"""Arguments and options that several verbs have."""

from pathlib import Path
from typing import Annotated

import typer

ConfigArg = Annotated[Path, typer.Argument(help="Configuration file (YAML).")]
OverridesArg = Annotated[list[str] | None, typer.Argument(help="Overrides, such as optim.lr=2e-5.")]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def gpus() -> int:
    """GPUs of this machine, without importing torch."""
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
