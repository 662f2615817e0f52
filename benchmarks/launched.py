"""Real ranks of a tiny model under `fastft launch`, for benchmarks that break or change runs."""

import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from fastft import track
from fastft.files import sha256_file

STEPS, EVERY = 30, 5  # of a run; of its checkpoints
WATCHDOG = 4.0  # seconds


@dataclass
class Process:
    """A launcher, and what it said when."""

    popen: subprocess.Popen
    reader: threading.Thread
    said: list[tuple[float, str]] = field(default_factory=list)

    def when(self, part: str, timeout: float = 120.0) -> float:
        """Time at which a line with ``part`` was said; waits for it."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            for at, line in list(self.said):
                if part in line:
                    return at
            if self.popen.poll() is not None and not any(part in line for _, line in self.said):
                time.sleep(0.5)
                if not any(part in line for _, line in self.said):
                    break
            time.sleep(0.02)
        raise AssertionError(f"never said {part!r}:\n" + self.text())

    def text(self) -> str:
        return "\n".join(line for _, line in self.said[-60:])

    def wait(self, timeout: float = 180.0) -> int:
        self.popen.wait(timeout)
        self.reader.join(10)  # what it said last
        return self.popen.returncode


class Bench:
    """A tiny model and text under a folder, and runs of it. popen: starts ``python ARGUMENTS`` with an environment."""

    def __init__(self, folder: Path, ranks: int = 2, dropout: float = 0.1, popen: Callable | None = None):
        self.folder, self.ranks, self.numbers = folder, ranks, itertools.count()
        self.popen = popen or _popen
        self.whole: dict[tuple[int, str], Path] = {}
        self.started: list[Process] = []
        write_model(folder, dropout)

    def config(self, run: Path, zero: int, dtype: str, **train) -> Path:
        config = {
            "task": "causal_lm",
            "model": {"path": str(self.folder / "model"), "dtype": dtype},
            "data": {
                "train": str(self.folder / "train.jsonl"),
                "max_length": 128,
                "truncation": "split",
                "cache": str(self.folder / "prepared"),
            },
            "batch": {"size": 8},
            "optim": {"lr": 1e-3},
            "train": {"steps": STEPS, "log_every": 1, **train},
            "checkpoint": {"every": EVERY},
            "parallel": {"zero": zero},
            "run": {"dir": str(run), "offline": True, "device": "cpu", "threads": 1},
        }
        path = run.with_suffix(".yaml")
        path.write_text(yaml.safe_dump(config))
        return path

    def run_dir(self) -> Path:
        return self.folder / f"run-{next(self.numbers)}"

    def start(self, *arguments: str | Path, env: dict | None = None, **options: float) -> Process:
        options = {"nproc": self.ranks, "backoff": 0.2, "watchdog": WATCHDOG, **options}
        arguments = [
            "-m",
            "fastft",
            "launch",
            *itertools.chain(*((f"--{k.replace('_', '-')}", str(v)) for k, v in options.items())),
            *map(str, arguments),
        ]
        popen = self.popen(arguments, {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(env or {})})
        said: list[tuple[float, str]] = []
        reader = threading.Thread(
            target=lambda: said.extend((time.time(), line.rstrip()) for line in popen.stdout), daemon=True
        )
        reader.start()
        self.started.append(Process(popen, reader, said))
        return self.started[-1]

    def end_all(self) -> None:
        """Kill every launcher that still runs; its agents and ranks end with it."""
        for process in self.started:
            if process.popen.poll() is None:
                process.popen.kill()
                process.wait()
        self.started.clear()

    def undisturbed(self, zero: int, dtype: str) -> str:
        """Hash of the weights after all steps."""
        if (zero, dtype) not in self.whole:
            run = self.run_dir()
            process = self.start("train", self.config(run, zero, dtype))
            assert process.wait() == 0, process.text()
            self.whole[zero, dtype] = run
        return weights(self.whole[zero, dtype])


def _popen(arguments: list[str], env: dict[str, str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=env,
    )


def write_model(folder: Path, dropout: float = 0.1) -> None:
    """A small Llama, with dropout so that a lost RNG state shows, and the language reference to read."""
    from pydoc_data.topics import topics

    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    texts = [text[:1500] for _, text in sorted(topics.items())]
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=600, special_tokens=["<eos>", "<pad>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<eos>", pad_token="<pad>")
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            attention_dropout=dropout,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    ).save_pretrained(folder / "model")


def weights(run: Path) -> str:
    return sha256_file(run / "model" / "model.safetensors")


def reached(run: Path) -> int:
    """The last step that was logged."""
    return (
        max((r["step"] for r in track.read(run) if r["kind"] == "train"), default=0)
        if (run / "metrics.jsonl").exists()
        else 0
    )


def left(run: Path) -> list[int]:
    """Processes that still have something to do with a run."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (
                str(run).encode() in (process / "cmdline").read_bytes()
                or run in Path(os.readlink(process / "fd" / "1")).parents
            ):
                found.append(int(process.name))
        except OSError:
            continue
    return found


def wait_for(condition: Callable[[], object], process: Process, timeout: float = 120.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline and process.popen.poll() is None, process.text()
        time.sleep(0.01)
