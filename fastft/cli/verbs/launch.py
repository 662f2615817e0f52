"""Train on many ranks, here or on many hosts, restarted from the newest checkpoint after a failure."""

import inspect
from pathlib import Path
from typing import Annotated

import typer

from fastft import config as configuration
from fastft.cli.options import gpus
from fastft.errors import UserError

CONTEXT = {"ignore_unknown_options": True, "allow_interspersed_args": False}


def run(
    arguments: Annotated[list[str], typer.Argument(help="train CONFIG [OVERRIDES...] or resume RUN_DIR.")],
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
    """Train on many ranks, here or on the hosts of a file: all end together, and go on from the newest checkpoint
    after a failure.
    """
    from fastft.launch import hostfile as hosts_of
    from fastft.launch import launcher

    if hostfile is not None and nproc is not None:
        raise UserError(
            "--hostfile and --nproc exclude each other.", "The host file's slots say how many ranks a host has."
        )
    hosts = hosts_of.read(hostfile) if hostfile else [hosts_of.Host("localhost", nproc or gpus() or 1)]
    chosen = launcher.plan(
        arguments,
        hosts,
        _run_dir_of(arguments),
        master_addr=master_addr,
        master_port=master_port,
        max_restarts=max_restarts,
        backoff=backoff,
        watchdog=watchdog,
    )
    if dry_run:
        print("\n".join(launcher.describe(chosen)))
        return
    raise typer.Exit(launcher.launch(chosen))


def _run_dir_of(arguments: list[str]) -> Path:
    verb, *rest = arguments
    own = {"--" + name.replace("_", "-") for name in inspect.signature(run).parameters}
    if late := [argument for argument in rest if argument.partition("=")[0] in own]:
        raise UserError(
            f"fastft launch: {late[0]} is an option of launch: options go before {verb}.",
            f"For example: fastft launch --nproc 2 {verb} {' '.join(rest[:1])}",
        )
    given = [a for a in rest if not a.startswith("-")]
    if verb not in ("train", "resume") or not given:
        raise UserError(
            f"fastft launch: {' '.join(arguments)}: starts `train CONFIG` or `resume RUN_DIR`.",
            "For example: fastft launch --nproc 8 train config.yaml",
        )
    return Path(given[0]) if verb == "resume" else configuration.run_dir(given[0], given[1:])
