"""Memory, time and money of a run before it begins: of a configuration, or of a model on more GPUs than are here."""

import json
from typing import Annotated, Any

import typer

from fastft.cli.options import JsonOpt
from fastft.streams import results_only


def run(
    target: Annotated[
        str | None,
        typer.Argument(help="Configuration (YAML) or run folder; or a model folder or hub id; or give --params."),
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="Of a configuration, such as parallel.zero=3.")] = None,
    params: Annotated[
        str | None, typer.Option(help="Number of parameters, such as 7B or 7e9, of a dense decoder of usual shape.")
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(help="GPUs (on a CPU, ranks), all data-parallel; default: a configuration's, those here; else 8."),
    ] = None,
    zero: Annotated[
        list[int] | None, typer.Option(help="Model: ZeRO stage; can be given several times; default: all.")
    ] = None,
    hardware: Annotated[
        str | None,
        typer.Option(
            help="a100, h100, h200, b200, or a YAML file of your own (docs/measured.md); default: of a configuration "
            "this machine, else h100."
        ),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Configuration: memory of a GPU, such as 80GB; default: the hardware's.")
    ] = None,
    price: Annotated[float | None, typer.Option(help="Configuration: of a GPU for an hour.")] = None,
    micro_batch: Annotated[int, typer.Option(help="Model: sequences per GPU and micro-step.")] = 1,
    sequence_length: Annotated[int, typer.Option(help="Model: tokens in a sequence.")] = 2048,
    accumulation: Annotated[int, typer.Option(help="Model: micro-steps per optimizer step.")] = 1,
    recompute: Annotated[bool, typer.Option("--recompute", help="Model: full activation recomputation.")] = False,
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
    """Memory, time and money of a run before it begins; for a configuration also what would make it fit."""
    from fastft.plan import report

    if target is not None and params is None and report.is_configuration(target):
        _configuration(target, overrides or [], gpus, hardware, memory, price, tokens, as_json)
        return
    report.only_of_configurations({"--memory": memory, "--price": price, "overrides": overrides})
    request = report.Request(
        8 if gpus is None else gpus,
        tuple(zero or (0, 1, 2, 3)),
        hardware or "h100",
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
        result = report.plan(report.shape(target, None if params is None else report.count(params)), request)
    if as_json:
        print(json.dumps(result))
        return
    from fastft import terminal

    out = terminal.console()
    terminal.print_table(out, report.COLUMNS, [report.cells(row, request.gpus) for row in result["stages"]])
    shape = result["model"]
    active = "" if shape["active"] is None else f" stored, {shape['active']:,} active for a token"
    out.print(
        f"{shape['parameters']:,} parameters{active}, {shape['layers']} layers of {shape['hidden']:,}; "
        f"{request.gpus:,} {request.hardware}, a failure every {report.duration(result['mtbf'])}. "
        "The constants are those of published H100 runs (benchmarks/results/plan.md).",
        highlight=False,
    )


def _configuration(
    target: str,
    overrides: list[str],
    gpus: int | None,
    hardware: str | None,
    memory: str | None,
    price: float | None,
    tokens: float | None,
    as_json: bool,
) -> None:
    with results_only():
        from fastft.plan import told

        result: dict[str, Any] = told.tell(target, overrides, told.Options(gpus, hardware, memory, price, tokens))
    if as_json:
        print(json.dumps(result))
        return
    from rich.markup import escape

    from fastft import terminal

    out = terminal.console()
    parts = result["memory"]["parts"]
    rows = [[name, f"{size / 1e9:.2f}", told.WHAT[name]] for name, size in parts.items()]
    when = f"of a step, at the fullest: {result['memory']['fullest']}"
    rows.append(["together", f"{sum(parts.values()) / 1e9:.2f}", when])
    terminal.print_table(out, ("part", "GB", "what"), rows, text=("what",))
    for sentence in told.lines(result):
        out.print(sentence, highlight=False, markup=False)
    if result["memory"]["fits"]:
        return
    if not result["changes"]:
        out.print("no change that fastft knows makes it fit.", highlight=False)
        return
    out.print("what makes it fit, the cheapest first:", highlight=False)
    offers = [
        [
            escape(told.change(c)),
            f"{c['ranks']:,}",
            f"{c['need'] / 1e9:.2f}",
            told.price(c, result["ranks"]),
        ]
        for c in result["changes"]
    ]
    terminal.print_table(out, ("change", "ranks", "GB", "price"), offers, text=("price",))
