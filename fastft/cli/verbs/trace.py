"""Which documents a training step learns from."""

import json
from pathlib import Path
from typing import Annotated

import typer

from fastft.cli.options import JsonOpt, OverridesArg
from fastft.streams import results_only


def run(
    target: Annotated[Path, typer.Argument(help="Run folder or configuration file.")],
    overrides: OverridesArg = None,
    step: Annotated[int, typer.Option(min=1, help="Optimizer step, counted from 1.")] = 1,
    as_json: JsonOpt = False,
) -> None:
    """Which documents a training step learns from."""
    with results_only():
        from fastft.evaluate.trace import trace as find

        samples = find(target, overrides or [], step)
    if as_json:
        print(json.dumps(samples))
        return
    for sample in samples:
        source = f" ({sample['source']})" if "source" in sample else ""
        print(f"sample {sample['sample']}{source}: " + "; ".join(sample["documents"]))
