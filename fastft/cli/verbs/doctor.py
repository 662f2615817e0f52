"""What is built, what is picked, versions, and a numeric self-check of every op."""

import typer

from fastft.cli.options import JsonOpt


def run(as_json: JsonOpt = False) -> None:
    """What is built, what is picked, versions, and a numeric self-check of every op."""
    from fastft.doctor import main

    raise typer.Exit(main(json=as_json))
