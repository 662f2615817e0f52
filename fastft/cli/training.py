"""What train and resume share: the run in its process group, and what is printed at its end."""

import os

from fastft.config import Config


def run_training(config: Config, *, resume: bool = False, overwrite: bool = False) -> None:
    from fastft.train import loop
    from fastft.zero.engine import stop_process_group

    try:
        result = loop.resumed(config) if resume else loop.train(config, overwrite=overwrite)
    finally:
        stop_process_group()
    if os.environ["RANK"] != "0":
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
