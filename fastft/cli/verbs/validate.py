"""Check configuration, data and model without training."""

import json

from fastft import config as configuration
from fastft.cli.options import ConfigArg, JsonOpt, OverridesArg
from fastft.streams import results_only

COUNTED = ("rows", "empty", "truncated", "split", "dropped")
SHOWN = (*COUNTED, "overlong", "overlong_total", "longest")  # what the table says already


def run(config: ConfigArg, overrides: OverridesArg = None, as_json: JsonOpt = False) -> None:
    """Check configuration, data and model without training."""
    loaded = configuration.load(config, overrides or [])
    with results_only():
        from fastft.evaluate.validate import validate_run  # imports torch, which a wrong key need not wait for

        report = validate_run(loaded)
    if as_json:
        print(json.dumps(report))
        return
    from rich.markup import escape

    from fastft import terminal
    from fastft.train.footprint import Footprint

    rows = []
    for name, s in report["splits"].items():
        numbers = [*(s["counts"][c] for c in COUNTED), s["sequences"], s["longest"], s["tokens"], s["targets"]]
        rows.append([escape(name), *(f"{number:,}" for number in numbers)])
    out = terminal.console()
    terminal.print_table(out, ("set", *COUNTED, "sequences", "longest", "tokens", "targets"), rows)
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
