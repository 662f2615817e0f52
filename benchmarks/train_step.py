"""What a user gains: training steps of a small bfloat16 decoder with a large vocabulary on the CPU,
our ops against plain torch.

The same Llama (4 layers of width 512, tied embeddings), the same loop (forward, backward, optimizer step), the same
batches; each contender in processes of its own that take turns, so that a neighbour's load hits both and the resident
set is its own.

fastft     the loss at the head by linear_cross_entropy, FusedAdamW
torch      F.cross_entropy of the model's logits, torch.optim.AdamW(fused=True)

    python benchmarks/train_step.py [--keep-heap] [--machine NAME] [--rounds 3]
"""

import json
import statistics
import subprocess
import sys
import time

import common
import torch
import torch.nn.functional as F

VOCABULARIES = (50257, 151936)
ROWS, LENGTH = 4, 512  # sequences of a step, tokens of each
STEPS = 4  # timed steps of a process, after one that is not
COLUMNS = {
    "vocab": "d",
    "tokens a step": "d",
    "parameters M": ".0f",
    "torch tok/s": ".0f",
    "fastft tok/s": ".0f",
    "speedup": ".2f",
    "torch GB": ".2f",
    "fastft GB": ".2f",
    "memory": ".2f",
    "torch loss": ".4f",
    "fastft loss": ".4f",
}


def train(name: str, vocab: int, rows: int, length: int) -> dict:
    """In a process of its own: seconds of each step, bytes by which training raised the resident set over the model's,
    last loss.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from fastft.models.head import FusedHead
    from fastft.optim import FusedAdamW

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=length,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).bfloat16().train()
    tokens = torch.randint(vocab, (rows, length + 1))
    inputs, target = {"input_ids": tokens[:, :-1], "use_cache": False}, tokens[:, 1:].contiguous()
    if name == "fastft":
        head, optimizer = FusedHead(model), FusedAdamW(model.parameters(), lr=1e-4)
        loss_of = lambda: head.loss(model, inputs, target)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
        loss_of = lambda: F.cross_entropy(model(**inputs).logits.flatten(0, 1), target.flatten())
    seconds, losses = [], []

    def steps():
        for _ in range(1 + STEPS):
            start = time.perf_counter()
            loss = loss_of()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
            seconds.append(time.perf_counter() - start)

    before, peak = common.peak_memory(steps)
    return {
        "seconds": seconds[1:],
        "bytes": peak - before,
        "loss": losses[-1],
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def case(vocab: int, rows: int, length: int, args) -> dict:
    found: dict[str, list[dict]] = {"torch": [], "fastft": []}
    for r in range(args.rounds):
        for name in sorted(found, reverse=r % 2 == 0):
            command = [sys.executable, __file__, "--measure", name, *map(str, (vocab, rows, length, args.threads))]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[name].append(json.loads(output.splitlines()[-1]))
    losses = {name: runs[0]["loss"] for name, runs in found.items()}
    if abs(losses["fastft"] - losses["torch"]) > 0.02 * losses["torch"]:  # bfloat16 losses and weights on both sides
        raise SystemExit(f"the two losses part: {losses}; not reported")
    seconds = {name: [min(run["seconds"]) for run in runs] for name, runs in found.items()}
    memory = {name: statistics.median(run["bytes"] for run in runs) for name, runs in found.items()}
    row = {
        "vocab": vocab,
        "tokens a step": rows * length,
        "parameters M": found["fastft"][0]["parameters"] / 1e6,
        "speedup": common.speedup(seconds, "torch", "fastft"),
        "memory": memory["fastft"] / memory["torch"],
    }
    for name in found:
        row |= {
            f"{name} tok/s": rows * length / min(seconds[name]),
            f"{name} GB": memory[name] / 1e9,
            f"{name} loss": losses[name],
        }
    return row


def plot(rows: list[dict]) -> None:
    """results/train_step.svg: tokens per second and memory, side by side."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axis, (unit, title) in zip(
        axes, (("tok/s", "tokens per second"), ("GB", "GB above the model, at most")), strict=True
    ):
        for i, (name, colour) in enumerate((("torch", "0.6"), ("fastft", "tab:blue"))):
            bars = axis.bar(
                [k + 0.4 * i for k in range(len(rows))],
                [row[f"{name} {unit}"] for row in rows],
                0.38,
                label=name,
                color=colour,
            )
            axis.bar_label(bars, fmt="%.0f" if unit == "tok/s" else "%.2f")
        axis.set_xticks([k + 0.2 for k in range(len(rows))], [f"{row['vocab']:,} classes" for row in rows])
        axis.set_title(title)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.savefig(common.RESULTS / "train_step.svg")


def main():
    if sys.argv[1:2] == ["--measure"]:
        name, vocab, rows, length, threads = sys.argv[2:]
        torch.set_num_threads(int(threads))
        return print(json.dumps(train(name, int(vocab), int(rows), int(length))))
    args = common.arguments(__doc__.splitlines()[0], rounds=3)
    rows, length = (1, 64) if args.quick else (ROWS, LENGTH)
    if args.quick:
        args.rounds = 1
    table = [case(vocab, rows, length, args) for vocab in VOCABULARIES]
    common.record("train_step", args, table, COLUMNS)
    if not args.quick:
        plot(table)


if __name__ == "__main__":
    main()
