"""About the configuration file: explain its keys, begin one, its schema."""

import json
from typing import Annotated

import typer

from fastft import config as configuration

app = typer.Typer(help="About the configuration file.", no_args_is_help=True, add_completion=False)


@app.callback()
def _about() -> None:
    """About the configuration file."""


@app.command()
def explain(
    key: Annotated[str, typer.Argument(help="Such as optim.warmup, or a section; default: the sections.")] = "",
    task: Annotated[str | None, typer.Option(help="Leave out what only other tasks have.")] = None,
) -> None:
    """What a key means: its type, values and default; of a section, its keys."""
    from fastft import rooms
    from fastft.config import reference

    if task is not None:
        rooms.TASKS.get(task)
    print(reference.explain(key, task))


@app.command()
def init(task: Annotated[str, typer.Argument(help="The task; an unknown name lists them.")]) -> None:
    """A commented configuration to start from: fastft config init classification > my.yaml"""
    from fastft.config.example import example

    print(example(task, ", ".join(_formats())), end="")


@app.command()
def schema(
    corpus: Annotated[bool, typer.Option("--corpus", help="Of the file that fastft prepare reads.")] = False,
) -> None:
    """The configuration's JSON Schema, for editors: every key, its type, default and meaning."""
    from fastft.config.corpus import CorpusConfig

    of = {"of": CorpusConfig} if corpus else {}
    print(json.dumps(configuration.json_schema(_formats(), **of), indent=1))


@app.command()
def reference() -> None:
    """All keys, as a page of Markdown."""
    from fastft.config.reference import page

    print(page(), end="")


def _formats() -> list[str]:
    from fastft.data.formats import FORMATS

    return FORMATS.names()
