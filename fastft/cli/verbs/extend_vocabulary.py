"""A model with new tokens for a domain."""

import json
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from fastft.cli.options import JsonOpt
from fastft.errors import UserError
from fastft.streams import results_only


def run(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a model with its tokenizer.")],
    out: Annotated[Path, typer.Argument(help="Folder of the model with the new tokens.")],
    texts: Annotated[list[str], typer.Option("--from", help="File, folder or pattern of texts of the domain.")],
    count: Annotated[int, typer.Option(min=1, help="New tokens, at most.")] = 1000,
    min_count: Annotated[int, typer.Option(min=1, help="How often a new token stands in the texts, at least.")] = 10,
    tokens: Annotated[
        Path | None, typer.Option(help="Words to take instead, one a line; the texts only measure them.")
    ] = None,
    column: Annotated[str, typer.Option(help="Column of the text, in files that have columns.")] = "text",
    as_json: JsonOpt = False,
) -> None:
    """Put new tokens for a domain into a model, whose rows begin as the mean of their pieces'."""
    if out.exists():
        raise UserError(f"{out}: is there already.", "Give a new folder.")
    if tokens is not None and not tokens.is_file():
        raise UserError(f"--tokens {tokens}: no such file.")
    with results_only():
        from fastft.config import Model, Source
        from fastft.config.loading import globbed
        from fastft.data import formats
        from fastft.models import load, vocabulary

        sources = globbed([Source(path=path) for path in texts], "--from")

        def read():
            for source in sources:
                for where, row in formats.read(source):
                    if column not in row:
                        raise UserError(f"{where}: no column {column!r}.", "--column names it.")
                    yield str(row[column])

        tokenizer = load.tokenizer(Model(path=model))
        if tokens is None:
            found = vocabulary.chosen(tokenizer, read(), count, min_count)
        else:
            lines = tokens.read_text(encoding="utf-8").splitlines()
            found = vocabulary.of_words(tokenizer, [line.strip() for line in lines if line.strip()], read())
        vocabulary.save(model, out, tokenizer, found, list(islice(read(), vocabulary.SAMPLE)))
    rates = {"before": found.before / max(found.characters, 1), "after": found.after / max(found.characters, 1)}
    if as_json:
        print(json.dumps({"tokens": list(found.tokens), "tokens_per_character": rates, "model": str(out)}))
        return
    print(
        f"{len(found.tokens):,} new tokens: {rates['before']:.4f} tokens a character before, {rates['after']:.4f} "
        f"after ({found.after / max(found.before, 1) - 1:+.1%}). Model: {out}"
    )
