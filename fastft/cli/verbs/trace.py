"""Which documents a training step learns from, and which steps learn from a document."""

import json
from pathlib import Path
from typing import Annotated

import typer

from fastft.cli.options import JsonOpt, OverridesArg
from fastft.errors import UserError
from fastft.streams import results_only


def run(
    target: Annotated[Path, typer.Argument(help="Run folder or configuration file.")],
    overrides: OverridesArg = None,
    step: Annotated[int | None, typer.Option(min=1, help="Optimizer step, counted from 1; default: 1.")] = None,
    document: Annotated[
        str | None,
        typer.Option(
            help="The steps that learn from it: file:row, or a corpus's source:file:row or id (fastft inspect)."
        ),
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """Which documents a training step learns from, and which steps learn from a document.

    Of a run folder, --document looks at the steps that were taken; of a configuration file at all.
    """
    if step is not None and document is not None:
        raise UserError("fastft trace: --step and --document: one at a time.")
    if document is not None:
        _of_document(target, overrides or [], document, as_json)
        return
    with results_only():
        from fastft.evaluate.trace import trace as find

        samples = find(target, overrides or [], step or 1)
    if as_json:
        print(json.dumps(samples))
        return
    for sample in samples:
        source = f" ({sample['source']})" if "source" in sample else ""
        print(f"sample {sample['sample']}{source}: " + "; ".join(sample["documents"]))


def _of_document(target: Path, overrides: list[str], document: str, as_json: bool) -> None:
    with results_only():
        from fastft.evaluate.trace import steps_of

        found = steps_of(target, overrides, document)
    if as_json:
        print(json.dumps(found))
        return
    for entry in found["steps"]:
        skipped = " (skipped: gradients were not finite)" if "skipped" in entry else ""
        print(f"step {entry['step']}{skipped}, sample {entry['sample']}: " + "; ".join(entry["documents"]))
    steps = len({entry["step"] for entry in found["steps"]})
    print(f"{steps:,} of the first {found['looked_at']:,} steps learn from {', '.join(found['documents'])}")
    if not found["samples"]:
        print("No sequence holds it: it was left out (data.truncation: drop).")
