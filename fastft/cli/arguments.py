"""Settings that are written as options: told here, for the verb's own parser only says that it knows none such."""

import inspect
import re
from collections.abc import Callable
from typing import Any

from fastft.errors import UserError


def _options_of(arguments: list[str]) -> set[str]:
    """Of the verb that is named among the arguments of another."""
    from importlib import import_module

    from fastft.cli.main import verbs

    inner = next((verbs()[argument].stem for argument in arguments if argument in verbs()), None)
    run = getattr(import_module(f"fastft.cli.verbs.{inner}"), "run", None) if inner else None
    return set(inspect.signature(run).parameters) if run else set()


def check(verb: str, run: Callable[..., Any], arguments: list[str]) -> None:
    """UserError for ``--optim.lr=5e-5`` and ``--learning_rate 5e-5``, where the verb takes overrides."""
    own = set(inspect.signature(run).parameters)
    if not {"overrides", "arguments"} & own:
        return
    if "arguments" in own:  # a verb that starts another one, whose options follow it
        own |= _options_of(arguments)
    for argument, following in zip(arguments, [*arguments, ""][1:], strict=True):
        if not argument.startswith("--"):
            continue
        name, equals, value = argument[2:].partition("=")
        value = value if equals or following.startswith("-") else following
        if re.fullmatch(r"\w+(\.[\w-]+)+", name):
            raise UserError(
                f"fastft {verb}: {argument}: a setting is given without --.", f"For example: {name}={value or 'VALUE'}"
            )
        name = name.replace("-", "_")
        if name in own or not name:
            continue
        from fastft.config.foreign import FOREIGN, ours

        if name in FOREIGN:
            raise UserError(
                f"fastft {verb}: no such option: {argument}. {ours(name)}",
                "A setting is given without --, after the configuration: optim.lr=5e-5",
            )
