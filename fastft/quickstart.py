"""`fastft quickstart`: the whole line on text that every Python installation carries, with nothing to download.

General text is the language reference (pydoc's topics) and the descriptions of the packages installed; the domain is
the standard library's source code. A byte-level BPE tokenizer is trained on both, a small decoder learns the general
text from scratch, and is then adapted to the domain, which is what fastft is for. Both runs are ordinary runs of
``configs/quickstart/*.yaml``.
"""

import hashlib
import importlib.metadata
import json
import sysconfig
from pathlib import Path
from typing import Any

from rich.console import Console

from fastft import config as configuration
from fastft import terminal
from fastft.errors import UserError

GENERAL_BYTES, DOMAIN_BYTES = 1_200_000, 1_600_000  # what two cores can read in the time given
VOCABULARY = 4096
HELD_OUT = 12  # one document in so many is kept for evaluation
PROMPT = "def read_lines(path):\n"


def quickstart(run_dir: Path, configs: Path) -> dict:
    """Run it all under run_dir; prints a report and returns its numbers.

    Raises
    ------
    UserError
        ``configs`` does not hold general.yaml and domain.yaml.
    """
    from fastft.evaluate.metrics import evaluate_model
    from fastft.evaluate.predict import predict, predictor
    from fastft.train.loop import train

    for name in ("general.yaml", "domain.yaml"):
        if not (configs / name).is_file():
            raise UserError(
                f"{configs / name}: no such file.", "Run it in the root of fastft's repository, or give --configs."
            )
    console = Console()
    texts = write_corpus(run_dir / "corpus")
    write_base(run_dir / "base", run_dir / "corpus")
    console.print(
        f"corpus: {texts['general']:,} general and {texts['domain']:,} domain documents under {run_dir / 'corpus'}",
        highlight=False,
    )

    paths = [
        f"data.eval.domain={run_dir}/corpus/domain.eval.jsonl",
        f"data.eval.general={run_dir}/corpus/general.eval.jsonl",
    ]
    general = configuration.load(
        configs / "general.yaml",
        [
            f"model.path={run_dir}/base",
            f"data.train={run_dir}/corpus/general.train.jsonl",
            f"run.dir={run_dir}/general",
            *paths,
        ],
    )
    domain = configuration.load(
        configs / "domain.yaml",
        [
            f"model.path={run_dir}/general/model",
            f"data.train={run_dir}/corpus/domain.train.jsonl",
            f"run.dir={run_dir}/domain",
            *paths,
        ],
    )
    console.print("1. a small decoder learns the general text, from scratch", style="bold")
    first = train(general, overwrite=True)
    before = {name: found.metrics for name, found in evaluate_model(domain).items()}
    console.print("2. the same model is adapted to the domain", style="bold")
    second = train(domain, overwrite=True)

    def sample(folder: str) -> str:
        ready = predictor(folder, {"max_new_tokens": 48, "temperature": 0.7})
        return next(predict(ready, [("prompt", {"text": PROMPT})]))["generated"]

    samples = {name: sample(run["model"]) for name, run in (("before", first), ("after", second))}
    report = {
        "before": before,
        "after": second["eval"],
        "samples": samples,
        "model": second["model"],
        "train_seconds": first["train_seconds"] + second["train_seconds"],
        "tokens_per_second": second["tokens_per_second"],
    }
    (run_dir / "report.json").write_text(json.dumps(report, indent=1))
    _print(console, report)
    return report


def write_corpus(folder: Path) -> dict[str, int]:
    """JSONL files {general,domain}.{train,eval}.jsonl with a ``text`` per document; returns the document counts."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = {}
    for name, documents in (
        ("general", _within(_general(), GENERAL_BYTES)),
        ("domain", _within(_domain(), DOMAIN_BYTES)),
    ):
        counts[name] = len(documents)
        for part in ("train", "eval"):
            chosen = [d for i, d in enumerate(documents) if (i % HELD_OUT == 0) == (part == "eval")]
            with open(folder / f"{name}.{part}.jsonl", "w", encoding="utf-8") as f:
                f.writelines(json.dumps({"source": source, "text": text}) + "\n" for source, text in chosen)
    return counts


def write_base(folder: Path, corpus: Path) -> None:
    """A model folder without weights: the configuration of a small Llama, and a byte-level BPE tokenizer trained on
    the corpus.
    """
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    texts = (
        json.loads(line)["text"]
        for path in sorted(corpus.glob("*.train.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    )
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=["<eos>", "<pad>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<eos>", pad_token="<pad>")
    tokenizer.save_pretrained(folder)
    LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)


def _general() -> list[tuple[str, str]]:
    from pydoc_data.topics import topics

    documents = [(f"pydoc:{name}", text) for name, text in topics.items()]
    for package in importlib.metadata.distributions():
        metadata: Any = package.metadata  # an email.message.Message, which its type does not say
        body = metadata.get_payload() or metadata.get("Description") or ""
        if isinstance(body, str) and len(body) > 500:
            documents.append((f"package:{package.metadata['Name']}", body[:20_000]))
    return documents


def _domain() -> list[tuple[str, str]]:
    library = Path(sysconfig.get_path("stdlib"))
    skip = {"test", "tests", "site-packages", "idlelib", "turtledemo", "lib2to3", "pydoc_data", "encodings"}
    files = [p for p in library.rglob("*.py") if not skip & set(p.relative_to(library).parts)]
    return [(f"stdlib:{p.relative_to(library)}", p.read_text(encoding="utf-8", errors="replace")) for p in files]


def _within(documents: list[tuple[str, str]], budget: int) -> list[tuple[str, str]]:
    """Documents in an order that depends on their names alone, up to a number of bytes."""
    chosen, used = [], 0
    for source, text in sorted(documents, key=lambda d: hashlib.sha256(d[0].encode()).digest()):
        if used < budget and text.strip():
            chosen.append((source, text))
            used += len(text.encode())
    return chosen


def _print(console: Console, report: dict) -> None:
    rows = []
    for name in ("domain", "general"):
        before, after = report["before"][name]["perplexity"], report["after"][name]["perplexity"]
        rows.append([name, f"{before:.1f}", f"{after:.1f}", f"{after / before - 1:+.0%}"])
    columns = ("held-out text", "perplexity before", "after", "change")
    terminal.print_table(console, columns, rows, title="adaptation to the domain")
    for name, text in report["samples"].items():
        console.print(f"[bold]{name}:[/bold]")
        console.print(PROMPT + text, markup=False, highlight=False)
    console.print(
        f"{report['train_seconds']:.0f} s of training, {report['tokens_per_second']:,.0f} tokens/s. "
        f"Hugging Face folder: {report['model']}",
        highlight=False,
        soft_wrap=True,
    )
