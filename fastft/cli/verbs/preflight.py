"""Whether the hosts can train a configuration together."""

import json
from pathlib import Path
from typing import Annotated

import typer

from fastft import config as configuration
from fastft.cli.options import ConfigArg, JsonOpt, OverridesArg, gpus
from fastft.streams import results_only


def run(
    config: ConfigArg,
    overrides: OverridesArg = None,
    hostfile: Annotated[Path | None, typer.Option(help="Lines of `name slots=N`; default: this machine.")] = None,
    master_addr: Annotated[str | None, typer.Option(help="The first host's address for the others.")] = None,
    master_port: Annotated[int, typer.Option(min=1, max=65535)] = 29500,
    as_json: JsonOpt = False,
) -> None:
    """Whether the hosts can train this configuration together: versions, code, model and data, clocks, disks,
    network.
    """
    from fastft.launch import hostfile as hosts_of
    from fastft.launch import launcher
    from fastft.launch import preflight as checks

    loaded = configuration.load(config, overrides or [])
    hosts = hosts_of.read(hostfile) if hostfile else [hosts_of.Host("localhost", gpus() or 1)]
    chosen = launcher.plan([], hosts, Path(loaded.run.dir), master_addr=master_addr, master_port=master_port)
    size = checks.checkpoint_bytes(Path(loaded.model.path), loaded.model.dtype, loaded.checkpoint.keep)
    with results_only():
        found, wrong = checks.preflight(chosen, size, list(dict.fromkeys(configuration.inputs(loaded).values())))
    if as_json:
        print(json.dumps({"hosts": found, "problems": wrong}))
    else:
        from rich.markup import escape

        from fastft import terminal

        rows = [list(map(escape, row)) for row in checks.describe(found)]
        terminal.print_table(terminal.console(), checks.COLUMNS, rows)
        print("\n".join(wrong) if wrong else f"{len(hosts)} host{'s' * (len(hosts) > 1)}: nothing is wrong.")
    raise typer.Exit(1 if wrong else 0)
