"""Sources in an object store: a real local S3 server, whose faults are one clear error each."""

import importlib.util
import json
import os
import socket
import subprocess
import sys

import corpora
import pytest
from slurm import wait

import launch
from fastft.corpus import build
from fastft.corpus.build import prepare
from fastft.errors import UserError

missing = [name for name in ("moto", "flask_cors", "s3fs") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}: make test-clusters installs them")


@pytest.fixture(scope="module")
def server():
    port = launch.free_port()
    code = f"from moto.server import main; main(['-H', '127.0.0.1', '-p', '{port}'])"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def listens() -> bool:
        assert process.poll() is None, "the S3 server ended"
        with socket.socket() as s:
            return s.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait(listens, 60, "S3 server")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def s3(server, monkeypatch, tmp_path):
    """The bucket as this process, and all that it starts, reaches it."""
    import s3fs

    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    keys |= {"AWS_ENDPOINT_URL": server, "AWS_EC2_METADATA_DISABLED": "true", "HOME": str(tmp_path)}
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    found = s3fs.S3FileSystem()
    if not found.exists("bucket"):
        found.mkdir("bucket")
    yield found
    found.rm("bucket/raw", recursive=True)
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def raw(s3, tmp_path):
    """The same files in a folder and in the bucket: lines, gzip and Parquet."""
    import gzip

    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / "raw"
    folder.mkdir()
    texts = [corpora.prose(n) for n in range(120)]
    corpora.jsonl(folder / "a.jsonl", texts[:40])
    with gzip.open(folder / "b.txt.gz", "wt") as f:
        f.write("\n\n".join(texts[40:80]))
    pq.write_table(pa.table({"text": texts[80:]}), folder / "c.parquet")
    s3.put(f"{folder}/", "bucket/raw/", recursive=True)
    return folder


def test_the_bytes_of_a_folder(tmp_path, s3, raw, tiny_llama):
    """With two workers; but for what files are called, all is the same."""
    path = {"sources": [{"path": "s3://bucket/raw", "name": "raw"}], "tokenizer": str(tiny_llama), "workers": 2}
    config = launch.write_config(
        tmp_path / "c.yaml", {**path, "output": str(tmp_path / "s3" / "out"), "rules": ["length"]}
    )
    done = subprocess.run([sys.executable, "-m", "fastft", "prepare", config], env={**launch.ENV, **os.environ})
    assert done.returncode == 0
    local = corpora.made(tmp_path / "local", tiny_llama, str(raw), workers=2, rules=["length"])
    found, wanted = (corpora.content(tmp_path / name / "out") for name in ("s3", "local"))
    assert found.pop("manifest.json") != wanted.pop("manifest.json") and found == wanted
    told = json.loads((tmp_path / "s3" / "out" / "manifest.json").read_text())
    assert told["totals"] == local.manifest["totals"] and told["totals"]["documents"] == 120
    for one, other in zip(told["sources"][0]["files"], local.manifest["sources"][0]["files"], strict=True):
        assert one["sha256"] == other["sha256"] and one["file"].startswith("s3://bucket/raw/")


def config_of(tmp_path, tiny_llama, path="s3://bucket/raw"):
    return corpora.config_of(tmp_path, tiny_llama, path)


def test_what_is_taken_away_or_written_anew_meanwhile(tmp_path, s3, raw, tiny_llama, monkeypatch):
    config = config_of(tmp_path, tiny_llama)
    hashed = build.hashes

    def then(change):
        def call(files, known):
            found = hashed(files, known)
            change()
            return found

        monkeypatch.setattr(build, "hashes", call)

    then(lambda: s3.rm("bucket/raw/c.parquet"))
    with pytest.raises(UserError, match=r"^s3://bucket/raw/c\.parquet: is not there: "):
        prepare(config)
    s3.put(str(raw / "c.parquet"), "bucket/raw/c.parquet")
    corpora.jsonl(raw / "b.jsonl", [corpora.prose(n) for n in range(200, 240)])
    then(lambda: s3.put(str(raw / "b.jsonl"), "bucket/raw/a.jsonl"))
    with pytest.raises(UserError, match=r"^s3://bucket/raw/a\.jsonl: changed while it was read"):
        prepare(config)
    monkeypatch.setattr(build, "hashes", hashed)
    assert prepare(config).manifest["totals"]["documents"] == 120


@pytest.mark.parametrize(
    "path, said",
    [
        ("s3://buckett/raw", "cannot be listed: The specified bucket does not exist|is not there: .*bucket"),
        ("s3://buckett/raw/*.jsonl", "cannot be listed: The specified bucket does not exist|is not there: .*bucket"),
        ("s3://bucket/rawl", "is not there: bucket/rawl"),
        ("s3://bucket/raw/d.jsonl", "is not there: bucket/raw/d.jsonl"),
        ("s3://bucket/raw/*.csv", "no file of a known format"),
    ],
)
def test_a_wrong_name(tmp_path, s3, raw, tiny_llama, path, said):
    with pytest.raises(UserError, match=f"^s3://.*: ({said})"):
        prepare(config_of(tmp_path, tiny_llama, path))


@pytest.mark.parametrize("path", ["s3://bucket/raw", "s3://bucket/raw/*.jsonl", "s3://bucket/raw/a.jsonl"])
def test_no_credentials(tmp_path, s3, raw, tiny_llama, monkeypatch, path):
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(UserError, match=r"cannot be listed: Unable to locate credentials.*\n.*credentials"):
        prepare(config_of(tmp_path, tiny_llama, path))
