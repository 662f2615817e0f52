"""About the configuration file: its schema."""

import json

import typer

from fastft import config as configuration

app = typer.Typer(help="About the configuration file.", no_args_is_help=True, add_completion=False)


@app.callback()
def _about() -> None:
    """About the configuration file."""


@app.command()
def schema() -> None:
    """The configuration's JSON Schema: every key, its type, default and meaning."""
    print(json.dumps(configuration.full_class().model_json_schema(), indent=2))
