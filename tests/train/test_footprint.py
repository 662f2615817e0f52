"""What validate says of memory and disk, beside what a run takes."""

import json
from pathlib import Path

import pytest

import launch
from fastft.config import load
from fastft.plan.told import Options, lines, tell


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model": {"dtype": "bf16"}, "parallel": {"zero": 2}, "optim": {"master": "remainder", "state_dtype": "int8"}},
    ],
    ids=["fp32", "bf16-zero2-int8"],
)
def test_disk_is_what_a_checkpoint_takes(lm_config, tmp_path, changes):
    """Within a fifth: the model is tiny, and file headers and quantization scales are not."""
    for section, values in changes.items():
        lm_config.setdefault(section, {}).update(values)
    path = launch.write_config(tmp_path / "c.yaml", lm_config)
    _, output = launch.fastft("validate", path, "--json")
    found = json.loads(output.strip().splitlines()[-1])["footprint"]
    launch.fastft("train", path, "train.steps=1")
    run = Path(lm_config["run"]["dir"])
    taken = sum(file.stat().st_size for file in (run / "checkpoints" / "step-1").rglob("*") if file.is_file())
    assert found["checkpoint"] == pytest.approx(taken, rel=0.2)
    assert found["disk"] == 3 * found["checkpoint"] + found["weights"]  # two kept, one being written, the model
    assert found["tokens"] == 6 * 64 and found["activations"] > 0


def test_what_is_sharded_is_divided(lm_config, tmp_path):
    """On two ranks at ZeRO 3, and with an adapter, whose checkpoints hold it alone."""
    path = launch.write_config(tmp_path / "c.yaml", lm_config)
    script = tmp_path / "validate.py"
    script.write_text(
        "import json, sys\nfrom fastft import config\nfrom fastft.evaluate.validate import validate_run\n"
        "print(json.dumps(validate_run(config.load(sys.argv[1], sys.argv[2:]))['footprint']))\n"
    )

    def footprints(ranks: int, *changes: str) -> dict:
        return json.loads(launch.ranks(ranks, [script, path, *changes])[0].strip().splitlines()[-1])

    alone, two = footprints(1, "parallel.zero=3"), footprints(2, "parallel.zero=3")
    for part in ("weights", "gradients", "optimizer"):
        assert two[part] == alone[part] // 2
    assert two["checkpoint"] == alone["checkpoint"] and two["ranks"] == 2
    adapter = footprints(1, "model.lora={r: 2}", "checkpoint.best_by=eval.loss")
    assert adapter["gradients"] < adapter["weights"] / 10 and adapter["checkpoint"] == 3 * adapter["gradients"]
    assert adapter["disk"] == 4 * adapter["checkpoint"] + adapter["weights"]


def test_rounding_is_where_memory_is_fullest(lm_config, tmp_path):
    """By the rows that there are; the configuration's are more."""
    pytest.importorskip("bitsandbytes")
    lm_config["model"] |= {"lora": {"r": 2}, "quantize": {"format": "nf4", "calibrate": 100_000}}
    path = launch.write_config(tmp_path / "c.yaml", lm_config)
    found = json.loads(launch.fastft("validate", path, "--json")[1].strip().splitlines()[-1])
    assert found["footprint"]["fullest"] == "rounding"
    rows = found["splits"]["train"]["sequences"]
    by_row = 2 * 64 * (3 * 128 + 6 * 64) * 4
    assert rows * by_row < found["footprint"]["peak"] < (rows + 20) * by_row < 1000 * by_row


OFFLOADED = [
    ["parallel.zero=3", "parallel.offload=optimizer"],
    ["parallel.zero=3", "parallel.offload=parameters", "model.dtype=bf16"],
    ["parallel.zero=3", "parallel.offload=parameters", "model.lora={r: 16}"],
    ["parallel.zero=1", "parallel.offload=optimizer", "model.dtype=bf16", "optim.state_dtype=bf16"],
]


def test_disk_has_the_files_of_what_is_offloaded(lm_config, tmp_path):
    """As many bytes as a run has mapped after a step, within a twentieth: files are of whole pages."""
    (tmp_path / "files").mkdir()
    lm_config["parallel"] = {"zero": 3, "offload": "optimizer", "offload_dir": str(tmp_path / "files")}
    path = launch.write_config(tmp_path / "c.yaml", lm_config)
    runs = launch.ROOT / "tests" / "train" / "runs.py"
    paths = []
    for i, changes in enumerate(OFFLOADED):
        paths.append(launch.write_config(tmp_path / f"{i}.yaml", load(path, changes).model_dump(mode="json")))
    launch.ranks(2, [runs, "files", tmp_path, *paths])
    for changed, changes in zip(paths, OFFLOADED, strict=True):
        found = tell(str(path), changes, Options(ranks=2))
        taken = json.loads(changed.with_suffix(".json").read_text())
        assert found["disk"]["files"] == pytest.approx(taken, rel=0.05), changes
        assert found["disk"]["total"] > 3 * found["disk"]["checkpoint"] + found["disk"]["files"]
        assert "in parallel.offload_dir" in " ".join(lines(found))
    _, output = launch.fastft("validate", path, "--json")
    footprint = json.loads(output.strip().splitlines()[-1])["footprint"]
    assert footprint["files"] == tell(str(path), [], Options())["disk"]["files"] > 0
    assert footprint["disk"] == 3 * footprint["checkpoint"] + footprint["weights"] + footprint["files"]
