"""Memory of tensors that lie in files."""

import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastft import mapped

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/smaps is Linux's")
SIZE = (512, 1024)  # of float32: 2 MiB


def resident(file: Path) -> int:
    """Bytes of a file that this process has in memory."""
    found, here = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match("[0-9a-f]+-[0-9a-f]+ ", line):
            here = line.endswith(str(file))
        elif here and line.startswith("Rss:"):
            found += int(line.split()[1]) << 10
    return found


@pytest.fixture
def opened(tmp_path) -> tuple[Path, dict, dict]:
    """Three weights as safetensors opens them, all read, and what they are."""
    torch.manual_seed(0)
    wanted = {name: torch.randn(SIZE) for name in ("a", "b", "c")}
    file = tmp_path / "weights.safetensors"
    save_file(wanted, file)
    found = load_file(file)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    return file, found, wanted


def test_what_is_let_go_of_is_not_resident(opened):
    file, found, wanted = opened
    assert resident(file) >= 6 << 20
    mapped.let_go(found["b"])
    assert (4 << 20) <= resident(file) <= (4 << 20) + (1 << 16)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)  # it is still in the file


def test_what_was_written_to_its_neighbours_stays(opened):
    _, found, wanted = opened
    found["a"] += 1
    found["c"] += 1
    mapped.let_go(found["b"])
    assert all(torch.equal(found[name], wanted[name] + 1) for name in ("a", "c"))


def test_what_was_written_to_it_stays(opened):
    """It is this process's own then, and nowhere else."""
    _, found, wanted = opened
    found["b"][300] += 1
    mapped.let_go(found["b"])
    wanted["b"][300] += 1
    assert torch.equal(found["b"], wanted["b"])


@pytest.mark.parametrize("kind", ["heap", "view", "shared", "empty", "meta"])
def test_other_memory_is_left_alone(kind, tmp_path, opened):
    """A tensor of this process alone, one with gaps, one that others see, and those that have no memory."""
    file, found, _ = opened
    tensor = {
        "heap": lambda: torch.arange(1 << 20),
        "view": lambda: found["b"][:, ::2],
        "shared": lambda: mapped.empty(tmp_path, SIZE, torch.float32).fill_(3),
        "empty": lambda: torch.empty(0),
        "meta": lambda: torch.empty(SIZE, device="meta"),
    }[kind]()
    before = None if kind == "meta" else tensor.clone()
    mapped.let_go(tensor)
    assert before is None or torch.equal(tensor, before)
    assert resident(file) >= 6 << 20
