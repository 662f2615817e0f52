"""Train, evaluate or predict on many ranks, here or on many hosts; a training is restarted after a failure."""

import inspect
import shutil
import tempfile
import uuid
from pathlib import Path
from typing import Annotated

import typer

from fastft import config as configuration
from fastft.cli.options import gpus
from fastft.errors import UserError

CONTEXT = {"ignore_unknown_options": True, "allow_interspersed_args": False}


def run(
    arguments: Annotated[
        list[str], typer.Argument(help="train CONFIG, resume RUN_DIR, eval RUN_DIR or predict RUN_DIR FILE, and more.")
    ],
    nproc: Annotated[int | None, typer.Option(min=1, help="Ranks on this machine; default: its GPUs, or 1.")] = None,
    hostfile: Annotated[Path | None, typer.Option(help="Many hosts: lines of `name slots=N`.")] = None,
    master_addr: Annotated[
        str | None, typer.Option(help="The first host's address for the others; default: what its name means here.")
    ] = None,
    master_port: Annotated[int | None, typer.Option(min=1, max=65535, help="Default: a free one.")] = None,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="Restarts without a newer checkpoint in between before giving up.")
    ] = 3,
    backoff: Annotated[float, typer.Option(min=0.0, help="Seconds before the first restart; doubles.")] = 5.0,
    watchdog: Annotated[
        float, typer.Option(min=0.0, help="Seconds without a step after which a run counts as hung; 0: never.")
    ] = 600.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the commands, start nothing.")] = False,
) -> None:
    """Train, evaluate or predict on many ranks, here or on the hosts of a file: all end together, and a training goes
    on from the newest checkpoint after a failure.
    """
    from fastft.launch import hostfile as hosts_of
    from fastft.launch import launcher

    if hostfile is not None and nproc is not None:
        raise UserError(
            "--hostfile and --nproc exclude each other.", "The host file's slots say how many ranks a host has."
        )
    hosts = hosts_of.read(hostfile) if hostfile else [hosts_of.Host("localhost", nproc or gpus() or 1)]
    run_dir = _run_dir_of(arguments)
    logs = run_dir or Path(tempfile.gettempdir()) / f"fastft-{uuid.uuid4().hex}"
    chosen = launcher.plan(
        arguments,
        hosts,
        logs,
        master_addr=master_addr,
        master_port=master_port,
        max_restarts=max_restarts if run_dir else 0,
        backoff=backoff,
        watchdog=watchdog,
    )
    if dry_run:
        print("\n".join(launcher.describe(chosen)))
        return
    code = launcher.launch(chosen)
    if not (run_dir or code):
        shutil.rmtree(logs, ignore_errors=True)
    raise typer.Exit(code)


def _run_dir_of(arguments: list[str]) -> Path | None:
    """The folder of the run; None for verbs that make none."""
    verb, *rest = arguments
    own = {"--" + name.replace("_", "-") for name in inspect.signature(run).parameters}
    if late := [argument for argument in rest if argument.partition("=")[0] in own]:
        raise UserError(
            f"fastft launch: {late[0]} is an option of launch: options go before {verb}.",
            f"For example: fastft launch --nproc 2 {verb} {' '.join(rest[:1])}",
        )
    given = [a for a in rest if not a.startswith("-")]
    if verb not in ("train", "resume", "eval", "predict") or not given:
        raise UserError(
            f"fastft launch: {' '.join(arguments)}: starts `train CONFIG`, `resume RUN_DIR`, `eval RUN_DIR` or "
            "`predict RUN_DIR FILE`.",
            "For example: fastft launch --nproc 8 train config.yaml",
        )
    if verb in ("eval", "predict"):
        return None
    return Path(given[0]) if verb == "resume" else configuration.run_dir(given[0], given[1:])
