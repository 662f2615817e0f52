"""What adapting an encoder to medical text by masked language modeling is worth to two tasks of that domain.

    python benchmarks/domain_encoder.py --data FOLDER --model FOLDER|small [--seeds 3] [--steps N] [--quick]

The encoder learns masked tokens of the medical corpus of benchmarks/domains.py, from which what the tasks are tested on
is left out, too; then the two tasks begin from it (adapted) and from what it was before (plain), with the same rows,
settings and seed of the new head: ``qtype``, the kind of a medical question by its answer (instruct/medquad_qa; kinds
that are in the training rows), and ``entities``, chemicals and diseases (ner/bc5cdr). ``small`` is a BERT of 5.3 M
parameters with a tokenizer of its own, trained here on the corpora ``general`` and ``other`` from scratch; it has a
third start, which went on with those for as many steps (longer): what is due to the domain, and not to more training,
is the difference from that one.

The adapted encoder is one, the seeds are the tasks'. Every row is added to results/domain_encoder.jsonl when it is
there, and is not made again with the same settings; results/domain_encoder.md is made from the rows.
"""

import argparse
import gzip
import itertools
import json
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
SMALL = "small"
STARTS = {SMALL: ("plain", "longer", "adapted")}  # other models: the first and the last
# Steps from scratch, of adaptation; rates of both, of the tasks; their rows and epochs.
DEFAULTS = {
    SMALL: {"pretraining": 3000, "steps": 1000, "adapt_lr": 1e-3, "lr": 5e-4, "rows": 1000, "epochs": 4},
    "": {"pretraining": 0, "steps": 40, "adapt_lr": 2e-4, "lr": 2e-4, "rows": 240, "epochs": 2},
}
PACKAGES = ("torch", "transformers", "deepspeed")


def read_rows(path: Path) -> dict[str, dict]:
    """By name, MODEL/PART, the last of each."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {row["name"]: row for row in rows}


def starts(model: str) -> tuple[str, ...]:
    return STARTS.get(model, ("plain", "adapted"))


class Bench:
    """The rows so far, and what they need."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.model = SMALL if args.model == SMALL else Path(args.model).resolve().name
        self.work = args.work / self.model
        self.path = args.results / "domain_encoder.jsonl"
        names = ("steps", "adapt_lr", "rows", "epochs", "lr", "batch", "length", "held", "pretraining")
        self.settings = {name: value for name in names if (value := getattr(args, name))}
        own = f"{self.model}/"
        known = read_rows(self.path).items()
        self.rows = {n: row for n, row in known if not n.startswith(own) or row["settings"] == self.settings}
        self.work.mkdir(parents=True, exist_ok=True)

    def row(self, name: str) -> dict | None:
        return self.rows.get(f"{self.model}/{name}")

    def add(self, name: str, row: dict) -> None:
        facts = {"machine": self.args.machine, "date": time.strftime("%Y-%m-%d"), **versions(PACKAGES)}
        name = f"{self.model}/{name}"
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
        """Encoders to begin from, of the same parts: no pooler, which masked language modeling does not train."""
        if not (self.work / "texts").exists():
            part = self.work / "texts.part"
            texts.write_texts(self.args.data / "corpus", part, 12, 0.1 if self.args.quick else 1.0)
            part.rename(self.work / "texts")
        first = self.first()
        found = {"plain": first}
        for name in starts(self.model)[1:]:
            run = self.work / name
            if self.row(name) is None or not (run / "model").exists():
                of = ("general", "other") if name == "longer" else ("medical",)
                self.learn(name, of, first, self.args.steps, self.args.adapt_lr)
            found[name] = str(run / "model")
        return found

    def first(self) -> str:
        """What is adapted."""
        import transformers

        if self.model == SMALL:
            if self.row("plain") is None or not (self.work / "plain" / "model").exists():
                base = self.write_small(self.work / "base")
                self.learn("plain", ("general", "other"), base, self.args.pretraining, 2 * self.args.adapt_lr)
            return str(self.work / "plain" / "model")
        plain = self.work / "plain"
        if not plain.exists():
            transformers.AutoModelForMaskedLM.from_pretrained(self.args.model).base_model.save_pretrained(plain)
            transformers.AutoTokenizer.from_pretrained(self.args.model).save_pretrained(plain)
        return str(plain)

    def write_small(self, folder: Path) -> str:
        """Configuration and tokenizer (WordPiece, of the texts that are not of a domain); no weights."""
        import transformers
        from tokenizers import BertWordPieceTokenizer

        lines = [
            line for name in ("general", "other") for line in _read(self.work / "texts" / f"{name}.txt").split("\n")
        ]
        pieces = BertWordPieceTokenizer(lowercase=True)
        pieces.train_from_iterator(lines, vocab_size=8192, show_progress=False)
        tokenizer = transformers.BertTokenizerFast(tokenizer_object=pieces._tokenizer)
        tokenizer.save_pretrained(folder)
        transformers.BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=256,
            pad_token_id=tokenizer.pad_token_id,
            architectures=["BertForMaskedLM"],
        ).save_pretrained(folder)
        return str(folder)

    def learn(self, name: str, of: tuple[str, ...], model: str, steps: int, rate: float) -> None:
        """Masked tokens of these corpora, into <work>/<name>."""
        anew = not list(Path(model).glob("*.safetensors"))
        tested = (str(self.work / "qtype.test.jsonl"), str(self.work / "entities.test.jsonl"))
        corpora = [texts.prepare(self.work / "texts", one, model, self.work / "corpora" / one, tested) for one in of]
        held = texts.held_out(self.work / "texts", "medical", 1000, 12, self.work / "held.jsonl")
        config = self.config("masked_lm", model, self.work / name, rate, 0)
        sources = [{"path": str(self.work / "corpora" / one)} for one in of]
        config["model"]["init"] = "random" if anew else "pretrained"
        config["data"] |= {"train": sources, "eval": str(held), "truncation": "split"}
        config["train"] = {"steps": steps, "eval_at_start": True, "log_every": 5}
        seconds = _fit(config)
        losses = [r["loss"] for r in track.read(self.work / name) if r["kind"] == "eval"]
        row = {"before": losses[0], "after": losses[-1], "tokens": steps * self.args.batch * self.args.length}
        row |= {"of": sum(corpus.manifest["totals"]["tokens"] for corpus in corpora), "seconds": seconds}
        self.add(name, row)

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
    lines = ["# domain_encoder", "", title, "", about.strip().partition("\n\n")[2].strip(), ""]
    for model in sorted({name.partition("/")[0] for name in rows}):
        if f"{model}/adapted" in rows:
            lines += section(model, rows)
    return "\n".join([*lines, "Mean ± standard deviation over the seeds; a gain is of the same seed."]) + "\n"


def section(model: str, rows: dict[str, dict]) -> list[str]:
    adapted, s = rows[f"{model}/adapted"], rows[f"{model}/adapted"]["settings"]
    facts = ", ".join(f"{name} {adapted[name]}" for name in ("date", *PACKAGES) if name in adapted)
    lines = [f"## {model}", "", f"{adapted['machine']}; {facts}; fp32.", ""]
    lines += ["Masked language modeling; the loss is of masked tokens of held-out medical text.", ""]
    lines += [
        f"| | steps of {s['batch']} × {s['length']} | tokens | of the corpus's | rate | loss before | after | seconds |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for name in starts(model):
        if row := rows.get(f"{model}/{name}"):
            steps, rate = (s["pretraining"], 2 * s["adapt_lr"]) if name == "plain" else (s["steps"], s["adapt_lr"])
            lines.append(
                f"| {name} | {steps:,} | {row['tokens']:,} | {row['of']:,} | {rate:g} | {row['before']:.3f} "
                f"| {row['after']:.3f} | {row['seconds']:.0f} |"
            )
    lines += [
        "",
        f"Tasks: {s['rows']:,} rows, {s['epochs']:g} epochs, rate {s['lr']:g}, tested on at most {s['held']} rows.",
        "",
        f"| task | metric | seeds | {' | '.join(starts(model))} "
        f"| {' | '.join(f'adapted - {name}, seeds with a gain' for name in starts(model)[:-1])} |",
        "|" + "---|" * (2 + 2 * len(starts(model))),
    ]
    for task, metric in ((task, metric) for task, names in METRICS.items() for metric in names):
        seeds = sorted({name.split("/")[3] for name in rows if name.startswith(f"{model}/{task}/")})
        every = [[rows.get(f"{model}/{task}/{start}/{seed}") for start in starts(model)] for seed in seeds]
        found = [[row[metric] for row in of if row] for of in every if all(of)]
        if found:
            cells = [_spread([values[i] for values in found]) for i in range(len(starts(model)))]
            for i in range(len(starts(model)) - 1):
                better = sum(values[-1] > values[i] for values in found)
                cells.append(f"{_spread([values[-1] - values[i] for values in found], '+')}, {better}")
            lines.append(f"| {task} | {metric} | {len(found)} | {' | '.join(cells)} |")
    return [*lines, ""]


def _spread(values: list[float], sign: str = "") -> str:
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.4f}{deviation}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="the folder of the data sets")
    parser.add_argument("--model", required=True, help="folder of an encoder, or small")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pretraining", type=int, help="steps from scratch, of the small one")
    parser.add_argument("--steps", type=int, help="of adaptation")
    parser.add_argument("--adapt-lr", type=float)
    parser.add_argument("--rows", type=int, help="of each task's training")
    parser.add_argument("--held", type=int, default=300, help="rows of each task's test, at most")
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--lr", type=float, help="of the tasks")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--machine", default=default_machine())
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "domain_encoder", help="corpus and runs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="two steps and 16 rows: does it run?")
    args = parser.parse_args()
    for name, value in DEFAULTS.get(args.model, DEFAULTS[""]).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.quick:
        args.pretraining = args.pretraining and 2
        args.steps, args.rows, args.held, args.epochs, args.seeds, args.length = 2, 16, 8, 1, 1, 32
    if not (args.data / "corpus").is_dir():
        print(f"{args.data}: the data sets are not here: nothing is measured")
        return
    bench = Bench(args)
    bench.write_tasks()
    models = bench.starts()
    for seed, task, start in itertools.product(range(1, args.seeds + 1), METRICS, models):
        if bench.row(f"{task}/{start}/{seed}") is None:
            bench.tune(task, start, seed, models[start])
    (args.results / "domain_encoder.md").write_text(page(bench.rows))


if __name__ == "__main__":
    sys.exit(main())
