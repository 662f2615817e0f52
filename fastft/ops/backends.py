"""The table (op, backend) -> implementation, and the one place where a backend is chosen.

The choice, strongest first: the argument `backend=` of the call; the environment variable FASTFT_BACKEND, either one
name for all ops ("triton") or pairs ("cross_entropy=triton,adamw=native"); else automatic: the first registered backend
that loads and takes this device and these dtypes. A backend that was asked for and cannot be used is an error. An
automatic choice is logged once, with the reason why each better backend was passed over, and `choices()` returns all of
them for the run's record.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

log = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "FASTFT_BACKEND"


class BackendError(RuntimeError):
    """A backend that was asked for cannot be used; the message says why, and which ones can."""


@dataclass(frozen=True)
class Entry:
    """One implementation of one op."""

    load: Callable[[], Callable]  # imports what it needs and returns the implementation; raises ImportError
    refuses: Callable[[str, tuple[torch.dtype, ...]], str]  # (device type, dtypes) -> why not; "" when it can
    automatic_on: frozenset[str] | None  # device types on which it may be chosen unasked; None: all


_table: dict[str, dict[str, Entry]] = {}  # op -> backend -> entry, better backends first
_loaded: dict[tuple[str, str], Callable] = {}
_choices: dict[tuple[str, str, tuple[torch.dtype, ...]], dict] = {}
_logged: set[tuple[str, str, str]] = set()


def register(
    op: str,
    backend: str,
    *,
    load: Callable[[], Callable],
    refuses: Callable[[str, tuple[torch.dtype, ...]], str],
    automatic_on: frozenset[str] | None = None,
) -> None:
    """Add an implementation. Backends of an op are tried in the order in which they were registered.

    Raises ValueError when the pair is already there.
    """
    entries = _table.setdefault(op, {})
    if backend in entries:
        raise ValueError(f"backend {backend!r} of op {op!r} is already registered")
    entries[backend] = Entry(load, refuses, automatic_on)


def ops() -> list[str]:
    """Names of the ops in the table."""
    return list(_table)


def names(op: str) -> list[str]:
    """Names of the backends of `op`, better ones first. ValueError when there is no such op."""
    return list(_entries(op))


def implementation(op: str, backend: str) -> Callable:
    """The implementation itself, imported at the first call. BackendError when it cannot load."""
    key = (op, backend)
    if key not in _loaded:
        try:
            _loaded[key] = _entry(op, backend).load()
        except ImportError as error:
            raise BackendError(f"backend {backend!r} of op {op!r} cannot load: {error}") from error
    return _loaded[key]


def why_not(op: str, backend: str, device_type: str, dtypes: tuple[torch.dtype, ...]) -> str:
    """Why this backend cannot do this op here; "" when it can."""
    try:
        implementation(op, backend)
    except BackendError as error:
        return str(error.__cause__)
    return _entry(op, backend).refuses(device_type, dtypes)


def select(op: str, requested: str | None, device_type: str, dtypes: tuple[torch.dtype, ...]) -> str:
    """Name of the backend to use.

    Raises ValueError for an unknown name, BackendError for a backend that was asked for and cannot be used.
    """
    source = "the argument backend="
    if requested is None:
        requested = _from_environment(op)
        source = ENVIRONMENT_VARIABLE
    if requested is None:
        return _automatic(op, device_type, dtypes)
    reason = why_not(op, requested, device_type, dtypes)
    if reason:
        usable = [name for name in names(op) if not why_not(op, name, device_type, dtypes)]
        raise BackendError(
            f"{source} asks for backend {requested!r} of op {op!r}, "
            f"which cannot be used for {_describe(device_type, dtypes)}: {reason}. "
            f"Available here: {', '.join(usable) or 'none'}"
        )
    _record(op, requested, device_type, dtypes, source, {})
    return requested


# The answer depends on nothing but constants and the environment, so a compiled graph may keep it. This is what
# torch.compiler.assume_constant_result does, less its import of torch._dynamo, which takes almost two seconds.
select._dynamo_marked_constant = True  # type: ignore[attr-defined]  # a function has what is put there


def choices() -> list[dict]:
    """What was picked so far, for the run's record: op, backend, device, dtypes, why, passed_over (name -> reason)."""
    return [dict(choice) for choice in _choices.values()]


def preview(op: str, device_type: str, dtypes: tuple[torch.dtype, ...]) -> tuple[str, dict[str, str]]:
    """(the automatic choice, {better backend: why it was passed over}); records and logs nothing."""
    passed_over = {}
    for backend, entry in _entries(op).items():
        if entry.automatic_on is not None and device_type not in entry.automatic_on:
            passed_over[backend] = f"chosen unasked only on {', '.join(sorted(entry.automatic_on))}"
            continue
        reason = why_not(op, backend, device_type, dtypes)
        if not reason:
            return backend, passed_over
        passed_over[backend] = reason
    reasons = "; ".join(f"{backend}: {reason}" for backend, reason in passed_over.items())
    raise BackendError(f"no backend of op {op!r} can be used for {_describe(device_type, dtypes)}: {reasons}")


def _automatic(op: str, device_type: str, dtypes: tuple[torch.dtype, ...]) -> str:
    known = _choices.get((op, device_type, dtypes))
    if known is not None and known["why"] == "automatic":
        return known["backend"]
    backend, passed_over = preview(op, device_type, dtypes)
    _record(op, backend, device_type, dtypes, "automatic", passed_over)
    if (op, backend, device_type) not in _logged:
        _logged.add((op, backend, device_type))
        notes = "".join(f"; {name}: {reason}" for name, reason in passed_over.items())
        log.info("%s on %s: backend %s%s", op, device_type, backend, notes)
    return backend


def _record(
    op: str, backend: str, device_type: str, dtypes: tuple[torch.dtype, ...], why: str, passed_over: dict[str, str]
) -> None:
    _choices[op, device_type, dtypes] = {
        "op": op,
        "backend": backend,
        "device": device_type,
        "dtypes": [str(dtype).removeprefix("torch.") for dtype in dtypes],
        "why": why,
        "passed_over": passed_over,
    }


def _from_environment(op: str) -> str | None:
    value = os.environ.get(ENVIRONMENT_VARIABLE, "").strip()
    if not value:
        return None
    if "=" not in value:
        return value
    chosen = {}
    for pair in value.split(","):
        name, _, backend = (part.strip() for part in pair.partition("="))
        _entry(name, backend)  # a misspelt op must not be read as "no wish"
        chosen[name] = backend
    return chosen.get(op)


def _entries(op: str) -> dict[str, Entry]:
    if op not in _table:
        raise ValueError(f"unknown op {op!r}; known: {', '.join(_table)}")
    return _table[op]


def _entry(op: str, backend: str) -> Entry:
    entries = _entries(op)
    if backend not in entries:
        raise ValueError(f"unknown backend {backend!r} of op {op!r}; known: {', '.join(entries)}")
    return entries[backend]


def _describe(device_type: str, dtypes: tuple[torch.dtype, ...]) -> str:
    return f"{device_type}, {' and '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)}"
