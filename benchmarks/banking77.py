"""fastft against Hugging Face Trainer: the same BERT, data and settings, side by side.

    python benchmarks/banking77.py --model PATH --data FOLDER   (train.csv and test.csv of banking77)

Every training runs in a process of its own. Throughput: short runs in turn, round by round; samples/s between the end
of the first and the end of the last step, and the median of the rounds' ratios. ``trainer, heap kept`` is Trainer under
the allocator settings that fastft makes for itself, to tell that share of the difference apart; ``trainer, by length``
the same with group_by_length. Accuracy: full
trainings (3 epochs) of fastft and Trainer, one after the other.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {"epochs": 3, "batch": 32, "lr": 1e-4, "warmup": 50, "max_length": 128, "seed": 17}
HEAP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
CONTENDERS = {
    "fastft": ("fastft", {}),
    "trainer": ("trainer", {}),
    "trainer, heap kept": ("trainer", HEAP),
    "trainer, by length": ("by_length", HEAP),
}


def run_fastft(model: str, data: Path, steps: int | None, folder: Path) -> dict:
    from fastft import config as configuration
    from fastft import track

    length = (
        [f"train.steps={steps}", "train.epochs=null", "data.eval={}"] if steps else [f"data.eval.test={data}/test.csv"]
    )
    config = [
        f"model.path={model}",
        f"data.train={data}/train.csv",
        f"run.dir={folder}/run",
        "run.offline=true",
        "train.log_every=100000",
        *length,
    ]
    yaml = ROOT / "configs" / "classification" / "banking77.yaml"
    subprocess.run(
        [sys.executable, "-m", "fastft", "train", str(yaml), *config],
        check=True,
        stdout=sys.stderr,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert configuration.load(yaml, config).batch.size == SETTINGS["batch"]
    records = track.read(folder / "run")
    first, last = [r for r in records if r["kind"] == "train"]
    accuracy = [r["accuracy"] for r in records if r["kind"] == "eval"]
    samples = (last["step"] - first["step"]) * SETTINGS["batch"]
    return {
        "samples_per_second": samples / (last["time"] - first["time"]),
        "accuracy": accuracy[-1] if accuracy else None,
    }


def run_trainer(model: str, data: Path, steps: int | None, folder: Path, order: str = "random") -> dict:
    import numpy as np
    import transformers
    from datasets import load_dataset

    files = {"train": f"{data}/train.csv", "test": f"{data}/test.csv"}
    sets = load_dataset("csv", data_files=files, cache_dir=str(folder / "cache")).class_encode_column("category")
    labels = sets["train"].features["category"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    sets = sets.map(
        lambda rows: tokenizer(rows["text"], truncation=True, max_length=SETTINGS["max_length"]), batched=True
    )
    sets = sets.rename_column("category", "labels").remove_columns("text")
    transformers.set_seed(SETTINGS["seed"])
    network = transformers.AutoModelForSequenceClassification.from_pretrained(
        model, num_labels=labels.num_classes, dtype="float32"
    )
    ends = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            ends.append(time.time())

    args = transformers.TrainingArguments(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=SETTINGS["batch"],
        per_device_eval_batch_size=64,
        num_train_epochs=SETTINGS["epochs"],
        max_steps=steps or -1,
        learning_rate=SETTINGS["lr"],
        lr_scheduler_type="linear",
        warmup_steps=SETTINGS["warmup"],
        seed=SETTINGS["seed"],
        train_sampling_strategy=order,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(
        model=network,
        args=args,
        train_dataset=sets["train"],
        eval_dataset=sets["test"],
        processing_class=tokenizer,
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
        callbacks=[Clock()],
        compute_metrics=lambda p: {"accuracy": float((np.argmax(p.predictions, -1) == p.label_ids).mean())},
    )
    trainer.train()
    accuracy = None if steps else trainer.evaluate()["eval_accuracy"]
    return {"samples_per_second": (len(ends) - 1) * SETTINGS["batch"] / (ends[-1] - ends[0]), "accuracy": accuracy}


def child(name: str, args: argparse.Namespace, steps: int | None) -> dict:
    """One training in a process of its own."""
    kind, env = CONTENDERS[name]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            __file__,
            "--model",
            args.model,
            "--data",
            str(args.data),
            "--child",
            kind,
            "--folder",
            folder,
            "--steps",
            str(steps or 0),
        ]
        output = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **env, "HF_HUB_OFFLINE": "1"}
        ).stdout
    return json.loads(output.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60, help="steps of a short run")
    parser.add_argument("--no-full", action="store_true", help="throughput only")
    parser.add_argument("--machine", default=f"{os.cpu_count()} cores {platform.machine()}")
    parser.add_argument("--child", choices=["fastft", "trainer", "by_length"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        given = args.model, args.data, args.steps or None, args.folder
        if args.child == "fastft":
            print(json.dumps(run_fastft(*given)))
        else:
            print(json.dumps(run_trainer(*given, "group_by_length" if args.child == "by_length" else "random")))
        return
    rounds = [
        {name: child(name, args, args.steps)["samples_per_second"] for name in CONTENDERS} for _ in range(args.rounds)
    ]
    full = {} if args.no_full else {name: child(name, args, None) for name in ("fastft", "trainer")}
    report(args, rounds, full)


def report(args: argparse.Namespace, rounds: list[dict], full: dict) -> None:
    versions = ", ".join(f"{p} {metadata.version(p)}" for p in ("torch", "transformers", "deepspeed", "accelerate"))
    lines = [
        "# banking77",
        "",
        "Written by `python benchmarks/banking77.py`, which says how.",
        "",
        f"{args.machine}: date {time.strftime('%Y-%m-%d')}, python {platform.python_version()}, {versions}",
        "",
        f"6-layer BERT (22.7 M parameters), fp32, {json.dumps(SETTINGS)}; {args.rounds} rounds of {args.steps} steps.",
        "",
        "| contender | samples/s (median) | fastft is faster by (median, min-max of rounds) | accuracy after 3 epochs "
        "| samples/s of the full run |",
        "|---|---|---|---|---|",
    ]
    for name in CONTENDERS:
        ratios = [r["fastft"] / r[name] for r in rounds]
        whole = full.get(name)
        lines.append(
            f"| {name} | {statistics.median(r[name] for r in rounds):.1f} "
            f"| {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) | "
            + (f"{whole['accuracy']:.4f} | {whole['samples_per_second']:.1f} |" if whole else "- | - |")
        )
    table = "\n".join(lines) + "\n"
    print(table)
    (ROOT / "benchmarks" / "results" / "banking77.md").write_text(table)


if __name__ == "__main__":
    main()
