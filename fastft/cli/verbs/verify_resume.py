"""Run twice, once interrupted, and compare losses and weights bit for bit."""

import json
from pathlib import Path
from typing import Annotated

import typer

from fastft import config as configuration
from fastft.cli.options import ConfigArg, JsonOpt, OverridesArg
from fastft.streams import results_only


def run(
    config: ConfigArg,
    overrides: OverridesArg = None,
    folder: Annotated[Path, typer.Option(help="New folder for both runs.")] = Path("runs/verify-resume"),
    nproc: Annotated[int, typer.Option(min=1, help="Ranks.")] = 1,
    at: Annotated[int | None, typer.Option(min=1, help="Step to interrupt after; default: one at random.")] = None,
    kill: Annotated[bool, typer.Option("--kill", help="SIGKILL a rank instead of SIGTERM.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Run twice, once interrupted, and compare losses and weights bit for bit."""
    with results_only():
        from fastft.evaluate.verify_resume import verify_resume

        found = verify_resume(configuration.load(config, overrides or []), folder, nproc, at, kill)
    if as_json:
        print(json.dumps(found))
    else:
        print(
            f"{found['steps']} steps, interrupted after step {found['interrupted_after']}: "
            + (
                "losses and weights are bit-identical."
                if found["equal"]
                else "they DIFFER: " + "; ".join(found["differences"])
            )
        )
    raise typer.Exit(0 if found["equal"] else 1)
