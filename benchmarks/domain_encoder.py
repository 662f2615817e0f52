"""What adapting an encoder to medical text by masked language modeling is worth to two tasks of that domain.

    python benchmarks/domain_encoder.py --data FOLDER --model FOLDER [--seeds 3] [--steps 40] [--quick]

The encoder learns masked tokens of the medical corpus of benchmarks/domains.py, from which what the tasks are tested on
is left out, too; then the two tasks begin from it (adapted) and from what it was before (plain), with the same rows,
settings and seed of the new head: ``qtype``, the kind of a medical question by its answer (instruct/medquad_qa; kinds
that are in the training rows), and ``entities``, chemicals and diseases (ner/bc5cdr).

The adapted encoder is one, the seeds are the tasks'. Every row is added to results/domain_encoder.jsonl when it is
there, and is not made again with the same settings; results/domain_encoder.md is made from the rows.
"""

import argparse
import gzip
import itertools
import json
import shutil
import statistics
import sys
import time
from pathlib import Path

import domain_texts as texts
from common import RESULTS, default_machine, versions

import fastft
from fastft import track

ROOT = Path(__file__).resolve().parent.parent
METRICS = {"qtype": ("accuracy", "f1_macro"), "entities": ("f1",)}
STARTS = ("plain", "adapted")
PACKAGES = ("torch", "transformers", "deepspeed")


def read_rows(path: Path) -> dict[str, dict]:
    """By name, the last of each."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {row["name"]: row for row in rows}


class Bench:
    """The rows so far, and what they need."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.work = args, args.work
        self.path = args.results / "domain_encoder.jsonl"
        names = ("steps", "adapt_lr", "rows", "epochs", "lr", "batch", "length", "held")
        self.settings = {name: getattr(args, name) for name in names}
        known = read_rows(self.path)
        self.rows = {name: row for name, row in known.items() if row["settings"] == self.settings}

    def add(self, name: str, row: dict) -> None:
        facts = {"machine": self.args.machine, "date": time.strftime("%Y-%m-%d"), **versions(PACKAGES)}
        self.rows[name] = {"name": name, "settings": self.settings, **row, **facts}
        self.args.results.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a") as f:
            f.write(json.dumps(self.rows[name]) + "\n")
        print(f"{name}: {row}", flush=True)

    def write_tasks(self) -> None:
        """Rows of the tasks, and the texts that they are tested on."""
        count, held = self.args.rows, self.args.held
        folder = self.args.data / "instruct" / "medquad_qa"
        train = [json.loads(line) for line in _read(folder / "train.jsonl.gz").splitlines()[:count]]
        known = {row["qtype"] for row in train}
        test = [json.loads(line) for line in _read(folder / "dev.jsonl").splitlines()]
        test = [row for row in test if row["qtype"] in known][:held]
        for split, chosen in (("train", train), ("test", test)):
            (self.work / f"qtype.{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
        for split, file, most in (("train", "train.conll.gz", count), ("test", "dev.conll.gz", held)):
            sentences = _read(self.args.data / "ner" / "bc5cdr" / file).split("\n\n")[:most]
            (self.work / f"entities.{split}.conll").write_text("\n\n".join(sentences) + "\n")
        spoken = [" ".join(line.split("\t")[0] for line in one.splitlines()) for one in sentences]
        rows = "".join(json.dumps({"text": text}) + "\n" for text in spoken)
        (self.work / "entities.test.jsonl").write_text(rows)

    def starts(self) -> dict[str, str]:
        """The two encoders, of the same parts: no pooler, which masked language modeling does not train."""
        import transformers

        plain, run, args = self.work / "plain", self.work / "adapt", self.args
        if "adapt" not in self.rows or not (run / "model").exists():
            shutil.rmtree(plain, ignore_errors=True)
            transformers.AutoModelForMaskedLM.from_pretrained(args.model).base_model.save_pretrained(plain)
            transformers.AutoTokenizer.from_pretrained(args.model).save_pretrained(plain)
            if not (self.work / "texts").exists():
                texts.write_texts(args.data / "corpus", self.work / "texts", 12)
            tested = (str(self.work / "qtype.test.jsonl"), str(self.work / "entities.test.jsonl"))
            corpus = texts.prepare(self.work / "texts", "medical", str(args.model), self.work / "corpus", tested)
            held = texts.held_out(self.work / "texts", "medical", 1000, 12, self.work / "held.jsonl")
            config = self.config("masked_lm", args.model, run, args.adapt_lr, 0)
            config["data"] |= {"train": str(self.work / "corpus"), "eval": str(held), "truncation": "split"}
            config["train"] = {"steps": args.steps, "eval_at_start": True, "log_every": 5}
            seconds = _fit(config)
            losses = [r["loss"] for r in track.read(run) if r["kind"] == "eval"]
            tokens = args.steps * args.batch * args.length
            row = {
                "before": losses[0],
                "after": losses[-1],
                "tokens": tokens,
                "of": corpus.manifest["totals"]["tokens"],
            }
            self.add("adapt", {**row, "seconds": seconds})
        return {"plain": str(plain), "adapted": str(run / "model")}

    def config(self, task: str, model: str | Path, run: Path, rate: float, seed: int) -> dict:
        return {
            "task": task,
            "model": {"path": str(model)},
            "data": {"max_length": self.args.length, "seed": seed},
            "batch": {"size": self.args.batch},
            "optim": {"lr": rate, "warmup": 0.1},
            "run": {"dir": str(run), "offline": True, "device": "cpu", "seed": seed},
        }

    def tune(self, task: str, start: str, seed: int, model: str) -> None:
        name = {"qtype": "classification", "entities": "token_classification"}[task]
        kind, own = ("jsonl", {"text": "answer", "label": "qtype"}) if task == "qtype" else ("conll", {})
        config = self.config(name, model, self.work / "tune", self.args.lr, seed)
        files = {split: str(self.work / f"{task}.{split}.{kind}") for split in ("train", "test")}
        config["data"] |= {"train": files["train"], "eval": {"test": files["test"]}, "truncation": "truncate", **own}
        config["train"] = {"epochs": self.args.epochs}
        seconds = _fit(config)
        summary = fastft.Run(self.work / "tune").summary
        self.add(f"{task}/{start}/{seed}", {**{m: summary.eval["test"][m] for m in METRICS[task]}, "seconds": seconds})


def _read(path: Path) -> str:
    content = path.read_bytes()
    return (gzip.decompress(content) if path.suffix == ".gz" else content).decode()


def _fit(config: dict) -> float:
    start = time.perf_counter()
    fastft.fit(config, overwrite=True, verbosity=-1)
    return time.perf_counter() - start


def page(rows: dict[str, dict]) -> str:
    """The results, from the rows alone."""
    title, _, about = str(__doc__).partition("\n\n")
    adapted, s = rows["adapt"], rows["adapt"]["settings"]
    facts = ", ".join(f"{name} {adapted[name]}" for name in ("date", *PACKAGES) if name in adapted)
    lines = ["# domain_encoder", "", title, "", about.strip().partition("\n\n")[2].strip(), ""]
    lines += [f"{adapted['machine']}; {facts}; fp32.", ""]
    lines += [
        f"Masked language modeling: {s['steps']} steps of {s['batch']} × {s['length']} tokens, {adapted['tokens']:,} "
        f"of the corpus's {adapted['of']:,}, rate {s['adapt_lr']:g}, {adapted['seconds']:.0f} s; masked loss of "
        f"held-out medical text {adapted['before']:.3f} before (the head is newly initialized where the model has "
        f"none), {adapted['after']:.3f} after. Tasks: {s['rows']} rows, {s['epochs']:g} epochs, rate {s['lr']:g}, "
        f"tested on at most {s['held']} rows.",
        "",
        "| task | metric | seeds | plain | adapted | mean gain | seeds with a gain |",
        "|---|---|---|---|---|---|---|",
    ]
    for task, metric in ((task, metric) for task, names in METRICS.items() for metric in names):
        seeds = sorted({name.split("/")[2] for name in rows if name.startswith(f"{task}/")})
        both = [[rows.get(f"{task}/{start}/{seed}") for start in STARTS] for seed in seeds]
        pairs = [(p[metric], a[metric]) for p, a in both if p and a]
        if pairs:
            told = [_spread([pair[i] for pair in pairs]) for i in (0, 1)]
            gain = _spread([a - p for p, a in pairs], "+")
            better = sum(a > p for p, a in pairs)
            lines.append(f"| {task} | {metric} | {len(pairs)} | {told[0]} | {told[1]} | {gain} | {better} |")
    return "\n".join([*lines, "", "Mean ± standard deviation over the seeds; a gain is of the same seed."]) + "\n"


def _spread(values: list[float], sign: str = "") -> str:
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.4f}{deviation}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="the folder of the data sets")
    parser.add_argument("--model", required=True, type=Path, help="folder of an encoder")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40, help="of masked language modeling")
    parser.add_argument("--adapt-lr", type=float, default=2e-4)
    parser.add_argument("--rows", type=int, default=240, help="of each task's training")
    parser.add_argument("--held", type=int, default=300, help="rows of each task's test, at most")
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--machine", default=default_machine())
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "domain_encoder", help="corpus and runs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="two steps and 16 rows: does it run?")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.rows, args.held, args.epochs, args.seeds, args.length = 2, 16, 8, 1, 1, 32
    if not (args.data / "corpus").is_dir():
        print(f"{args.data}: the data sets are not here: nothing is measured")
        return
    args.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(args)
    bench.write_tasks()
    models = bench.starts()
    for seed, task, start in itertools.product(range(1, args.seeds + 1), METRICS, STARTS):
        if f"{task}/{start}/{seed}" not in bench.rows:
            bench.tune(task, start, seed, models[start])
    (args.results / "domain_encoder.md").write_text(page(bench.rows))


if __name__ == "__main__":
    sys.exit(main())
