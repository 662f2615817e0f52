"""Memory, step time, communication and days of a run on more GPUs than are here."""

import json
from typing import Annotated

import typer

from fastft.cli.options import JsonOpt
from fastft.streams import results_only


def run(
    model: Annotated[str | None, typer.Argument(help="Model folder or hub id; or give --params.")] = None,
    params: Annotated[
        str | None, typer.Option(help="Number of parameters, such as 7B or 7e9, of a dense decoder of usual shape.")
    ] = None,
    gpus: Annotated[int, typer.Option(help="GPUs, all data-parallel.")] = 8,
    zero: Annotated[
        list[int] | None, typer.Option(help="ZeRO stage; can be given several times; default: all.")
    ] = None,
    hardware: Annotated[
        str, typer.Option(help="a100, h100, h200, b200, or a YAML file of your own (docs/measured.md).")
    ] = "h100",
    micro_batch: Annotated[int, typer.Option(help="Sequences per GPU and micro-step.")] = 1,
    sequence_length: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 2048,
    accumulation: Annotated[int, typer.Option(help="Micro-steps per optimizer step.")] = 1,
    recompute: Annotated[bool, typer.Option("--recompute", help="Full activation recomputation.")] = False,
    tokens: Annotated[float | None, typer.Option(help="Tokens to train on, such as 1e12.")] = None,
    save_seconds: Annotated[float, typer.Option(help="Seconds that training stands still per checkpoint.")] = 60.0,
    restart_seconds: Annotated[float, typer.Option(help="Seconds from a failure to the next step.")] = 600.0,
    stall: Annotated[float, typer.Option(help="Seconds per step that nothing hides (data, logging).")] = 0.0,
    efficiency: Annotated[
        float | None, typer.Option(help="Share of peak FLOP/s in matrix products; default: fitted on H100 runs.")
    ] = None,
    gpus_per_node: Annotated[int | None, typer.Option(help="Default: 8.")] = None,
    node_gbits: Annotated[
        float | None, typer.Option(help="Gbit/s and direction between nodes, all cards of a node together.")
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """Memory, step time, communication and days of a run on more GPUs than are here."""
    from fastft.plan import report

    request = report.Request(
        gpus,
        tuple(zero or (0, 1, 2, 3)),
        hardware,
        micro_batch,
        sequence_length,
        accumulation,
        recompute,
        tokens,
        save_seconds,
        restart_seconds,
        stall,
        efficiency,
        gpus_per_node,
        node_gbits,
    )
    with results_only():
        result = report.plan(report.shape(model, None if params is None else report.count(params)), request)
    if as_json:
        print(json.dumps(result))
        return
    from fastft import terminal

    out = terminal.console()
    terminal.print_table(out, report.COLUMNS, [report.cells(row, gpus) for row in result["stages"]])
    shape = result["model"]
    out.print(
        f"{shape['parameters']:,} parameters, {shape['layers']} layers of {shape['hidden']:,}; "
        f"{gpus:,} {hardware}, a failure every {report.duration(result['mtbf'])}. "
        "The constants are those of published H100 runs (benchmarks/results/plan.md).",
        highlight=False,
    )
