"""Predictions of a trained model, a JSON object a line."""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from fastft import config as configuration
from fastft.cli.lines import KeepOpt, OutOpt, OverwriteOpt, check_out, names_in, write_lines
from fastft.errors import UserError
from fastft.streams import results_only


def run(
    model: Annotated[str, typer.Argument(help="Run folder, exported model folder, or hub id.")],
    source: Annotated[str | None, typer.Argument(help="Data file; - reads lines from standard input.")] = None,
    options: Annotated[list[str] | None, typer.Argument(help="The task's options, such as max_new_tokens=64.")] = None,
    text: Annotated[list[str] | None, typer.Option(help="A text, instead of a file; may be given again.")] = None,
    pair: Annotated[list[str] | None, typer.Option(help="The second text of each, for models of pairs.")] = None,
    column: Annotated[str | None, typer.Option(help="Column of the first field; default: the run's.")] = None,
    pair_column: Annotated[str | None, typer.Option(help="Column of the second text; default: the run's.")] = None,
    format: Annotated[str, typer.Option(help="txt, jsonl, csv, tsv, parquet, conll, hf; auto: by the name.")] = "auto",
    split: Annotated[str | None, typer.Option(help="Split of a saved DatasetDict.")] = None,
    documents: Annotated[str, typer.Option(help="txt: blank_line, line or file ends a document.")] = "line",
    header: Annotated[
        str | None, typer.Option(help="csv/tsv without a header line: its columns, separated by commas.")
    ] = None,
    quoting: Annotated[str, typer.Option(help="csv/tsv: standard, or none: quote characters are text.")] = "standard",
    out: OutOpt = None,
    overwrite: OverwriteOpt = False,
    keep: KeepOpt = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Only the so many highest of the scores.")] = None,
    max_length: Annotated[int | None, typer.Option(min=2, help="Longest text in tokens; default: the run's.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest generated text in tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="0: the likeliest token.")] = None,
) -> None:
    """Predictions of a trained model, a JSON object a line."""
    if text and source is not None and "=" in source:  # no file, but the first option
        options, source = [source, *(options or [])], None
    if (source is None) == (not text):
        raise UserError(
            "Give either a data file or --text.", "For example: fastft predict runs/x --text 'My card was stolen'"
        )
    kept = names_in(keep)
    if kept and source in (None, "-"):
        raise UserError("--keep: only a data file has columns.", "Give one, or leave --keep away.")
    check_out(out, overwrite, [Path(source)] if source not in (None, "-") else [])
    shorthands = {"max_length": max_length, "max_new_tokens": max_new_tokens, "temperature": temperature}
    with results_only():
        from fastft.evaluate.predict import predict, read, together
        from fastft.zero.engine import stop_process_group

        ready, ranks, sharded = together(model, {**shorthands, **_parsed(options or [])})
        if not ranks.alone and source in (None, "-"):
            raise UserError("fastft predict on several ranks reads a data file.", "Give one, or start it alone.")
    first = next(iter(ready.fields))
    if source == "-":
        rows: Iterable = _lines(first)
    elif source is None:
        if pair and len(pair) != len(text or []):
            raise UserError(f"--pair: {len(pair)} second texts for {len(text or [])} of --text.", "Give one for each.")
        pairs = [{"text_pair": second} for second in pair] if pair else [{} for _ in text or []]
        rows = [("--text", {first: one, **more}) for one, more in zip(text or [], pairs, strict=True)]
        if strange := [name for name in rows[0][1] if name not in ready.fields]:
            raise UserError(f"This model's task has no {strange[0]}.", f"It has: {', '.join(ready.fields)}.")
    else:
        wanted: dict[str, Any] = {
            "path": source,
            "format": format,
            "split": split,
            "documents": documents,
            "quoting": quoting,
        }
        wanted["header"] = header.split(",") if header else None
        chosen = configuration.section(configuration.Source, wanted, "fastft predict")
        rows = read(ready, chosen, {first: column, "text_pair": pair_column}, kept)
    try:
        records = predict(ready, rows, batch_size, top_k, ranks, sharded)
        if ranks.main:
            write_lines(records, out)
        else:
            for _ in records:  # none: they are rank 0's
                pass
    finally:
        stop_process_group()


def _parsed(options: list[str]) -> dict[str, Any]:
    import yaml

    found = {}
    for option in options:
        name, eq, value = option.partition("=")
        if not eq:
            raise UserError(f"{option!r} is not of the form option=value.", "For example: max_new_tokens=64")
        found[name] = yaml.safe_load(value)
    return found


def _lines(field: str) -> Iterator[tuple[str, dict]]:
    try:
        for n, line in enumerate(sys.stdin, 1):
            if line.strip():
                yield f"stdin:{n}", {field: line.rstrip("\n")}
    except UnicodeDecodeError as e:
        raise UserError(f"standard input: {e}.", "It must be UTF-8 text.") from None
