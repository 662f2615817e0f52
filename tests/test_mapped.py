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


@pytest.mark.parametrize("written", [False, True])
def test_what_lies_between_tensors_is_let_go_of(opened, written):
    """All of a file but what is used; what is written to and used by somebody else stays."""
    file, found, wanted = opened
    if written:
        found["b"][300] += 1
        wanted["b"][300] += 1
    mapped.let_go_between([found["a"], found["c"][::2], torch.arange(1 << 20), torch.empty(0)])
    kept = 6 if written else 4  # of c all but its last row is between the first byte that is used and the last
    assert (kept << 20) - (1 << 16) <= resident(file) <= (kept << 20) + (1 << 16)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_file_of_which_nothing_is_used_is_left_alone(opened):
    file, _, _ = opened
    mapped.let_go_between([torch.arange(1 << 20)])
    assert resident(file) >= 6 << 20


def test_a_model_of_experts_leaves_no_pages_of_theirs(tmp_path):
    """They are put together from the files, where other weights stay."""
    import transformers

    from fastft.config import Model
    from fastft.models import load

    sizes = {"vocab_size": 64, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    config = transformers.MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, num_local_experts=4)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
    model, _ = load.build(Model(path=str(tmp_path / "m")), "AutoModelForCausalLM", (), 0)
    experts = sum(p.nbytes for name, p in model.named_parameters() if "experts" in name)
    file = tmp_path / "m" / "model.safetensors"
    assert experts > 5 << 20 and resident(file) <= file.stat().st_size - experts + (1 << 16)
