"""What a path of a model or tokenizer means: a folder here, or a hub id."""

from __future__ import annotations

import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from fastft.errors import UserError, did_you_mean


def check(path: str, what: str) -> None:
    """A local path must exist and hold a config; anything else must look like a hub id."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file() and what == "model":
            raise UserError(
                f"{what} path {path}: the folder holds no config.json.", "Give a folder written by save_pretrained."
            )
        return
    if folder.exists():
        raise UserError(f"{what} path {path}: is a file; expected a folder written by save_pretrained.")
    # "runs/x" has the form of a hub id, but where there is a folder runs/, it is meant.
    if path.startswith((".", "/", "~")) or path.count("/") > 1 or ("/" in path and folder.parent.is_dir()):
        near = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        hint = (
            f"In {folder.parent} there are: {', '.join(sorted(near)[:20])}."
            if near
            else "Give a local folder or a hub id (owner/name)."
        )
        raise UserError(f"{what} path {path}: no such folder.", hint)


def check_hub(path: str, what: str) -> None:
    """UserError at once for a hub id that is not in the cache where the hub has no address: the hub's own library tries
    for a minute.
    """
    import huggingface_hub as hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or Path(path).expanduser().is_dir() or getproxies():
        return
    names = ("config.json", "tokenizer.json", "tokenizer_config.json")
    if any(isinstance(hub.try_to_load_from_cache(path, name), str) for name in names):
        return
    host = urlsplit(constants.ENDPOINT).hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError as e:
        _, _, rest = path.partition("/")
        near = [f"{p.name}/{rest}" if rest else p.name for p in Path().iterdir() if (p / rest).is_dir()]
        raise UserError(
            f"{what} path {path}: no such folder, and as a hub id it is not in the cache, and {host} cannot be reached "
            f"({e}).",
            did_you_mean(path, near) or "Give a local folder written by save_pretrained.",
        ) from None
