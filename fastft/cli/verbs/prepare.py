"""Make a corpus of raw files: clean, free of duplicates, tokenized once."""

import json
from typing import Annotated

import typer

from fastft.cli.options import ConfigArg, JsonOpt, OverridesArg
from fastft.streams import results_only


def run(
    config: ConfigArg,
    overrides: OverridesArg = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a corpus that was made from other files or settings.")
    ] = False,
    as_json: JsonOpt = False,
) -> None:
    """Make a corpus of raw files: clean, free of duplicates, tokenized once.

    A run that was interrupted goes on where it was when it is started again.
    """
    from fastft.config.corpus import load_corpus

    loaded = load_corpus(config, overrides or [])
    with results_only():
        from fastft.corpus.build import prepare
        from fastft.corpus.progress import Progress

        with Progress() as progress:
            corpus = prepare(loaded, overwrite, progress)
    from fastft.corpus import told

    if as_json:
        print(json.dumps(told.summary(corpus)))
        return
    told.show(corpus)
