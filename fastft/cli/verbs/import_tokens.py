"""Make a corpus of files that were tokenized elsewhere: datatrove's .ds, Megatron-LM's .bin and .idx."""

import json
from pathlib import Path
from typing import Annotated

import typer

from fastft.cli.options import JsonOpt
from fastft.streams import results_only


def run(
    output: Annotated[Path, typer.Argument(help="Folder of the corpus.")],
    files: Annotated[list[str], typer.Argument(help=".ds, .bin or .idx files, or folders of them.")],
    tokenizer: Annotated[str, typer.Option(help="Folder or hub id of the tokenizer that made them.")],
    name: Annotated[str | None, typer.Option(help="Of the source; default: the last part of its path.")] = None,
    licence: Annotated[str | None, typer.Option(help="Of the source, for the manifest.")] = None,
    unchecked: Annotated[
        bool, typer.Option("--unchecked", help="Take them though their text does not give the same tokens again.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a corpus that is there.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Make a corpus of files that were tokenized elsewhere: datatrove's .ds, Megatron-LM's .bin and .idx."""
    with results_only():
        from fastft.config.sources import called
        from fastft.corpus.importing import import_tokens

        corpus = import_tokens(
            output,
            files,
            tokenizer,
            name=name or called(files[0]),
            licence=licence,
            checked=not unchecked,
            overwrite=overwrite,
        )
    from fastft.corpus import told

    if as_json:
        print(json.dumps(told.summary(corpus)))
        return
    told.show(corpus)
