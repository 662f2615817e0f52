"""Registers, shared memory and spills of every CUDA kernel for every architecture, as ptxas reports them;
needs nvcc, no GPU.

python benchmarks/cuda_resources.py     runs csrc/check_cuda.sh (warnings are errors) and writes
            benchmarks/results/cuda_resources.md
"""

import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIGURES = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"used (\d+) registers.*?(?:(\d+) bytes smem|$)")


def main() -> None:
    nvcc = os.environ.get("CUDACXX", "nvcc")
    version = re.search(
        r"release ([\d.]+)", subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    )[1]
    log = subprocess.run(
        [ROOT / "csrc" / "check_cuda.sh"],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "FASTFT_REQUIRE_NVCC": "1"},
    ).stdout
    table, archs = parse(log)
    lines = ["# CUDA kernels: registers / bytes of shared memory / bytes of spills", "",
             f"Written by `python benchmarks/cuda_resources.py`; nvcc {version}, -O3. {len(table)} kernels, "
             f"{sum(spill for row in table.values() for *_, spill in row.values())} bytes of spills in all.", "",
             "| kernel | " + " | ".join(f"sm_{a}" for a in archs) + " |", "|---|" + "---|" * len(archs)]  # fmt: skip
    for name, row in sorted(table.items()):
        lines.append(f"| `{name}` | " + " | ".join("{} / {} / {}".format(*row[a]) for a in archs) + " |")
    text = "\n".join(lines) + "\n"
    (ROOT / "benchmarks" / "results" / "cuda_resources.md").write_text(text)
    print(text)


def parse(log: str) -> tuple[dict[str, dict[str, tuple[int, int, int]]], list[str]]:
    """kernel -> architecture -> (registers, shared bytes, spilled bytes), and the architectures in order."""
    table: dict[str, dict[str, tuple[int, int, int]]] = {}
    archs: list[str] = []
    arch = name = ""
    spilled = 0
    for line in log.splitlines():
        if line.startswith("== "):
            arch = line.rsplit("sm_", 1)[1]
            archs += [arch] if arch not in archs else []
        elif figures := FIGURES.search(line):
            spilled = int(figures[2]) + int(figures[3])
        elif used := USED.search(line):
            table.setdefault(name, {})[arch] = (int(used[1]), int(used[2] or 0), spilled)
        elif line.strip() and "check_cuda" not in line:
            name = short(line.strip())
    return table, archs


def short(name: str) -> str:
    """void fastft::cuda::kernel<fastft::bf16, false>(Args) -> kernel<bf16, false>"""
    name = re.sub(r"\(anonymous namespace\)::|fastft::|cuda::|^void ", "", name)
    return name.partition("(")[0]


if __name__ == "__main__":
    main()
