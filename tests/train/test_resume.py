"""A resumed run is the run that was never interrupted, bit for bit; damaged checkpoints are seen before use."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import launch
from fastft import config as configuration
from fastft import track
from fastft.data import order
from fastft.errors import UserError
from fastft.files import digest, sha256_file
from fastft.ops import cpu
from fastft.tasks.base import Metric
from fastft.train import checkpoint
from fastft.train.observers._standard import Best
from fastft.zero import state_files
from tests.ops.common import NATIVE_BUILT

RUNS = launch.ROOT / "tests" / "train" / "runs.py"


def tensors(value, prefix="") -> dict[str, torch.Tensor]:
    """Every tensor and number in a nested structure, by path."""
    if isinstance(value, torch.Tensor):
        return {prefix: value}
    if isinstance(value, dict):
        return {k: t for key, v in value.items() for k, t in tensors(v, f"{prefix}.{key}").items()}
    if isinstance(value, (list, tuple)):
        return {k: t for i, v in enumerate(value) for k, t in tensors(v, f"{prefix}.{i}").items()}
    return {prefix: torch.tensor(value)} if isinstance(value, (int, float)) else {}


def same_checkpoints(a: Path, b: Path) -> None:
    files = sorted(p.relative_to(a) for p in a.rglob("*.safetensors"))
    assert files == sorted(p.relative_to(b) for p in b.rglob("*.safetensors")) and files
    for name in files:
        first, second = (tensors(state_files.read(folder / name)) for folder in (a, b))
        assert first.keys() == second.keys()
        for key in first:
            assert torch.equal(first[key], second[key]), (name, key)


def curve(run: Path) -> list[tuple]:
    return [(r["step"], r["loss"], r["lr"], r["grad_norm"]) for r in track.read(run) if r["kind"] == "train"]


FEWER_BYTES = {"state_dtype": "int8", "master": "remainder"}
CASES = [
    (0, "fp32", 1, {}),
    pytest.param(0, "bf16", 1, {}, marks=pytest.mark.long),
    (1, "bf16", 2, {}),
    (2, "fp32", 2, {}),
    (3, "bf16", 2, {}),
    pytest.param(3, "fp32", 2, {}, marks=pytest.mark.long),
    pytest.param(0, "fp32", 2, {}, marks=pytest.mark.long),
    (3, "bf16", 2, FEWER_BYTES),
]


@pytest.mark.parametrize("zero, dtype, world, optim", CASES)
def test_resume_is_bit_exact(lm_config, tmp_path, monkeypatch, zero, dtype, world, optim):
    """Weights, optimizer state, RNG (the model has dropout), losses and norms, after 6 steps resumed from 3 in a new
    process.
    """
    if (zero, dtype, optim) == (3, "bf16", {}):
        monkeypatch.setenv("FASTFT_TEST_COLD", "1")  # with hash seeds of their own, other than those it was saved with
    resumed = resume_halfway(lm_config, tmp_path, zero, dtype, world, optim)
    assert not run_record(resumed)["layers"].startswith("fused")


@pytest.mark.skipif(not NATIVE_BUILT, reason="fastft._C is not built")
@pytest.mark.parametrize("zero, dtype, world", [(0, "bf16", 1), (0, "fp32", 2), (1, "bf16", 2), (2, "fp32", 2)])
def test_resume_of_fused_layers_is_bit_exact(no_dropout, tmp_path, zero, dtype, world):
    """The same with attention by document and fused layers, which a CPU takes unasked."""
    record = run_record(resume_halfway(no_dropout, tmp_path, zero, dtype, world, {}))
    assert record["attention"].startswith("varlen: automatic, by kernels for ") and record["layers"].startswith("fused")
    assert record["cpu"] == cpu.describe()


def run_record(run: Path) -> dict:
    return next(r for r in track.read(run) if r["kind"] == "run")


def resume_halfway(lm_config: dict, tmp_path: Path, zero: int, dtype: str, world: int, optim: dict) -> Path:
    """A run of 6 steps, and one resumed from its third, compared; the second's folder."""
    lm_config["optim"] |= optim
    lm_config["train"] = {"steps": 6, "log_every": 1}
    lm_config["checkpoint"] = {"every": 3, "keep": 9}
    lm_config["parallel"] = {"zero": zero}
    lm_config["model"]["dtype"] = dtype
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    lm_config["run"]["dir"] = str(whole)
    config = launch.write_config(tmp_path / "c.yaml", lm_config)
    launch.ranks(world, ["-m", "fastft", "train", config])
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step-6")
    shutil.rmtree(resumed / "model")
    (resumed / "metrics.jsonl").unlink()
    launch.ranks(world, ["-m", "fastft", "resume", resumed])
    same_checkpoints(whole / "checkpoints" / "step-6", resumed / "checkpoints" / "step-6")
    assert curve(resumed) == curve(whole)[3:]
    first, second = (load_file(run / "model" / "model.safetensors") for run in (whole, resumed))
    assert all(torch.equal(first[k], second[k]) for k in first)
    return resumed


@pytest.mark.parametrize(
    "signum, world",
    [pytest.param(signal.SIGTERM, 1, marks=pytest.mark.long), (signal.SIGINT, 1), (signal.SIGTERM, 2)],
)
def test_signal_saves_and_leaves_then_resume_finishes(lm_config, tmp_path, signum, world):
    """One rank is told; all save and leave with 128 + signal; resuming gives the undisturbed curve.

    SIGTERM is said again and again until it has ended, as by a launcher and a service manager that both pass it on.
    """
    lm_config["train"] = {"steps": 400, "log_every": 1}
    run = Path(lm_config["run"]["dir"])
    config = launch.write_config(tmp_path / "c.yaml", lm_config)
    port = str(launch.free_port())
    processes = [
        launch.start_python(
            ["-m", "fastft", "train", config],
            {
                "RANK": str(r),
                "LOCAL_RANK": str(r),
                "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(world),
                "LOCAL_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            },
        )
        for r in range(world)
    ]
    try:
        deadline = time.monotonic() + 120
        while not ((run / "metrics.jsonl").exists() and len(curve(run)) >= 3):
            assert time.monotonic() < deadline and processes[0].poll() is None, "no third step"
            time.sleep(0.05)
        processes[-1].send_signal(signum)
        while signum == signal.SIGTERM and processes[-1].poll() is None:
            time.sleep(0.005)
            processes[-1].send_signal(signum)
        outputs = [launch.finish(p, 60) for p in processes]
    finally:
        for p in processes:
            launch.kill_group(p)
    assert [p.returncode for p in processes] == [128 + signum] * world, outputs[0][-2000:]
    assert f"fastft resume {run}" in outputs[0]
    stopped = checkpoint.steps(run / "checkpoints")[-1]
    assert stopped == curve(run)[-1][0] < 400
    launch.ranks(world, ["-m", "fastft", "resume", run, f"train.steps={stopped + 2}"])
    steps = [c[0] for c in curve(run)]
    assert steps == list(range(1, stopped + 3))


@pytest.fixture
def finished(lm_config, tmp_path) -> Path:
    lm_config["train"] = {"steps": 4, "log_every": 1}
    lm_config["checkpoint"] = {"every": 2, "keep": 2}
    launch.fastft("train", launch.write_config(tmp_path / "c.yaml", lm_config))
    return Path(lm_config["run"]["dir"])


def test_damage_is_found_before_use(finished):
    """A flipped bit in any file of the newest checkpoint: the one before is taken;
    with both damaged, an error names the file.
    """
    folder = finished / "checkpoints"
    assert checkpoint.steps(folder) == [2, 4] and json.loads((folder / "LATEST").read_text()) == {"step": 4}
    for name in json.loads((folder / "step-4" / "MANIFEST.json").read_text())["files"]:
        file = folder / "step-4" / name
        good = file.read_bytes()
        bad = bytearray(good)
        bad[len(bad) // 2] ^= 1
        file.write_bytes(bad)
        assert checkpoint.find(folder)[0].name == "step-2", name
        file.write_bytes(good[:-1])
        with pytest.raises(UserError, match=str(file)):
            checkpoint.find(folder, step=4)
        file.write_bytes(good)
    assert checkpoint.find(folder)[0].name == "step-4"
    (folder / "step-4" / "MANIFEST.json").rename(folder / "aside")
    assert checkpoint.find(folder)[2] == [
        f"{folder / 'step-4' / 'MANIFEST.json'}: No such file or directory."
    ]  # passed over, but not in silence
    (folder / "aside").rename(folder / "step-4" / "MANIFEST.json")
    for step in (2, 4):
        (folder / f"step-{step}" / "rng-0.safetensors").unlink()
    with pytest.raises(UserError, match=r"rng-0.safetensors is missing"):
        checkpoint.find(folder)
    with pytest.raises(UserError, match="no checkpoint of step 3"):
        checkpoint.find(folder, step=3)


class Hostile:
    """Unpickled, it writes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def write_manifest(folder: Path, changed: dict) -> None:
    """A checkpoint's manifest that vouches for all of its files."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != "MANIFEST.json"]
    entries = {str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": sha256_file(p)} for p in files}
    manifest = {key: value for key, value in changed.items() if key != "digest"} | {"files": entries}
    (folder / "MANIFEST.json").write_text(json.dumps({**manifest, "digest": digest(manifest)}))


def as_older(folder: Path) -> None:
    """A checkpoint as fastft wrote it before: its files are pickles."""
    for file in list(folder.rglob("*.safetensors")):
        torch.save(state_files.read(file), file.with_suffix(".pt"))
        file.unlink()
    write_manifest(folder, json.loads((folder / "MANIFEST.json").read_text()))


def damaged_headers(file: Path):
    """Files of safetensors whose state is none: (what is wrong, bytes)."""
    import struct

    def made(state: str) -> bytes:
        header = json.dumps({"__metadata__": {"state": state}}).encode()
        return struct.pack("<Q", len(header)) + header

    yield "no state", struct.pack("<Q", 2) + b"{}"
    yield "no JSON", made("{")
    yield "an unknown kind", made('{"os.system": "touch x"}')
    yield "a tensor that is not there", made('{"tensor": 5}')
    yield "too deep", made("[" * 100_000 + "]" * 100_000)
    yield "two kinds", made('{"tuple": [], "set": []}')
    yield "a list", made("[1]")
    yield "no size", made('{"size": [100000000000000000000000]}')
    yield "no dict", made('{"dict": [1, 2]}')
    yield "another stage", made('{"stage": 9}')
    yield "short", file.read_bytes()[:-8]
    yield "a header without end", struct.pack("<Q", 1 << 60) + b"{}"


def test_a_damaged_state_file_is_named(finished):
    """Whole by its manifest."""
    folder = finished / "checkpoints"
    manifest = json.loads((folder / "step-4" / "MANIFEST.json").read_text())
    file = folder / "step-4" / "rng-0.safetensors"
    good = file.read_bytes()
    for what, data in damaged_headers(file):
        file.write_bytes(data)
        write_manifest(folder / "step-4", manifest)
        with pytest.raises(UserError, match=f"{re.escape(str(file))} is not read: it holds no state"):
            checkpoint.find(folder, step=4)
        assert checkpoint.find(folder)[0].name == "step-2", what
    file.write_bytes(good)
    write_manifest(folder / "step-4", manifest)
    assert checkpoint.find(folder)[0].name == "step-4"


def test_a_forged_manifest_is_passed_over(finished):
    """It matches its own digest, and does not say what a manifest says."""
    folder = finished / "checkpoints"
    good = json.loads((folder / "step-4" / "MANIFEST.json").read_text())
    del good["digest"]
    changes = [
        {"zero": 7},
        {"world_size": 0},
        {"world_size": 10**9},
        {"step": "x"},
        {"files": None},
        {"files": {"a": 1}},
    ]
    for change in [*changes, {"state": 1}, {"zero": None}]:
        forged = {**good, **change}
        (folder / "step-4" / "MANIFEST.json").write_text(json.dumps({**forged, "digest": digest(forged)}))
        assert checkpoint.find(folder)[0].name == "step-2", change
        with pytest.raises(UserError, match=r"MANIFEST.json is damaged"):
            checkpoint.find(folder, step=4)


@pytest.mark.parametrize(
    "name, change",
    [
        ("deepspeed/mp_rank_00_model_states", {"module": {}}),
        ("deepspeed/mp_rank_00_model_states", {"global_steps": None, "module": [1]}),
        ("rng-0", {"torch": "x"}),
    ],
)
def test_a_forged_state_is_an_error_with_a_name(finished, tmp_path, name, change):
    """Whole by its manifest."""
    folder = finished / "checkpoints" / "step-4"
    file = folder / f"{name}.safetensors"
    state = {**state_files.read(file), **change}
    with open(tmp_path / "forged", "wb") as out:
        state_files.write(state, out)
    (tmp_path / "forged").replace(file)
    write_manifest(folder, json.loads((folder / "MANIFEST.json").read_text()))
    verbs = [("resume", finished, "train.steps=5")]
    if name != "rng-0":
        verbs.append(("export", finished, tmp_path / "out", "--step", "4"))
    for arguments in verbs:
        code, output = launch.fastft(*arguments, check=False)
        assert code == 1 and "step-4" in output and "Traceback" not in output, (arguments, output[-1500:])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_hostile_checkpoint_runs_nothing(finished, tmp_path, protocol):
    """An older one, whole by its manifest, with code in place of state, or beside it: it is named, and no code has
    run.
    """
    folder, mark = finished / "checkpoints", tmp_path / "mark"
    as_older(folder / "step-4")
    manifest_file = folder / "step-4" / "MANIFEST.json"
    manifest = json.loads(manifest_file.read_text())
    assert checkpoint.find(folder)[0].name == "step-4"
    for name in [name for name in manifest["files"] if name.endswith(".pt")]:
        file = folder / "step-4" / name
        good = file.read_bytes()
        state = torch.load(file, weights_only=False)
        torch.save({**state, "more": Hostile(mark)}, file, pickle_protocol=protocol)
        write_manifest(folder / "step-4", manifest)
        with pytest.raises(UserError, match=f"{re.escape(str(file))} is not read: it holds"):
            checkpoint.find(folder, step=4)
        assert checkpoint.find(folder)[0].name == "step-2"
        file.write_bytes(good)
    manifest_file.write_text(json.dumps(manifest))
    assert checkpoint.find(folder)[0].name == "step-4"
    # Beside them, also behind a link, and by names that DeepSpeed's converter takes for its own.
    inside, moved = folder / "step-4" / "deepspeed", tmp_path / "moved"
    for linked in (False, True):
        if linked:
            inside.rename(moved)
            inside.symlink_to(moved)
        for name in ("zero_pp_rank_9_mp_rank_00_optim_states.pt", "mp_rank_00", "mp_rank_00.bin"):
            torch.save(Hostile(mark), inside / name)
            with pytest.raises(UserError, match=f"{re.escape(str(inside / name))} is no part of the checkpoint"):
                checkpoint.find(folder, step=4)
            entry = {"bytes": (inside / name).stat().st_size, "sha256": sha256_file(inside / name)}
            forged = {**manifest, "files": {**manifest["files"], f"deepspeed/{name}": entry}}
            forged.pop("digest")
            manifest_file.write_text(json.dumps({**forged, "digest": digest(forged)}))
            with pytest.raises(UserError, match=f"{re.escape(str(inside / name))} is not read: it holds"):
                checkpoint.find(folder, step=4)
            manifest_file.write_text(json.dumps(manifest))
            (inside / name).unlink()
            assert checkpoint.find(folder)[0].name == "step-4"
    assert not mark.exists()


@pytest.mark.parametrize("zero", [0, 3])
def test_an_older_checkpoint_is_gone_on_from(lm_config, tmp_path, zero):
    """Its files are pickles; the run ends as it would."""
    lm_config["train"] = {"steps": 4, "log_every": 1}
    lm_config["checkpoint"] = {"every": 2, "keep": 2}
    lm_config["parallel"] = {"zero": zero}
    launch.fastft("train", launch.write_config(tmp_path / "c.yaml", lm_config))
    folder, truth = Path(lm_config["run"]["dir"]) / "checkpoints", tmp_path / "truth"
    (folder / "step-4").rename(truth)
    as_older(folder / "step-2")
    assert not list(folder.rglob("*.safetensors")) and len(list(folder.rglob("*.pt"))) == (3 if zero else 2)
    launch.fastft("resume", folder.parent)
    same_checkpoints(truth, folder / "step-4")


def test_an_unfinished_save_is_not_a_checkpoint(finished):
    folder = finished / "checkpoints"
    (folder / "step-4").rename(folder / "step-5.tmp")
    assert checkpoint.steps(folder) == [2]


def test_a_finished_run_says_so_at_once(finished):
    before = (finished / "metrics.jsonl").read_bytes()
    _, output = launch.fastft("resume", finished)
    assert "finished: all 4 steps are done" in output and f"fastft resume {finished} train.steps=8" in output
    launch.fastft("resume", finished, "optim.lr=1e-5")  # nothing to use it for
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_resume_refuses_what_cannot_be_exact(finished, tmp_path):
    code, output = launch.fastft("resume", finished, "data.max_length=32", check=False)
    assert code == 1 and "changed since this was written" in output
    code, output = launch.fastft("resume", tmp_path / "nowhere", check=False)
    assert code == 1 and "not a run folder" in output


def test_a_run_is_not_written_over(finished, tmp_path):
    code, output = launch.fastft("train", tmp_path / "c.yaml", check=False)
    assert code == 1 and "already holds a run" in output and "--overwrite" in output
    assert checkpoint.steps(finished / "checkpoints") == [2, 4]


def test_export_of_a_checkpoint_is_the_model(finished, tmp_path):
    launch.fastft("export", finished, tmp_path / "hf", "--step", "4")
    first, second = (load_file(folder / "model.safetensors") for folder in (finished / "model", tmp_path / "hf"))
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_the_best_checkpoint_stays(lm_config, tmp_path):
    """The loss of a model at a rate of learning that ruins it is best at the first save:
    BEST names it, and it is kept beside the newest.
    """
    lm_config["optim"]["lr"] = 0.5
    lm_config["train"] = {"steps": 8, "eval_every": 2}
    lm_config["checkpoint"] = {"every": 2, "keep": 1, "best_by": "eval.loss"}
    launch.fastft("train", launch.write_config(tmp_path / "c.yaml", lm_config))
    folder, run = tmp_path / "run" / "checkpoints", Path(lm_config["run"]["dir"])
    losses = {r["step"]: r["loss"] for r in track.read(run) if r["kind"] == "eval"}
    best = json.loads((folder / "BEST").read_text())
    assert (
        best["step"] == min(losses, key=losses.get)
        and best["value"] == losses[best["step"]]
        and best["metric"] == "eval.loss"
    )
    assert checkpoint.steps(folder) == sorted({best["step"], 8})
    code, output = launch.fastft(
        "train", tmp_path / "c.yaml", "--overwrite", "checkpoint.best_by=eval.los", check=False
    )
    assert (
        code == 1 and "eval.los is not measured" in output and "eval.loss" in output and checkpoint.steps(folder)
    )  # refused before anything was touched


def test_nan_is_not_the_best():
    metric = Metric("loss", lower_is_better=True)
    task = SimpleNamespace(metric=lambda name, key: metric)
    config = SimpleNamespace(checkpoint=SimpleNamespace(best_by="eval.loss"))
    best = Best(None, SimpleNamespace(job=SimpleNamespace(config=config, task=task), observers={}))
    best.load_state({"best": {"step": 2, "metric": "eval.loss", "value": 1.0}})
    for value, better in ((float("nan"), False), (float("inf"), False), (2.0, False), (0.5, True)):
        best.after_evaluation(4, {"eval": {"loss": value}})
        assert best.saved(4) is better
    assert best.best == {"step": 4, "metric": "eval.loss", "value": 0.5}
    other = Best(None, best.view)
    other.load_state({"best": {"step": 2, "metric": "eval.accuracy", "value": 0.1}})
    assert other.best is None  # an accuracy cannot be compared with a loss


def test_the_best_goes_by_the_metrics_direction():
    """An error rate is better when it is lower, an accuracy when it is higher, whatever they are called."""
    assert Metric("wer", lower_is_better=True).better(0.1, 0.9) and not Metric("wer", lower_is_better=True).better(
        0.9, 0.1
    )
    assert Metric("accuracy").better(0.9, 0.1) and not Metric("accuracy").better(0.1, 0.9)


def test_a_resume_takes_the_optimizers_settings_of_the_configuration(lm_config, tmp_path):
    lm_config["checkpoint"] = {"every": 2}
    launch.fastft("train", launch.write_config(tmp_path / "c.yaml", lm_config))
    run = Path(lm_config["run"]["dir"])
    shutil.copytree(run, tmp_path / "other")
    launch.fastft("resume", run, "train.steps=6")
    launch.fastft(
        "resume", tmp_path / "other", f"run.dir={tmp_path / 'other'}", "train.steps=6", "optim.weight_decay=0.9"
    )
    one, other = (load_file(folder / "model" / "model.safetensors") for folder in (run, tmp_path / "other"))
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_more_epochs_go_on_where_the_last_step_ended(lm_config, tmp_path):
    """The last step of a run counted in epochs is short; those that follow leave nothing out, and trace knows it."""
    lm_config["batch"], lm_config["train"] = {"size": 7}, {"epochs": 1.0, "log_every": 1}
    lm_config["checkpoint"] = {"every": 5}
    launch.fastft("train", launch.write_config(tmp_path / "c.yaml", lm_config))
    run = Path(lm_config["run"]["dir"])
    record = next(r for r in track.read(run) if r["kind"] == "run")
    n, first = record["data"]["train"]["sequences"], record["total_steps"]
    assert n % 7 and first == -(-n // 7), "the last step is short"
    for epochs in (1.5, 2.0):
        launch.fastft("resume", run, f"train.epochs={epochs}")
    last = [r for r in track.read(run) if r["kind"] == "train"][-1]
    half = round(1.5 * n)
    assert last["step"] == first + -(-(half - n) // 7) + -(-(2 * n - half) // 7) and last["epoch"] == 2.0

    def traced(step: int) -> list[int]:
        _, output = launch.fastft("trace", run, "--step", str(step), "--json")
        return [s["sample"] for s in json.loads(output.splitlines()[-1])]

    taken = [traced(step) for step in (first - 1, first, first + 1, last["step"])]
    seed = configuration.load(run / "config.yaml").data.seed
    every = order.sample_ids(n, seed, 0, 2 * n).tolist()
    assert taken[0] == every[7 * (first - 2) : 7 * (first - 1)] and taken[1] == every[7 * (first - 1) : n]
    assert taken[2] == every[n : n + 7] and taken[3] == every[2 * n - len(taken[3]) :]
    launch.fastft("resume", run, "train.epochs=null", f"train.steps={last['step'] + 1}")
    assert traced(last["step"] + 1) == order.sample_ids(n, seed, 2 * n, 2 * n + 7).tolist()
    code, output = launch.fastft("resume", run, "train.steps=null", f"train.epochs={(2 * n + 1) / n}", check=False)
    assert code == 1 and "Raise train.steps or train.epochs" in output  # as many steps, but the last one was longer


def test_pruning_keeps_what_was_just_written(tmp_path):
    """Steps 15 and 20 are damaged: the run went back past them, so they go, and 10 and 12 stay."""
    for step in (5, 10, 12, 15, 20):
        (tmp_path / f"step-{step}").mkdir()
        (tmp_path / f"step-{step}" / "MANIFEST.json").write_text("{}")
    checkpoint._prune(tmp_path, 12, 2)
    assert checkpoint.steps(tmp_path) == [10, 12]
    (tmp_path / "BEST").write_text('{"step": 10}')
    checkpoint._prune(tmp_path, 12, 1)
    assert checkpoint.steps(tmp_path) == [10, 12]


def test_a_manifest_vouches_for_itself(finished):
    path = finished / "checkpoints" / "step-4" / "MANIFEST.json"
    manifest = json.loads(path.read_text())
    for change in ({"step": 0}, {"files": {}}, {"digest": None}):
        path.write_text(json.dumps({**manifest, **change}))
        assert checkpoint.find(finished / "checkpoints")[0].name == "step-2"
    del manifest["state"]
    path.write_text(json.dumps(manifest))
    assert checkpoint.find(finished / "checkpoints")[0].name == "step-2"


def test_other_trained_parameters_are_refused(lm_config, tmp_path):
    """Flat shards are restored by position: another frozen layer of the same size would take the first's weights."""
    lm_config["model"]["freeze"] = ["model.layers.0.*"]
    lm_config["parallel"] = {"zero": 1}
    lm_config["train"] = {"steps": 1}
    launch.fastft("train", launch.write_config(tmp_path / "c.yaml", lm_config))
    code, output = launch.fastft(
        "resume", tmp_path / "run", "model.freeze=['model.layers.1.*']", "train.steps=2", check=False
    )
    assert code == 1 and "other trained parameters" in output and "Traceback" not in output
