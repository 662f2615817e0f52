"""A Hugging Face folder from a training checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

from fastft.errors import UserError
from fastft.streams import results_only


def run(
    run_dir: Annotated[Path, typer.Argument(help="run.dir of the run.")],
    to: Annotated[Path, typer.Argument(help="New folder.")],
    step: Annotated[int | None, typer.Option(help="Step of the checkpoint; default: the newest.")] = None,
    best: Annotated[bool, typer.Option("--best", help="The best checkpoint (checkpoint.best_by).")] = False,
    merge: Annotated[bool, typer.Option("--merge", help="Merge an adapter into its base.")] = False,
    dtype: Annotated[
        str | None, typer.Option(help="fp32 or bf16; default: that of the folder that the run began with.")
    ] = None,
) -> None:
    """A Hugging Face folder from a training checkpoint."""
    if dtype not in (None, "fp32", "bf16"):
        raise UserError(f"--dtype {dtype}: unknown.", "Known: fp32, bf16.")
    with results_only():
        from fastft.evaluate.export import export_checkpoint

        folder = export_checkpoint(run_dir, to, step, dtype, merge, best)
    print(folder)
