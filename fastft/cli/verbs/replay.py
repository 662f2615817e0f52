"""Loss and gradient norm of every sample of a step, with the weights of the checkpoint before it."""

import json
from pathlib import Path
from typing import Annotated

import typer

from fastft.cli.options import JsonOpt
from fastft.streams import results_only


def run(
    run_dir: Annotated[Path, typer.Argument(help="run.dir of the run.")],
    step: Annotated[int, typer.Option(min=1, help="Optimizer step, counted from 1.")],
    as_json: JsonOpt = False,
) -> None:
    """Loss and gradient norm of every sample of a step, with the weights of the checkpoint before it."""
    with results_only():
        from fastft.evaluate.replay import replay

        found = replay(run_dir, step)
    if as_json:
        print(json.dumps(found))
        return
    print(f"weights: {found['weights']}")
    for s in found["samples"]:
        print(
            f"sample {s['sample']}  loss {s['loss']:.4f}  grad_norm {s['grad_norm']:.4g}  {'; '.join(s['documents'])}"
        )
