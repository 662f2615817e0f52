"""Commands that are killed at random moments of their undisturbed length, and run again."""

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import corpora
import slurm as real

import launch
from fastft.corpus.shards import begun

# The command line with blocks of few documents: a corpus of some hundred has as many as one of some gigabytes.
SCRIPT = """
import sys
from fastft.cli.main import command
from fastft.corpus import importing, lines, reading
reading.BLOCK_ROWS, lines.SIZE, importing.PIECE, importing.SHARD_TOKENS = 20, 5000, 2000, 40_000
sys.argv[0] = "fastft"
command()
"""
IN_A_ROW = 4  # kills of a folder before it may end


def raw_corpus(folder: Path, tokenizer: Path) -> dict:
    """A configuration: two sources, rules, an evaluation set that is in them, near-duplicates, many shards."""
    rng = random.Random(0)
    words = [f"word{n}" for n in range(300)]
    texts = [" ".join(rng.choices(words, k=60 if n % 8 else 5)) for n in range(1200)]
    texts[600:640] = [text + " once more" for text in texts[:40]]
    texts[700:705] = texts[40:45]
    for number in range(2):
        corpora.jsonl(folder / f"{number}.jsonl", texts[number::2])
    corpora.jsonl(folder / "eval.jsonl", texts[100:130])
    return {
        "tokenizer": str(tokenizer),
        "sources": [{"path": str(folder / f"{number}.jsonl"), "name": f"s{number}"} for number in range(2)],
        "rules": {"unicode": True, "length": {"min_words": 20}, "decontaminate": [str(folder / "eval.jsonl")]},
        "duplicates": "near",
        "shard_tokens": 20_000,
        "workers": 1,
    }


def fastft(folder: Path, *arguments, pipe: bool = False, env: dict[str, str] | None = None):
    """Start it with small blocks. ``env``: variables that no import reads."""
    script = folder / "command.py"
    script.write_text(SCRIPT)
    return launch.start_python([script, *arguments], env or {}, pipe)


def alive(group: int) -> bool:
    """Whether a process of the group is there: those that worked for one that was killed end once they have begun."""
    with suppress(ProcessLookupError):
        os.killpg(group, 0)
        return True
    return False


def done(process, timeout: float = 120) -> str:
    said = launch.finish(process, timeout)
    assert process.returncode == 0, said[-3000:]
    return said


def killed(folder: Path, kills: int, prepared: Callable[[Path], list], seed: int = 0, **how) -> int:
    """Kill a command so many times, in folders of its own; each is then run to its end, and has the bytes of a run that
    nothing disturbed. Returns how many of the kills left a corpus that is in part there.

    Parameters
    ----------
    prepared : callable
        Makes what the command needs in a folder, which writes to ``out`` there; returns its arguments.
    how
        For ``fastft``.
    """
    (folder / "whole").mkdir()
    process, start = fastft(folder / "whole", *prepared(folder / "whole"), **how), time.monotonic()
    done(process)
    within, wanted = time.monotonic() - start, corpora.content(folder / "whole" / "out")
    rng, left, number, parts = random.Random(seed), kills, 0, 0
    while left:
        one = folder / f"{number}"
        one.mkdir()
        arguments = prepared(one)
        for _ in range(min(left, IN_A_ROW)):
            process = fastft(one, *arguments, **how)
            try:
                process.wait(rng.random() * within)
            except subprocess.TimeoutExpired:
                process.kill()
            process.wait(60)
            real.wait(lambda process=process: not alive(process.pid), 60, "end of the processes that it had started")
            said = launch.finish(process, 60)
            assert process.returncode in (0, -signal.SIGKILL), said[-3000:]
            if process.returncode:
                left -= 1
                parts += begun(one / "out")
        done(fastft(one, *arguments, **how))
        assert corpora.content(one / "out") == wanted
        assert not list(one.glob("*.lock")) and not list(one.glob(".*"))
        shutil.rmtree(one)
        number += 1
    return parts
