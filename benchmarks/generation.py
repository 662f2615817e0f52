"""What an evaluation generates, beside transformers' own ``generate`` on batches that are sorted by length.

    python benchmarks/generation.py --data FOLDER --smollm2 FOLDER [--sets gsm8k,sgd_chat] [--rows 16] [--rounds 2]

fastft             the batches of `fastft eval`: by the lengths of prompts and references, within batch.micro_tokens
sorted by N        N prompts at a time, sorted by length
as they come by N  in the order of the file

The same model, prompts, padding on the left, greedy, most new tokens. The contenders take turns; ratios are medians
over the rounds of (their seconds / fastft's). ``same``: share of rows with fastft's text: in other batches the logits
differ in their last bits, and a near tie may go the other way.
"""

import argparse
import json
import operator
import tempfile
from pathlib import Path

import common
import tasks
import torch
import yaml

from fastft import assemble
from fastft import config as configuration
from fastft.inference.forward import Forward
from fastft.inference.generate import prompts_padded
from fastft.train.evaluation import measure

SIZES = (4, 8, 16)
COLUMNS = {
    "set": "s",
    "rows": "d",
    "tokens": "d",
    "contender": "s",
    "seconds": ".1f",
    "fastft is faster by": ".2f",
    "same": ".3f",
}


def generating(name: str, args: argparse.Namespace, folder: Path):
    """A job, and the metrics of a set whose answers are to be generated."""
    case = tasks.conversations(name)
    rows = case(args.data, "dev")
    chosen = [rows[int(i * len(rows) / args.rows)] for i in range(min(args.rows, len(rows)))]
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in chosen))
    config = {
        "task": "sft",
        "model": {"path": args.smollm2},
        "data": {"eval": {"dev": str(file)}, "max_length": 1024, "truncation": "drop", "cache": str(folder / name)},
        "evaluation": {"metrics": ["rouge"], "generation": {"max_new_tokens": args.new_tokens}},
        "run": {"device": "cpu", "dir": str(folder / "run"), "offline": True, "threads": args.threads},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    job = assemble.start(configuration.load(path))
    job.learned = job.task.learned_of_model()
    assemble.add_data(job, train=False)
    assemble.add_model(job, "trained")
    assemble.add_objective(job)
    metrics, _ = measure(job, job.evals["dev"])
    return job, metrics


def contenders(job, metrics, args: argparse.Namespace) -> dict:
    model, tokenizer = job.model.eval(), job.task.tokenizer
    forward = Forward(model, model)
    prompts = [one.prompt.tolist() for _, one in metrics.asked]
    texts: dict[str, list[str]] = {}

    def ours() -> None:
        with torch.inference_mode():
            for _ in metrics.complete(forward, lambda n: n):
                pass
        texts["fastft"] = metrics.texts

    def theirs(name: str, order: list[int], size: int):
        def run() -> None:
            found = {}
            with torch.inference_mode():
                for start in range(0, len(order), size):
                    rows = order[start : start + size]
                    given = prompts_padded(tokenizer, [prompts[i] for i in rows], model.device)
                    out = model.generate(
                        **given,
                        max_new_tokens=args.new_tokens,
                        do_sample=False,
                        temperature=None,
                        top_p=None,
                        top_k=None,
                        pad_token_id=tokenizer.pad_token_id,
                    )
                    width = given["input_ids"].shape[1]
                    found |= {i: metrics._text(row[width:]) for i, row in zip(rows, out, strict=True)}
            texts[name] = [found[i] for i in range(len(prompts))]

        return run

    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    work = {"fastft": ours}
    for size in SIZES:
        work[f"sorted by {size}"] = theirs(f"sorted by {size}", by_length, size)
    work["as they come by 8"] = theirs("as they come by 8", list(range(len(prompts))), 8)
    return {"work": work, "texts": texts}


def measured(name: str, args: argparse.Namespace, folder: Path) -> list[dict]:
    job, metrics = generating(name, args, folder)
    found = contenders(job, metrics, args)
    times = common.interleave(found["work"], args.rounds, warmup=0)
    tokens = sum(metrics.lengths)
    return [
        {
            "set": name,
            "rows": len(metrics.asked),
            "tokens": tokens,
            "contender": contender,
            "seconds": min(times[contender]),
            "fastft is faster by": common.speedup(times, contender, "fastft"),
            "same": sum(map(operator.eq, found["texts"][contender], found["texts"]["fastft"])) / len(metrics.asked),
        }
        for contender in found["work"]
    ]


def main() -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
        parser.add_argument("--smollm2", required=True, help="folder of the model")
        parser.add_argument("--sets", default="gsm8k,sgd_chat")
        parser.add_argument("--rows", type=int, default=16)
        parser.add_argument("--new-tokens", type=int, default=32)

    args = common.arguments(__doc__.splitlines()[0], rounds=2, more=more)
    if args.quick:
        args.rows, args.new_tokens = 4, 8
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for name in args.sets.split(",") for row in measured(name, args, Path(folder))]
    common.record("generation", args, rows, COLUMNS)


if __name__ == "__main__":
    main()
