"""Adapting models to four domains: what `fastft prepare` leaves of the texts, what is learned, what is forgotten.

    python benchmarks/domains.py --data FOLDER [--smollm2 FOLDER] [--cases 'small/*'] [--quick]

Medical, legal, finance and education text is prepared with all rules (documents in parts of 4 KB), without
near-duplicates and without any 13 words in a row of a held-out passage. Two models learn each domain by LoRA (rank 16)
and in full, with and without a quarter of general text beside it (replay), with as many tokens in each run:

smollm2  SmolLM2-135M-Instruct, which has read far more than these texts
small    a Llama of 4.2 M parameters with a tokenizer of its own, trained here on ``general`` and ``other`` from scratch

Perplexity is of held-out passages: of the domain; ``general``, encyclopedia articles other than those that are
replayed; ``other``, plays, which are never replayed. It is by token of the model's own tokenizer: compare it within a
model. The passages are few: a change is of the same tokens before and after, but one of less than 0.02 nats says
nothing. Learning rates were not tuned, and are the same for all domains: in full 1e-4 for SmolLM2, and for the small
model, which has learned little yet, a quarter of the rate that it began with; by LoRA ten times that. A replayed token
is one less of the domain.

A case is MODEL/DOMAIN/METHOD/plain or replay. Its row is added to results/domains.jsonl when it ends, and a case that
has a row of the same settings is not run again; results/domains.md and the pictures are made from the rows. The
corpora and runs stay in --work.
"""

import argparse
import fnmatch
import itertools
import json
import math
import platform
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import domain_texts as texts
from common import RESULTS, default_machine, versions

import fastft
from fastft import quickstart, track
from fastft.evaluate import forgetting

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "deepspeed", "peft")
METHODS, KINDS = ("lora", "full"), ("plain", "replay")
SETS = ("domain", "general", "other")
REPLAY = 0.25
PICTURES = ("curves", "pareto")


@dataclass(frozen=True)
class Budget:
    """What a run of a model takes.

    Attributes
    ----------
    steps, batch, length : int
        Sequences of so many tokens.
    every : int
        Steps between evaluations.
    characters, documents : int
        Of the held-out passages, of so many documents.
    rates : dict
        Learning rate by method.
    pretraining : int
        Steps from scratch, at the rate ``from_scratch``.
    """

    steps: int
    batch: int
    length: int
    every: int
    characters: int
    documents: int
    rates: dict[str, float]
    pretraining: int = 0
    from_scratch: float = 2e-3


BUDGETS = {
    "smollm2": Budget(8, 2, 256, 4, 500, 10, {"full": 1e-4, "lora": 1e-3}),
    "small": Budget(24, 8, 256, 6, 1500, 10, {"full": 5e-4, "lora": 5e-3}, pretraining=200),
}
QUICK = Budget(2, 2, 64, 1, 300, 3, {"full": 1e-4, "lora": 1e-3}, pretraining=2)


Rows = dict[tuple[str, str], dict]  # by kind (corpus, pretraining, run) and name


def read_rows(path: Path) -> Rows:
    """The last of each."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {(row["kind"], row["name"]): row for row in rows}


class Bench:
    """The rows so far, and what a case needs, each made when it is first asked for."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.work, self.path = args.work, args.results / "domains.jsonl"
        self.budgets = {"small": QUICK} if args.quick else BUDGETS
        self.rows = read_rows(self.path)
        if not (self.work / "texts").exists():
            unfinished = self.work / "texts.part"
            texts.write_texts(args.data, unfinished, 3 if args.quick else 12, 0.1 if args.quick else 1.0)
            unfinished.rename(self.work / "texts")

    def add(self, kind: str, name: str, row: dict) -> None:
        facts = {"machine": self.args.machine, "date": time.strftime("%Y-%m-%d"), "python": platform.python_version()}
        facts |= {"fastft": fastft.__version__, **versions(PACKAGES)}
        self.rows[kind, name] = {"kind": kind, "name": name, **row, **facts}
        self.args.results.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a") as f:
            f.write(json.dumps(self.rows[kind, name]) + "\n")

    def corpus(self, model: str, name: str) -> str:
        output = self.work / model / "corpora" / name
        start = time.perf_counter()
        corpus = texts.prepare(self.work / "texts", name, self.tokenizer(model), output)
        if self.rows.get(("corpus", f"{model}/{name}"), {}).get("manifest") != corpus.digest:
            row = {"manifest": corpus.digest, **texts.told(corpus), "seconds": time.perf_counter() - start}
            self.add("corpus", f"{model}/{name}", row)
        return str(output)

    def tokenizer(self, model: str) -> str:
        """Folder of the model to start from; of ``small`` it has no weights."""
        if model == "smollm2":
            return str(self.args.smollm2)
        base = self.work / "small" / "base"
        if not base.exists():
            part = self.work / "small" / "base.part"
            learned = self.work / "small" / "tokenizer"  # write_base reads <name>.train.jsonl
            learned.mkdir(parents=True, exist_ok=True)
            lines = (self.work / "texts" / "general.txt").read_text().splitlines(keepends=True)
            lines += (self.work / "texts" / "other.txt").read_text().splitlines(keepends=True)
            rows = "".join(json.dumps({"text": line}) + "\n" for line in lines if line.strip())
            (learned / "general.train.jsonl").write_text(rows)
            quickstart.write_base(part, learned)
            part.rename(base)
        return str(base)

    def model(self, model: str) -> str:
        if model == "smollm2":
            return self.tokenizer(model)
        budget, run = self.budgets[model], self.work / "small" / "pretraining"
        settings = {"steps": budget.pretraining, "batch": budget.batch, "length": budget.length}
        row = self.rows.get(("pretraining", "small"), {})
        if row.get("settings") != settings or not (run / "model").exists():
            sources = [{"path": self.corpus(model, name)} for name in ("general", "other")]
            found = self.fit(model, run, "general", sources, "full", self.tokenizer(model), budget.pretraining)
            self.add("pretraining", "small", {"settings": settings, **found})
        return str(run / "model")

    def fit(self, model: str, run: Path, domain: str, sources: list[dict], method: str, path: str, steps: int) -> dict:
        """Train; evaluations of the sets domain, general and other, and what it took."""
        budget = self.budgets[model]
        held = {
            name: texts.held_out(
                self.work / "texts", of, budget.characters, budget.documents, self.work / model / "held" / f"{of}.jsonl"
            )
            for name, of in {"domain": domain, "general": "general", "other": "other"}.items()
        }
        start_anew = path == self.tokenizer("small") if model == "small" else False
        rate = budget.from_scratch if start_anew else budget.rates[method]
        config = {
            "task": "causal_lm",
            "model": {"path": path, "init": "random" if start_anew else "pretrained"},
            "data": {
                "train": sources,
                "eval": {name: str(file) for name, file in held.items()},
                "max_length": budget.length,
                "truncation": "split",
            },
            "batch": {"size": budget.batch},
            "optim": {"lr": rate, "schedule": "cosine", "warmup": 0.1, "min_lr_ratio": 0.1},
            "train": {"steps": steps, "log_every": 1},
            "run": {"dir": str(run), "offline": True, "device": "cpu"},
        }
        if method == "lora":
            config["model"]["lora"] = {"r": 16}
        if not start_anew:
            config["train"] |= {"eval_every": budget.every, "forgetting": {}}
        start = time.perf_counter()
        summary = fastft.fit(config, overwrite=True, verbosity=-1).summary
        seconds = time.perf_counter() - start
        records = list(track.read(run))
        evals = [{k: r[k] for k in ("step", "set", "loss", "tokens")} for r in records if r["kind"] == "eval"]
        tokens = steps * budget.batch * budget.length
        return {"evals": evals, "tokens": tokens, "seconds": seconds, "tokens_per_second": summary.tokens_per_second}

    def run(self, case: str) -> None:
        """A case, unless it has a row of the same settings."""
        model, domain, method, kind = case.split("/")
        settings = {**asdict(self.budgets[model]), "replay": REPLAY if kind == "replay" else 0}
        if self.rows.get(("run", case), {}).get("settings") == settings:
            print(f"{case}: there already", flush=True)
            return
        start = self.model(model)
        sources = [{"path": self.corpus(model, domain), "weight": 1 - settings["replay"]}]
        if kind == "replay":
            sources.append({"path": self.corpus(model, "general"), "weight": REPLAY})
        run = self.work / model / "runs" / domain / f"{method} {kind}"
        found = self.fit(model, run, domain, sources, method, start, self.budgets[model].steps)
        shutil.rmtree(run / "checkpoints", ignore_errors=True)  # 1.6 GB for each run in full
        shutil.rmtree(run / "model", ignore_errors=True)
        points = [asdict(p) for (curve,) in [forgetting.curves([run], None, None).values()] for p in curve]
        self.add("run", case, {"settings": settings, **found, "points": points})
        last = points[-1]
        print(
            f"{case}: domain gain {last['domain_gain']:.4f}, general rise {last['general_rise']:+.4f}, "
            f"{found['seconds']:.0f} s",
            flush=True,
        )


def curves(rows: Rows) -> dict[str, dict[str, list[forgetting.Point]]]:
    """Evaluations of all runs of a model and domain, by MODEL-DOMAIN and run."""
    known = [f.name for f in fields(forgetting.Point)]
    found: dict[str, dict[str, list[forgetting.Point]]] = {}
    for model, domain, method, kind in itertools.product(BUDGETS, texts.DOMAINS, METHODS, KINDS):
        if row := rows.get(("run", f"{model}/{domain}/{method}/{kind}")):
            points = [forgetting.Point(**{key: point[key] for key in known}) for point in row["points"]]
            found.setdefault(f"{model}-{domain}", {})[f"{method}, {kind}"] = points
    return {name: forgetting.marked(runs) for name, runs in found.items()}


def draw(rows: Rows, folder: Path) -> None:
    """Curves and Pareto plot of every model and domain, all its runs in one."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, runs in curves(rows).items():
        with tempfile.TemporaryDirectory() as drawn:
            forgetting.write(runs, Path(drawn), None, pictures=True)
            for picture, kind in zip(forgetting.PICTURES, PICTURES, strict=True):
                _smaller(Path(drawn) / picture, folder / f"{name}-{kind}.png")


def _smaller(source: Path, target: Path) -> None:
    """The same picture in 32 colors: a third of the bytes."""
    from PIL import Image

    Image.open(source).convert("RGB").quantize(32).save(target, optimize=True)


def _table(columns: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(line) + " |" for line in (columns, ["---"] * len(columns), *rows)] + [""]


def _corpora(rows: Rows) -> list[str]:
    """A table of what was left of the texts; by the first model that has them, tokens of both."""
    names = dict.fromkeys(name.partition("/")[2] for kind, name in rows if kind == "corpus")
    rules = [*texts.ORDER, "duplicates"]
    lines = []
    for name in (n for n in (*texts.DOMAINS, "general", "other") if n in names):
        found = {m: rows["corpus", f"{m}/{name}"] for m in BUDGETS if ("corpus", f"{m}/{name}") in rows}
        row = next(iter(found.values()))
        dropped = [f"{row['rules'].get(rule, {}).get('dropped', 0):,}" for rule in rules[:-1]]
        same = [f"{row['duplicates'].get(f'{what} text', 0):,}" for what in ("the same", "nearly the same")]
        masked = sum(row["rules"].get("personal_data", {}).get("found", {}).values())
        tokens = [f"{found[model]['tokens']:,}" if model in found else "-" for model in BUDGETS]
        came = row["rules"]["encoding"]["in"]
        lines.append([name, f"{came:,}", *dropped, *same, f"{masked:,}", f"{row['documents']:,}", *tokens])
    columns = ["corpus", "parts", *rules[:-1], "exact duplicates", "near-duplicates", "masked", "left"]
    return _table([*columns, *(f"tokens ({model})" for model in BUDGETS)], lines)


def _losses(row: dict, name: str) -> tuple[float, float]:
    """Before the first step and after the last."""
    of = [one["loss"] for one in row["evals"] if one["set"] == name]
    return of[0], of[-1]


def _runs(rows: Rows, model: str) -> list[str]:
    """Perplexities of a model's runs, and means over the domains."""
    lines, means = [], []
    for domain, method, kind in itertools.product(texts.DOMAINS, METHODS, KINDS):
        if row := rows.get(("run", f"{model}/{domain}/{method}/{kind}")):
            cells = [f"{math.exp(b):.2f} → {math.exp(a):.2f}" for b, a in (_losses(row, n) for n in SETS)]
            lines.append([domain, method, kind, *cells, f"{row['tokens']:,}", f"{row['seconds']:.0f}"])
    for method, kind in itertools.product(METHODS, KINDS):
        names = [("run", f"{model}/{domain}/{method}/{kind}") for domain in texts.DOMAINS]
        if there := [rows[name] for name in names if name in rows]:
            changes = [statistics.mean(a - b for b, a in (_losses(row, name) for row in there)) for name in SETS]
            means.append([method, kind, f"{len(there)}", *(f"{change:+.4f}" for change in changes)])
    budget = next(row["settings"] for (kind, name), row in rows.items() if kind == "run" and name.startswith(model))
    used = (
        f"{budget['steps']} steps of {budget['batch']} × {budget['length']} tokens, cosine with a tenth of warm-up, "
        f"rates {', '.join(f'{method} {rate:g}' for method, rate in budget['rates'].items())}; replay {REPLAY:.0%}; "
        f"held out {budget['documents']} passages of {budget['characters']:,} characters, measured every "
        f"{budget['every']} steps."
    )
    out = [used, ""]
    if first := rows.get(("pretraining", model)):
        at = {one["set"]: math.exp(one["loss"]) for one in first["evals"]}
        said = ", ".join(f"{name} {at[name]:.1f}" for name in ("general", "other"))
        out += [f"From scratch: {first['tokens']:,} tokens in {first['seconds']:.0f} s, perplexity {said}.", ""]
    out += _table(["domain", "method", "replay", *(f"{n} perplexity" for n in SETS), "tokens", "seconds"], lines)
    out += ["Change of loss (nats a token), mean over the domains; below 0 is better than before:", ""]
    return out + _table(["method", "replay", "domains", *SETS], means)


def page(rows: Rows) -> str:
    """The results, from the rows alone."""
    title, _, about = str(__doc__).partition("\n\n")
    row = next(row for (kind, _), row in rows.items() if kind == "run")
    names = ("date", "python", "fastft", *(name for name in PACKAGES if name in row))
    lines = ["# domains", "", title, "", about.strip().partition("\n\n")[2], ""]
    lines += [f"{row['machine']}; {', '.join(f'{n} {row[n]}' for n in names)}; fp32.", "", "## The corpora", ""]
    lines += [
        "Parts of at most 4 KB that came in, those that each rule and the search for duplicates left out (in this"
    ]
    lines += ["order), pieces of personal data that were masked, and what is left.", "", *_corpora(rows)]
    drawn = [f"{name}-{kind}.png" for name in curves(rows) for kind in PICTURES]
    for model in BUDGETS:
        if any(kind == "run" and name.startswith(f"{model}/") for kind, name in rows):
            lines += [f"## {model}", "", *_runs(rows, model)]
            lines += [f"![{name}](domains/{name})" for name in drawn if name.startswith(f"{model}-")] + [""]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="the folder of the data sets: corpus/<name> is read")
    parser.add_argument("--smollm2", type=Path, help="folder of the model; without it only `small` is adapted")
    parser.add_argument("--cases", default="*", help="a pattern of MODEL/DOMAIN/METHOD/KIND")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "domains", help="corpora, models and runs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--machine", default=default_machine(), help="how the record names this machine")
    parser.add_argument("--quick", action="store_true", help="a tenth of the texts, two steps: does it run?")
    args = parser.parse_args()
    args.data = args.data / "corpus"
    if not args.data.is_dir():
        print(f"{args.data}: the corpora are not here: nothing is measured")
        return
    bench = Bench(args)
    everything = itertools.product(bench.budgets, texts.DOMAINS, METHODS, KINDS)
    cases = fnmatch.filter(["/".join(case) for case in everything], args.cases)
    if not cases:
        raise SystemExit(f"--cases {args.cases}: there is no such case")
    for case in cases:
        if case.startswith("smollm2/") and args.smollm2 is None:
            print(f"{case}: skipped, --smollm2 names no model")
            continue
        bench.run(case)
    if args.cases == "*" and not args.quick:
        bench.model("small")  # for benchmarks/vocabulary.py, also where every case was there
    if any(kind == "run" for kind, _ in bench.rows):
        draw(bench.rows, args.results / "domains")
        (args.results / "domains.md").write_text(page(bench.rows))


if __name__ == "__main__":
    sys.exit(main())
