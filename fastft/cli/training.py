"""What train and resume share: their options, the run in its process group, and what is printed at its end."""

import json
import os
from typing import Annotated

import typer

from fastft.config import Config
from fastft.streams import results_only

SummaryOpt = Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object.")]
QuietOpt = Annotated[bool, typer.Option("--quiet", "-q", help="No progress: warnings, errors and the summary only.")]
VerboseOpt = Annotated[
    bool, typer.Option("--verbose", "-v", help="Also gradient norms, padding, and which kernels were picked and why.")
]


def run_training(
    config: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    as_json: bool = False,
    quiet: bool = False,
    verbose: bool = False,
) -> None:
    """Train, and print the summary on standard output; everything else goes to standard error."""
    from fastft import track

    track.set_verbosity(-1 if quiet else 1 if verbose else 0)
    with results_only():
        from fastft.train import loop
        from fastft.train.signals import end_with_run
        from fastft.zero.engine import stop_process_group

        end_with_run()
        try:
            result = loop.resumed(config) if resume else loop.train(config, overwrite=overwrite)
        finally:
            stop_process_group()
    if os.environ["RANK"] != "0":
        return
    if as_json:
        print(json.dumps(track.finite(result)))
        return
    for name, metrics in result["eval"].items():
        print(f"{name}: {format_metrics(metrics)}")
    steps = f"{result['step']} steps, {result['tokens_per_second']:,.0f} tokens/s."
    print(f"{steps} Model: {result['model']}")
    if best := result["best"]:
        taken = " (exported)" if result["exported_step"] == best["step"] else ""
        print(f"best: step {best['step']}{taken}, {best['metric']} {best['value']:.4g}")


def format_metrics(metrics: dict) -> str:
    return "  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items())
