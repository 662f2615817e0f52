"""What is said of the configuration's keys: one at a time (`fastft config explain`), or all of them as a page."""

from __future__ import annotations

import difflib
import textwrap

from fastft.config.foreign import FOREIGN, ours
from fastft.config.keys import PARTS, Key, keys
from fastft.config.sections import Data
from fastft.errors import UserError, did_you_mean

WIDTH = 100


def explain(path: str, task: str | None = None) -> str:
    """What a key is, or which keys a section has.

    Parameters
    ----------
    path : str
        ``optim.warmup``, or a section; "" is the whole file.
    task : str, optional
        Leaves out what only other tasks have.

    Raises
    ------
    UserError
        No such key: names the nearest.
    """
    known = keys()
    path = _today(path)
    found = [key for key in known if key.path == path and is_for(key, task)]
    if not found and path:
        raise _unknown(path, known, task)
    parts = [_said(key) for key in found]
    if not path or any(key.kind == "section" for key in found):
        parts.append(_listed([key for key in known if key.section == path and is_for(key, task)]))
    return "\n\n".join(parts)


def _today(path: str) -> str:
    """A key under its name of today; an evaluation set's source (data.eval.dev.format) is as the training data's."""
    section, _, name = path.rpartition(".")
    if section == "data":
        return f"data.{Data.aliases.get(name, name)}"
    return f"data.train.{name}" if section.startswith("data.eval.") else path


def is_for(key: Key, task: str | None) -> bool:
    tasks = [name for name in key.used if name.startswith("task: ")]
    return task is None or not tasks or f"task: {task}" in tasks


def _unknown(path: str, known: list[Key], task: str | None) -> UserError:
    if others := [key for key in known if key.path == path]:
        return UserError(f"{path}: task {task} has no such key.", f"It is a key of {_users(others[0].used)}.")
    paths = list(dict.fromkeys(key.path for key in known))
    near = difflib.get_close_matches(path, paths, n=2, cutoff=0.7)
    hint = f"Did you mean {' or '.join(near)}?" if near else ""
    return UserError(f"{path}: no such key.", instead(path, [p for p in paths if "." not in p], hint))


def instead(path: str, siblings: list[str], otherwise: str = "") -> str:
    """A sentence on the key that was meant by one that is not there.

    Parameters
    ----------
    siblings : list of str
        Names that its section has.
    otherwise : str
        Said where it is a name of neither another section nor another trainer; default: the nearest of the siblings.
    """
    name = path.rpartition(".")[2]
    near = did_you_mean(name, siblings)
    if near.startswith("Did you mean") and not otherwise and name not in FOREIGN:
        return near
    known = keys()
    if here := [key for key in known if key.path == path]:
        return f"It is there only with {_users(tuple(user for key in here for user in key.used))}. {near}"
    if name in FOREIGN:
        return ours(name)
    if elsewhere := list(dict.fromkeys(key.path for key in known if key.name == name)):
        return f"Did you mean {' or '.join(elsewhere)}?"
    return otherwise or near


def _said(key: Key) -> str:
    lines = [key.path, *textwrap.wrap(key.description, WIDTH, initial_indent="  ", subsequent_indent="  ")]
    facts = {"values" if key.choices else "type": ", ".join(key.choices) or key.kind, "default": key.default}
    if key.kind == "section":
        facts = {"default": key.default}
    if key.kind != "section":
        facts["used by"] = _users(key.used) or "every run"
    if key.path in PARTS:
        facts["chosen by"] = f"{PARTS[key.path].by}: {', '.join(PARTS[key.path].members.names())}"
    return "\n".join([*lines, *(f"  {name + ':':<10} {value}" for name, value in facts.items() if value)])


def _listed(below: list[Key]) -> str:
    names = [key.name for key in below]
    wide = max(map(len, names), default=0)
    lines = []
    for key in below:
        only = f" (only with {_users(key.used)})" if key.used else ""
        text = key.description + only
        first = f"  {key.name:<{wide}}  "
        lines += textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=" " * len(first)) or [
            first.rstrip()
        ]
    return "\n".join(lines)


def _users(used: tuple[str, ...]) -> str:
    """``task: classification or regression``; ``task: causal_lm, masked_lm or sft``."""
    by: dict[str, list[str]] = {}
    for name in used:
        chooser, _, member = name.partition(": ")
        by.setdefault(chooser, []).append(member)

    def listed(names: list[str]) -> str:
        return " or ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)

    return "; ".join(f"{chooser}: {listed(members)}" for chooser, members in by.items())


def page() -> str:
    """All keys as Markdown."""
    lines = [
        "# Keys of the configuration",
        "",
        "Written by `fastft config reference`; `fastft config explain KEY` says the same of one key. The forms that",
        "values can have are in [configuration.md](configuration.md).",
        "",
    ]
    lines += _sections(keys(), "The file", "##")
    from fastft.config.corpus import CorpusConfig  # which reads configurations by what this file says of keys

    lines += ["## fastft prepare", "", "Keys of the file that makes a corpus: [corpus.md](corpus.md).", ""]
    lines += _sections(keys(CorpusConfig), "The file of a corpus", "###")
    return "\n".join(lines)


def _sections(known: list[Key], whole: str, mark: str) -> list[str]:
    lines = []
    listed = {
        "data.train": "A source of rows; those of `data.eval` have no `weight` and `epochs`, and files no `name`.",
        "data.curriculum": "A stage: [adapt.md](adapt.md#a-curriculum).",
        "sources": "A source.",
        "rules.decontaminate.sets": "An evaluation set.",
    }
    for section in ["", *dict.fromkeys(key.path for key in known if key.kind == "section" or key.path in listed)]:
        below = [key for key in known if key.section == section]
        if not below:
            continue
        lines += [f"{mark} {section or whole}", ""]
        about = next((key for key in known if key.path == section), None)
        if section in listed:
            lines += [listed[section], ""]
        elif about:
            lines += [about.description, ""]
        lines += ["| key | type | default | meaning |", "|---|---|---|---|", *map(_row, below), ""]
    return lines


def _row(key: Key) -> str:
    kind = " or ".join(f"`{choice}`" for choice in key.choices) or key.kind
    only = f" Only with {_users(key.used)}." if key.used else ""
    default = f"`{key.default}`" if key.default not in ("", "required") else key.default
    cells = (f"`{key.name}`", kind, default, (key.description + only).replace("<", "&lt;"))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
