"""Versions of fastft and what it stands on."""

from importlib import metadata

import fastft


def versions() -> dict[str, str]:
    packages = ("torch", "transformers", "deepspeed")
    return {"fastft": fastft.__version__, **{name: metadata.version(name) for name in packages}}
