"""`executor` of `fastft prepare`: a real Ray and a real Slurm on this machine give the bytes that one process gives."""

import importlib.util
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import corpora
import killing
import pytest
import slurm as real

import launch
from fastft.config.corpus import corpus_config
from fastft.corpus import on_slurm
from fastft.corpus.build import prepare
from fastft.corpus.shards import Corpus
from fastft.errors import UserError

WORDS = [f"word{n}" for n in range(400)]
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray: pip install 'fastft[ray]'")


@pytest.fixture(scope="module")
def slurm():
    with real.cluster() as env:
        yield env


@pytest.fixture
def in_slurm(slurm, monkeypatch):
    """This process, where Slurm's commands find the cluster."""
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, slurm[name])


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_llama):
    """Two sources of several blocks, near-duplicates in them; one eighth is shorter than a rule wants."""
    folder, rng = tmp_path_factory.mktemp("raw"), random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=300 if n % 8 else 5)) for n in range(4000)]
    texts[1000:1040] = [text + " once more" for text in texts[:40]]
    for number in range(2):
        corpora.jsonl(folder / f"{number}.jsonl", texts[number::2])
    return {
        "tokenizer": str(tiny_llama),
        "sources": [{"path": str(folder / f"{number}.jsonl"), "name": f"s{number}"} for number in range(2)],
        "rules": {"unicode": True, "length": {"min_words": 20}},
        "duplicates": "near",
        "shard_tokens": 300_000,
    }


@pytest.fixture(scope="module")
def local(config, tmp_path_factory):
    """Files of the corpus that one process makes, and their hashes."""
    folder = tmp_path_factory.mktemp("local")
    prepare(corpus_config({**config, "output": str(folder / "out"), "workers": 1}, "test"))
    found = corpora.content(folder / "out")
    assert sum(name.endswith("ids.npy") for name in found) >= 4
    return found


def run(config: dict, folder: Path, env: dict, **settings) -> subprocess.CompletedProcess:
    """`fastft prepare` in a process of its own."""
    path = launch.write_config(
        folder / "corpus.yaml", {"version": 1, **config, "output": str(folder / "out"), **settings}
    )
    command = [sys.executable, "-m", "fastft", "prepare", str(path)]
    return subprocess.run(command, env={**launch.ENV, **env}, cwd=folder, capture_output=True, text=True, timeout=120)


@needs_ray
@pytest.mark.slow
def test_ray_gives_the_same_bytes_also_when_an_actor_is_lost(config, local, tmp_path):
    """An actor is killed once; the first process, in which Ray then is, replaces it."""
    raw = json.dumps({**config, "output": str(tmp_path / "out"), "workers": 2, "executor": "ray"})
    code = f"""
import json, os, signal
import ray
from fastft.config.corpus import corpus_config
from fastft.corpus import on_ray
from fastft.corpus.build import prepare

ray.init(num_cpus=2, include_dashboard=False)
killed = []
start, get = on_ray._Actor.send, on_ray._Actor.result
def send(self, work):
    if not killed:
        pid = ray.get(self.actor.__ray_call__.remote(lambda actor: os.getpid()))
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)
    start(self, work)
on_ray._Actor.send = send
prepare(corpus_config(json.loads({raw!r}), "test"))
assert killed and ray.is_initialized()
"""
    done = subprocess.run([sys.executable, "-c", code], env=launch.ENV, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "an actor was lost" in done.stderr + done.stdout
    assert corpora.content(tmp_path / "out") == local


@needs_ray
@pytest.mark.long
@pytest.mark.slow
def test_a_line_of_the_config_starts_ray_and_ends_it(config, local, tmp_path):
    done = run(config, tmp_path, {}, workers=2, executor="ray")
    assert done.returncode == 0, done.stderr[-3000:]
    assert corpora.content(tmp_path / "out") == local


@needs_ray
@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(4))
def test_killed_anywhere_on_ray(tmp_path, tiny_llama, seed):
    """The first process is killed; the actors that it leaves on a cluster that stays are no harm to the next one."""
    import ray

    raw = killing.raw_corpus(tmp_path, tiny_llama)
    address = ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False).address_info["gcs_address"]
    try:
        settings = {"executor": {"ray": {"address": address}}, "workers": 2}

        def prepared(folder):
            config = {**raw, **settings, "output": str(folder / "out")}
            return ["prepare", launch.write_config(folder / "corpus.yaml", config)]

        # as ray.init has set it here, where Ray asks for its token
        env = {name: os.environ[name] for name in ("RAY_AUTH_MODE",) if name in os.environ}
        killing.killed(tmp_path, 5, prepared, seed, env=env)
    finally:
        ray.shutdown()
    prepare(corpus_config({**raw, "output": str(tmp_path / "one")}, "test"))
    assert Corpus(tmp_path / "one").manifest["totals"] == Corpus(tmp_path / "whole" / "out").manifest["totals"]


@needs_ray
def test_a_ray_that_is_not_there(config, tmp_path):
    where = f"127.0.0.1:{launch.free_port()}"
    settings = {"output": str(tmp_path / "out"), "executor": {"ray": {"address": where}}}
    with pytest.raises(UserError, match=f"executor: ray: {where} cannot be used: .*refused"):
        prepare(corpus_config({**config, **settings}, "test"))


def test_ray_is_not_installed(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"fastft\[ray\]"):
        prepare(corpus_config({**config, "output": str(tmp_path / "out"), "executor": "ray"}, "test"))


@pytest.mark.slow
def test_slurm_gives_the_same_bytes_and_leaves_nothing(slurm, config, local, tmp_path):
    done = run(config, tmp_path, slurm, workers=2, executor={"slurm": {"partition": "p", "time": "10:00"}})
    assert done.returncode == 0, done.stderr[-3000:]
    assert corpora.content(tmp_path / "out") == local
    assert not real.output(slurm, "squeue", "-h").strip()


@pytest.mark.slow
def test_a_cancelled_job_is_named_and_another_run_goes_on(slurm, in_slurm, config, local, tmp_path):
    raw = {**config, "output": str(tmp_path / "out"), "workers": 2, "executor": "slurm"}
    blocks = []

    def cancels(build):
        blocks.append(1)
        if len(blocks) == 2:
            job = (tmp_path / "out" / ".jobs" / "job").read_text()
            subprocess.run(["scancel", f"{job}_1"], check=True)
            time.sleep(2)

    with pytest.raises(UserError, match=r"job \d+_1 ended: CANCELLED.*\.jobs/\d+_1\.log"):
        prepare(corpus_config(raw, "test"), report=cancels)
    assert not real.output(slurm, "squeue", "-h").strip()
    assert not (tmp_path / "out" / ".jobs" / "key").exists()
    prepare(corpus_config(raw, "test"))
    assert corpora.content(tmp_path / "out") == local


@pytest.mark.long
@pytest.mark.slow
def test_a_run_that_is_killed_leaves_no_process_and_its_jobs_are_cancelled(slurm, in_slurm, config, local, tmp_path):
    """Two tasks of three work, one waits in the queue; the first process is killed. The next run cancels what waits."""
    settings = {"workers": 3, "executor": {"slurm": {"options": ["--exclusive", "--hold"]}}}
    raw = {**config, "output": str(tmp_path / "out"), **settings}
    code = f"""
import json, os, signal, subprocess, threading, time
from fastft.config.corpus import corpus_config
from fastft.corpus.build import prepare

def release():  # two of the tasks; the third one stays held
    while not os.path.exists({str(tmp_path / "out" / ".jobs" / "job")!r}):
        time.sleep(0.1)
    job = open({str(tmp_path / "out" / ".jobs" / "job")!r}).read()
    subprocess.run(["scontrol", "release", job + "_0", job + "_1"], check=True)

threading.Thread(target=release, daemon=True).start()
killed = lambda build: os.kill(os.getpid(), signal.SIGKILL)
prepare(corpus_config(json.loads({json.dumps(raw)!r}), "test"), report=killed)
"""
    done = subprocess.run([sys.executable, "-c", code], env={**launch.ENV, **slurm}, timeout=120)
    assert done.returncode == -signal.SIGKILL
    real.wait(
        lambda: not real.output(slurm, "squeue", "-h", "-t", "running,completing").strip(), 30, "end of the tasks"
    )
    before = (tmp_path / "out" / ".jobs" / "job").read_text()
    assert "PENDING" in real.output(slurm, "scontrol", "show", "job", f"{before}_2")
    prepare(corpus_config({**raw, "executor": "slurm", "workers": 1}, "test"))
    assert not real.output(slurm, "squeue", "-h").strip()
    assert corpora.content(tmp_path / "out") == local


@pytest.mark.long
@pytest.mark.slow
def test_what_slurm_does_not_start(slurm, in_slurm, config, tmp_path, monkeypatch):
    monkeypatch.setattr(on_slurm, "POLL", 0.5)

    def attempt(**settings):
        return prepare(corpus_config({**config, "output": str(tmp_path / "out"), "workers": 1, **settings}, "test"))

    with pytest.raises(UserError, match=r"sbatch refused the jobs: .*partition"):
        attempt(executor={"slurm": {"partition": "none"}})
    with pytest.raises(UserError, match=r"none of the tasks of job \d+ has begun .*PENDING \(BeginTime\)"):
        attempt(executor={"slurm": {"wait": 2, "options": ["--begin=now+1hour"]}})
    with pytest.raises(UserError, match=r"(?s)_0 ended before it could begin: FAILED .*cannot be reached from"):
        attempt(executor={"slurm": {"host": "nowhere.invalid"}})
    assert not real.output(slurm, "squeue", "-h").strip()


def test_who_has_no_key_is_no_worker(tmp_path):
    """A stranger's bytes are never unpickled, and do not keep a task from being heard."""
    pool = on_slurm.Jobs.__new__(on_slurm.Jobs)
    pool.key, pool.count = b"k" * 32, 1
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(b"\0\0\0\x05\x80\x05N.\x00" * 20)
        with pytest.raises(Exception, match="digest"):
            pool._greet(ours)


def test_what_the_config_says(config, tmp_path):
    def read(**settings):
        return corpus_config({**config, "output": str(tmp_path / "out"), **settings}, "test")

    assert read(executor="local") == read() and read(executor="ray").executor.ray is not None
    for settings, said in (
        ({"executor": "slurm"}, "the number of jobs"),
        ({"executor": "spark"}, "local, ray, slurm"),
        ({"executor": {"ray": True, "slurm": True}, "workers": 2}, "choose one"),
        ({"executor": {"slurm": {"time": 7200}}, "workers": 2}, "in quotes"),
    ):
        with pytest.raises(UserError, match=said):
            read(**settings)


def test_other_software_is_refused(config, monkeypatch, tmp_path):
    from fastft import processes
    from fastft.corpus import pool

    settings = corpus_config({**config, "output": str(tmp_path / "out")}, "test").model_dump(mode="json")
    from fastft.corpus import tokens, work

    setup = (settings, tokens.facts_of(settings["tokenizer"], None), False)
    wanted = work.software(*setup)
    block = work.Rows([(0, 1)], ["word1 " * 30], {0: "a:"})
    assert len(processes.opened(processes.answer(pool.ready((*setup, wanted)), block)).lengths) == 1
    with pytest.raises(UserError, match=r"tokenizers .* instead of 0\.1"):
        processes.opened(processes.answer(pool.ready((*setup, wanted | {"tokenizers": "0.1"})), block))
