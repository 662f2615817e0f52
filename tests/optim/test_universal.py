"""8-bit state through DeepSpeed's universal checkpoint, to another number of ranks."""

import sys
from pathlib import Path

import torch

import launch

PROGRAM = Path(__file__).with_name("universal.py")


def test_int8_state_survives_a_universal_checkpoint_and_another_world_size(tmp_path):
    """Masters and moments of two ranks arrive at one rank without the loss of a bit,
    and the next step codes them again.
    """
    case = ("2", "bf16", "int8", tmp_path)
    launch.ranks(2, [PROGRAM, "save", *case])
    convert = launch.start(
        [
            sys.executable,
            "-m",
            "deepspeed.checkpoint.ds_to_universal",
            "--input_folder",
            tmp_path / "five",
            "--output_folder",
            tmp_path / "universal",
            "--num_extract_workers",
            "1",
            "--num_merge_workers",
            "1",
            "--inject_missing_state",
        ]
    )
    output = launch.finish(convert, 120)
    assert convert.returncode == 0, output[-3000:]
    launch.ranks(1, [PROGRAM, "load", *case])
    before, after = torch.load(tmp_path / "save.pt"), torch.load(tmp_path / "load.pt")
    assert before.keys() == after.keys() and len(before) == 12
    for name in before:
        assert torch.equal(before[name], after[name]), name
        assert before[name].any(), f"{name} is all 0: nothing was compared"
