"""Holds the machine code of the bulk cross-entropy kernel to a committed table: what a logit costs, without a GPU.

    python csrc/check_machine_code.py [--write]

Compiles csrc/cuda/cross_entropy_bulk.cu for sm_90 and sm_100 and disassembles it. For each kernel, of the two loops
over a row's slots (phase A: sums, phase B: gradients): instructions a logit, accesses to global memory and block
barriers (none: bulk copies do that), of A the 16-byte loads from shared memory before the first use; and registers,
bytes of spills, and the places that start a bulk copy. machine_code.json has them with the compiler's version: that
compiler has to give them again (exit status 1), another one is only told about. --write makes the table anew; read the
difference before you commit it.

Needs nvcc (CUDACXX or PATH) and nvdisasm (PATH, or the one in the triton package); without them it says so and exits 0,
or 1 when FASTFT_REQUIRE_NVCC=1.
"""

import argparse
import concurrent.futures
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
TABLE = HERE / "machine_code.json"
ARCHS = ("sm_90", "sm_100")
KERNEL = re.compile(r"bulk_kernelI(NS_4bf16E|f)Li(\d+)ELb(\d)ELb(\d)E")


def find(name: str) -> str | None:
    if name == "nvcc" and os.environ.get("CUDACXX"):
        return shutil.which(os.environ["CUDACXX"])
    if found := shutil.which(name):
        return found
    triton = importlib.util.find_spec("triton")
    for folder in (triton and triton.submodule_search_locations) or ():
        at = Path(folder, "backends/nvidia/bin", name)
        if at.exists():
            return str(at)
    return None


def build(nvcc: str, nvdisasm: str, arch: str, folder: Path) -> tuple[str, str]:
    """Disassembly, and what ptxas says."""
    cubin = folder / f"{arch}.cubin"
    command = [nvcc, "-std=c++17", "-O3", f"-arch={arch}", "-cubin", "-Xptxas", "-v", f"-I{HERE / 'include'}"]
    compiled = subprocess.run(
        [*command, "-o", cubin, HERE / "cuda/cross_entropy_bulk.cu"], capture_output=True, text=True
    )
    if compiled.returncode:
        sys.exit(compiled.stderr)
    sass = subprocess.run([nvdisasm, "-c", cubin], capture_output=True, text=True, check=True).stdout
    return sass, compiled.stderr


def kernels(sass: str, log: str, arch: str) -> dict[str, dict[str, float]]:
    found = {}
    for part in re.split(r"\n\s*\.section\s+\.text\.", sass)[1:]:
        symbol = part.split(",")[0]
        if not (parts := KERNEL.search(symbol)):
            continue
        dtype, warps, smooth, cap = parts.groups()
        dtype = "fp32" if dtype == "f" else "bf16"
        name = f"{arch} {dtype} {warps} warps" + " smoothing" * (smooth == "1") + " softcap" * (cap == "1")
        used = re.search(
            re.escape(symbol) + r"'.*?(\d+) bytes stack frame, (\d+) bytes spill stores.*?Used (\d+) registers",
            log,
            re.DOTALL,
        )
        found[name] = {"registers": int(used[3]), "spills": int(used[1]) + int(used[2]), **measure(part, dtype)}
    return found


def measure(part: str, dtype: str) -> dict[str, float]:
    """What the docstring above lists, of one kernel's disassembly."""
    code, labels = [], {}
    for line in map(str.strip, part.splitlines()):
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        if instruction := re.match(r"/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
            code.append(instruction[1])
    ops = [re.sub(r"^@!?U?P\w+\s+", "", i).split()[0] for i in code]
    count = lambda loop, *names: sum(op.startswith(names) for op in ops[loop[0] : loop[1] + 1])
    length = lambda loop: loop[1] - loop[0] + 1
    loops = []
    for at, instruction in enumerate(code):
        target = re.search(r"BRA\S*\s.*?(\.L_x_\d+)", instruction)
        if target and labels[target[1]] <= at:
            loops.append((labels[target[1]], at))
    # The loops over whole slots: four packs a thread
    whole = [loop for loop in loops if count(loop, "LDS.128") == 4 and count(loop, "MUFU.EX2") >= 8]
    a = min((loop for loop in whole if not count(loop, "STS.128")), key=length)
    b = min((loop for loop in whole if count(loop, "STS.128")), key=length)
    logits = 4 * (8 if dtype == "bf16" else 4)
    return {
        "A": round(length(a) / logits, 2),
        "B": round(length(b) / logits, 2),
        "exp": round((count(a, "MUFU.EX2") + count(b, "MUFU.EX2")) / logits, 2),
        "loads ahead": loads_ahead(code, ops, a),
        "global": sum(count(loop, "LDG", "STG", "LDL", "STL", "ATOM") for loop in (a, b)),
        "block barriers": sum(count(loop, "BAR.", "UCGABAR") for loop in (a, b)),
        "bulk copies": sum(op.startswith("UBLKCP") for op in ops),
    }


def loads_ahead(code: list[str], ops: list[str], loop: tuple[int, int]) -> int:
    """16-byte loads that a thread starts before it uses the first."""
    loads = [k for k in range(loop[0], loop[1] + 1) if ops[k].startswith("LDS.128")]
    first = int(re.search(r"LDS\.128 R(\d+)", code[loads[0]])[1])
    ahead = 1
    for k in range(loads[0] + 1, loop[1] + 1):
        if any(first <= int(r) < first + 4 for r in re.findall(r"\bR(\d+)\b", code[k])):
            break
        ahead += ops[k].startswith("LDS.128")
    return ahead


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="make the table anew")
    args = parser.parse_args()
    nvcc, nvdisasm = find("nvcc"), find("nvdisasm")
    if nvcc is None or nvdisasm is None:
        print(f"check_machine_code: skipped, no {'nvcc' if nvcc is None else 'nvdisasm'}")
        return int(os.environ.get("FASTFT_REQUIRE_NVCC") == "1")
    version = re.search(r"V([\d.]+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)[1]
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor() as pool:
        built = list(pool.map(lambda arch: build(nvcc, nvdisasm, arch, Path(folder)), ARCHS))
    found: dict[str, dict[str, float]] = {}
    for arch, (sass, log) in zip(ARCHS, built, strict=True):
        found |= kernels(sass, log, arch)
    if args.write:
        rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in found.items())
        TABLE.write_text(f'{{"nvcc": "{version}", "kernels": {{\n{rows}\n}}}}\n')
        return 0
    table = json.loads(TABLE.read_text())
    differences = [
        f"{name}: {key} {row.get(key)}, in the table {table['kernels'].get(name, {}).get(key)}"
        for name in sorted(table["kernels"].keys() | found.keys())
        for row in [found.get(name, {})]
        for key in sorted(row.keys() | table["kernels"].get(name, {}).keys())
        if row.get(key) != table["kernels"].get(name, {}).get(key)
    ]
    ours = version == table["nvcc"]
    print("\n".join(differences) or f"check_machine_code: {len(found)} kernels as in {TABLE.name}")
    if differences and not ours:
        print(f"check_machine_code: a warning only, this is nvcc {version} and the table is of {table['nvcc']}")
    return int(bool(differences) and ours)


if __name__ == "__main__":
    sys.exit(main())
