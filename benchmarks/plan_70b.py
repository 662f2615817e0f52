"""What `fastft plan` says of a 70 B model on one node of 8 x 80 GB, and on 64: a page of arithmetic, nothing measured.

python benchmarks/plan_70b.py [--out FILE]
"""

import argparse
import json
import tempfile
from pathlib import Path

from fastft.plan import report, told

OUT = Path(__file__).resolve().parent / "results" / "plan_70b.md"
# Llama 3 70B's sizes (Grattafiori et al. 2024, arXiv 2407.21783, table 3)
MODEL = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
         "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
         "max_position_embeddings": 8192, "tie_word_embeddings": False, "dtype": "bfloat16"}  # fmt: skip
CONFIG = {
    "task": "causal_lm",
    "model": {"path": "70b", "dtype": "bf16"},
    "data": {"train": "text.jsonl", "max_length": 4096},
    "batch": {"size": 128, "micro": 1},
    "parallel": {"zero": 3},
}
TOKENS, PRICE = 1e9, 2.5
CASES = {
    "all weights": (),
    "all weights, checkpointing": ("parallel.activation_checkpointing=true",),
    "all weights, checkpointing, int8 state, bf16 masters": (
        "parallel.activation_checkpointing=true", "optim.state_dtype=int8", "optim.master=stochastic"),
    "LoRA, checkpointing": ("model.lora={r: 16}", "parallel.activation_checkpointing=true"),
}  # fmt: skip
PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "buckets", "process")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "70b").mkdir()
        (folder / "70b/config.json").write_text(json.dumps(MODEL))
        config = {**CONFIG, "model": {**CONFIG["model"], "path": str(folder / "70b")}}
        (folder / "config.yaml").write_text(json.dumps(config))
        sections = [part(folder / "config.yaml", gpus) for gpus in (8, 64)]
    text = "\n\n".join([
        "# A 70 B model on 8 and on 64 GPUs of 80 GB",
        "Written by `python benchmarks/plan_70b.py`; nothing here is measured. It is what `fastft plan CONFIG "
        "--hardware h100` says: the parts of a GPU's memory at the moment of a step at which it is fullest, in GB (10⁹ "
        "bytes). Its formulas are held to measured runs of up to 135 M parameters on a CPU "
        "([plan_memory](plan_memory.md)), its times to published H100 runs of others ([plan](plan.md)); on a GPU none "
        "of the memory was measured yet, and `process` is an allowance.",
        f"The configuration, with the overrides that each row names; {TOKENS:,.0f} tokens, and {PRICE} a GPU-hour as "
        "an example of a price:\n\n```json\n" + json.dumps(CONFIG, indent=1) + "\n```",
        *sections,
    ]) + "\n"  # fmt: skip
    args.out.write_text(text)
    print(text)


def part(config: Path, gpus: int) -> str:
    """The section of so many GPUs."""
    results = {}
    for name, overrides in CASES.items():
        options = told.Options(ranks=gpus, hardware="h100", price=PRICE, tokens=TOKENS)
        results[name] = told.tell(str(config), overrides, options)
    columns = ("run", *PARTS, "together", "fits", "fullest", "step", "hours", "GPU-hours", "price")
    rows = []
    for name, found in results.items():
        memory, time = found["memory"], found["time"]
        rows.append([name, *(f"{memory['parts'][p] / 1e9:.1f}" for p in PARTS), f"{memory['need'] / 1e9:.1f}",
                     "yes" if memory["fits"] else "no", memory["fullest"], report.duration(time["step_seconds"]),
                     f"{time['hours']:,.1f}", f"{time['gpu_hours']:,.0f}", f"{time['cost']:,.0f}"])  # fmt: skip
    plain = results["all weights"]
    model, around = plain["model"], plain["memory"]["around"]
    lines = [
        f"## {gpus} GPUs" + (", one node" if gpus == 8 else f", {gpus // 8} nodes"),
        f"{model['parameters']:,} parameters. While it is loaded every rank holds its part in its host's memory: "
        f"{around['loading on the host'] / 1e9:,.0f} GB a rank, {8 * around['loading on the host'] / 1e9:,.0f} GB for "
        f"the 8 of a node. A checkpoint's copy takes {around['checkpoint'] / 1e9:,.0f} GB of the host's memory a rank, "
        f"the export {around['export'] / 1e9:,.0f} GB on rank 0.",
        markdown(columns, rows),
    ]
    for name, found in results.items():
        if found["memory"]["fits"]:
            continue
        offers = [[told.change(c), c["ranks"], f"{c['need'] / 1e9:.1f}", told.price(c, gpus)] for c in found["changes"]]
        lines.append(f"What would make “{name}” fit, the cheapest first:")
        lines.append(markdown(("change", "GPUs", "GB", "price"), offers) if offers else "nothing that fastft knows.")
    return "\n\n".join(lines)


def markdown(columns, lines) -> str:
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [columns, ["---"] * len(columns), *lines])


if __name__ == "__main__":
    main()
