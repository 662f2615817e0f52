"""Time steps of a configuration: tokens per second, and where a step's time goes."""

import json
import os
import signal
import sys
from typing import Annotated

import typer

from fastft import config as configuration
from fastft.cli.options import ConfigArg, JsonOpt, OverridesArg
from fastft.streams import results_only


def run(
    config: ConfigArg,
    overrides: OverridesArg = None,
    steps: Annotated[int, typer.Option(help="Steps that are timed, at least 3.")] = 20,
    warmup: Annotated[int, typer.Option(help="Steps before them, at least 1.")] = 5,
    as_json: JsonOpt = False,
) -> None:
    """Time steps of a configuration: tokens per second, and where a step's time goes.

    Nothing is evaluated, saved or exported. Several ranks: torchrun -m fastft bench CONFIG.
    """
    loaded = configuration.load(config, overrides or [])
    with results_only():
        from fastft.bench import bench  # imports torch, which a wrong key need not wait for
        from fastft.zero.engine import stop_process_group

        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # by way of what is to be undone
        try:
            report = bench(loaded, warmup, steps)
        finally:
            stop_process_group()
    if os.environ["RANK"] != "0":
        return
    if as_json:
        print(json.dumps(report))
        return
    from fastft import terminal

    out = terminal.console()
    rows = [_row(name, part, f"{part['share']:.1%}") for name, part in report["parts"].items()]
    rows.append(_row("step", report["step_seconds"], ""))
    machine, model, flops = report["machine"], report["model"], report["flops"]
    ranks = f"{machine['ranks']} rank{'s' if machine['ranks'] > 1 else ''}"
    title = f"{report['steps']} steps, {ranks} of {machine['threads']} threads"
    terminal.print_table(out, ("part", "ms", "min", "max", "share"), rows, title=title)
    limits, of = report["ceilings"], report["of_ceiling"]
    reduced = limits["all_reduce_bytes_per_second"]
    for sentence in (
        f"{model['class']}: {model['parameters']:,} parameters, {model['trained']:,} trained, {model['dtype']}, "
        f"ZeRO {model['zero']}.",
        f"tokens/s: {_rate(report['tokens_per_second'])}; samples/s: {_rate(report['samples_per_second'])}; "
        f"padding {report['padding']:.1%} of the tokens computed.",
        f"model FLOP/s utilization: {flops['utilization']:.1%} ({flops['per_token']:.3g} FLOP a token. "
        f"{flops['formula']})",
        f"ceilings, measured after the steps: copy {limits['copy_bytes_per_second'] / 1e9:,.1f} GB/s, "
        f"{model['dtype']} matrix product {limits['matmul_flops'] / 1e9:,.0f} GFLOP/s"
        + (f", all-reduce {reduced / 1e9:,.2f} GB/s." if reduced else ".")
        + f" Forward and backward are at {of['model']:.0%} of the product's rate, with padding; the optimizer is at "
        f"{of['optimizer']:.0%} of the copy's.",
        f"peak memory {report['peak_memory'] / 1e9:.2f} GB; "
        f"{report['start_seconds']:.1f} s to the end of the first step.",
        f"{machine['device']}; torch {machine['torch']}, deepspeed {machine['deepspeed']}, "
        f"transformers {machine['transformers']}, fastft {machine['fastft']}.",
        f"advice: {report['advice']}",
    ):
        out.print(sentence, highlight=False, markup=False)


def _row(name: str, part: dict, share: str) -> list[str]:
    return [name, *(f"{part[key] * 1e3:,.1f}" for key in ("median", "min", "max")), share]


def _rate(spread: dict) -> str:
    return f"{spread['median']:,.1f} ({spread['min']:,.1f} to {spread['max']:,.1f})"
