"""Check configuration, data and model without training."""

import json

from fastft import config as configuration
from fastft.cli.options import ConfigArg, JsonOpt, OverridesArg, console

COUNTED = ("rows", "empty", "truncated", "split", "dropped")
SHOWN = (*COUNTED, "overlong", "overlong_total", "longest")  # what the table says already


def run(config: ConfigArg, overrides: OverridesArg = None, as_json: JsonOpt = False) -> None:
    """Check configuration, data and model without training."""
    loaded = configuration.load(config, overrides or [])
    from fastft.evaluate.validate import validate_run  # imports torch, which a wrong key need not wait for

    report = validate_run(loaded)
    if as_json:
        print(json.dumps(report))
        return
    from rich.table import Table

    from fastft.train.footprint import Footprint

    table = Table("set", *COUNTED, "sequences", "longest", "tokens", "targets")
    for name, s in report["splits"].items():
        numbers = [*(s["counts"][c] for c in COUNTED), s["sequences"], s["longest"], s["tokens"], s["targets"]]
        table.add_row(name, *(f"{number:,}" for number in numbers))
    out = console()
    out.print(table)
    for name, s in report["splits"].items():
        more = [f"{count.replace('_', ' ')} {n:,}" for count, n in s["counts"].items() if count not in SHOWN]
        if more:  # what only this task counts
            out.print(f"{name}: {', '.join(more)}.", highlight=False)
    for sentence in report["data"]:
        out.print(f"train: {sentence}", highlight=False, markup=False)
    new = f" Newly initialized: {', '.join(report['newly_initialized'])}." if report["newly_initialized"] else ""
    out.print(
        f"{report['steps']:,} steps of {report['sequences_per_step']:,} sequences, "
        f"at most {report['max_length']:,} tokens each; {report['parameters']:,} parameters, "
        f"{report['trained']:,} trained.{new}",
        highlight=False,
    )
    for sentence in Footprint(**report["footprint"]).sentences():
        out.print(sentence, highlight=False)
    for sentence in report["advice"]:
        out.print(f"warning: {sentence}", highlight=False, markup=False)
