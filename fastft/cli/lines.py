"""JSON lines, on standard output or in a file of their own; the options that belong to them."""

import json
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from fastft.errors import UserError
from fastft.files import replacing

OutOpt = Annotated[Path | None, typer.Option(help="Write a JSON object for every row here.")]
OverwriteOpt = Annotated[bool, typer.Option("--overwrite", help="Replace --out where it is there already.")]
KeepOpt = Annotated[
    str | None, typer.Option(help="Columns of the data to copy, separated by commas; input_NAME where NAME is taken.")
]


def names_in(keep: str | None) -> list[str]:
    return [name.strip() for name in keep.split(",") if name.strip()] if keep else []


def check_out(out: Path | None, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
    """UserError when ``--out`` is a folder, in none, one of ``inputs`` or in one, or a file that is not to be replaced.
    Pipes and devices pass.
    """
    if out is None:
        return
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder.", "Name a file in it.")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}.", f"mkdir -p {out.parent}")
    whole = out.resolve()
    if held := next((path for path in inputs if path.resolve() in (whole, *whole.parents)), None):
        raise UserError(f"--out {out}: is data that is read ({held}).", "Choose another file.")
    if out.is_file() and not overwrite:
        raise UserError(f"--out {out}: exists already.", "Choose another file, or replace it with --overwrite.")


def write_lines(records: Iterable[dict], out: Path | None) -> None:
    """Print records, or write them to a file and say so on standard error."""
    if out is None:
        escaped = (sys.stdout.encoding or "").lower().replace("-", "") not in ("utf8", "utf16", "utf32")
        for record in records:
            print(json.dumps(record, ensure_ascii=escaped, default=str))
        return
    n, target = 0, out.resolve()  # a link stays one, and what it points to is written
    ordinary = target.is_file() or not target.exists()  # a pipe or a device is written as it is
    with replacing(target) if ordinary else nullcontext(target) as scratch, open(scratch, "w", encoding="utf-8") as f:
        for n, record in enumerate(records, 1):  # noqa: B007  # counted
            print(json.dumps(record, ensure_ascii=False, default=str), file=f)
    print(f"{n:,} row{'s' * (n != 1)} -> {out}", file=sys.stderr)
