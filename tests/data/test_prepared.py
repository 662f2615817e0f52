import errno
import fcntl
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from fastft import files
from fastft.data import sources
from fastft.data.prepared import RaggedWriter, check, prepare, verify
from fastft.data.sources import fingerprint
from fastft.errors import UserError
from fastft.files import digest

ROWS = [[1, 2, 3], [], [70_000]]
KEY = digest(["k", []])  # of settings "k" and no sources


def build(folder):
    writer = RaggedWriter(folder, "tokens")
    for row in ROWS:
        writer.append(row)
    writer.close()
    np.save(folder / "labels.npy", np.arange(3))
    return {"note": "x"}


def test_round_trip(tmp_path):
    (tmp_path / "in.txt").write_text("text")
    data = prepare(tmp_path / "d", "k", [str(tmp_path / "in.txt")], build)
    assert (
        [list(data["tokens"][i]) for i in range(3)] == ROWS
        and data["labels"].tolist() == [0, 1, 2]
        and data.meta == {"note": "x"}
    )


def test_same_key_is_reused_another_is_built(tmp_path):
    calls = []

    def counted(folder):
        calls.append(1)
        return build(folder)

    for key in ("a", "a", "b"):
        prepare(tmp_path / "d", key, [], counted)
    assert len(calls) == 2


def test_a_cut_file_is_built_again_and_what_has_no_manifest_is_not_ours(tmp_path):
    folder = tmp_path / "d"
    prepare(folder, "k", [], build)
    (folder / "tokens.values.bin").write_bytes(b"")
    assert "cut short" in check(folder, KEY)
    assert list(prepare(folder, "k", [], build)["tokens"][0]) == [1, 2, 3]
    (folder / "MANIFEST.json").unlink()
    assert check(folder, KEY) == "not there"
    with pytest.raises(UserError, match="holds other files"):
        prepare(folder, "k", [], build)


def test_litter_of_file_managers_is_nobodys(tmp_path):
    folder = tmp_path / "d"
    prepare(folder, "k", [], build)
    for name in (".DS_Store", ".nfs0001", "Thumbs.db"):
        (folder / name).touch()
    prepare(folder, "another", [], build)
    assert check(folder, digest(["another", []])) is None


@pytest.mark.parametrize("name", ["notes.txt", "mine.npy", "sub"])
def test_what_stands_in_no_manifest_is_not_ours(tmp_path, name):
    folder = tmp_path / "d"
    prepare(folder, "k", [], build)
    (folder / name).mkdir() if name == "sub" else (folder / name).write_text("mine")
    with pytest.raises(UserError, match=f"holds other files: {name}"):
        prepare(folder, "another", [], build)
    assert (folder / name).exists() and check(folder, KEY) is None


def test_a_failed_build_leaves_nothing_that_looks_done(tmp_path):
    def fail(folder):
        (folder / "half.npy").touch()
        raise UserError("bad row")

    with pytest.raises(UserError):
        prepare(tmp_path / "d", "k", [], fail)
    assert check(tmp_path / "d", KEY) == "not there"


def test_verify_finds_a_flipped_bit(tmp_path):
    folder = tmp_path / "d"
    prepare(folder, "k", [], build)
    verify(folder)
    data = bytearray((folder / "tokens.values.bin").read_bytes())
    data[0] ^= 1
    (folder / "tokens.values.bin").write_bytes(data)
    with pytest.raises(UserError, match=r"tokens.values.bin"):
        verify(folder)


def test_no_rows_at_all(tmp_path):
    def nothing(folder):
        RaggedWriter(folder, "tokens").close()
        return {}

    assert len(prepare(tmp_path / "d", "k", [], nothing)["tokens"]) == 0


def test_sources_are_read_again_only_when_they_changed(tmp_path, monkeypatch):
    """By their bytes; a file left alone is known by its size and times,
    so that a resume does not read the corpus again.
    """
    folder, reads, builds = tmp_path / "d", [], []
    sha256_file = sources.sha256_file
    monkeypatch.setattr(sources, "sha256_file", lambda path: reads.append(path.name) or sha256_file(path))
    monkeypatch.setattr(sources, "SETTLED", -1.0)  # a test does not wait
    source = tmp_path / "corpus"
    source.mkdir()
    for name in ("a.txt", "b.txt"):
        (source / name).write_text(name)

    def opened() -> tuple[list[str], bool]:
        reads.clear()
        before = len(builds)
        prepare(folder, "k", [str(source)], lambda scratch: builds.append(1) or build(scratch))
        read = sorted(name for name in reads if name.endswith(".txt"))  # in threads
        return read, len(builds) > before

    assert opened() == (["a.txt", "b.txt"], True)
    assert opened() == ([], False)
    (source / "b.txt").touch()
    assert opened() == (["b.txt"], False)  # the same bytes
    assert opened() == ([], False)
    times = os.stat(source / "a.txt")
    (source / "a.txt").write_text("A.txt")  # as many bytes, and the old time of modification
    os.utime(source / "a.txt", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert opened() == (["a.txt"], True)
    (source / "c.txt").write_text("c")
    assert opened() == (["c.txt"], True)


def test_a_file_that_was_just_written_is_not_known_by_its_times(tmp_path):
    (tmp_path / "new.txt").write_text("x")
    found = fingerprint([tmp_path / "new.txt"], {})
    assert list(found[str(tmp_path / "new.txt")]) == ["sha256"]
    os.utime(tmp_path / "new.txt", ns=(0, 0))  # the inode's own change is no older for that
    assert list(fingerprint([tmp_path / "new.txt"], {})[str(tmp_path / "new.txt")]) == ["sha256"]


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "null", "{}", '{"format": 2}', '{"format": 2, "sources": [], "files": {}, "meta": {}}', "\x00\xff"],
)
def test_a_manifest_that_is_none_says_nothing_of_the_files(tmp_path, content):
    """They may be anybody's: another program has a MANIFEST.json too."""
    folder = tmp_path / "d"
    prepare(folder, "k", [], build)
    (folder / "MANIFEST.json").write_bytes(content.encode("latin-1"))
    assert "broken" in check(folder, KEY)
    with pytest.raises(UserError, match="delete the folder"):
        prepare(folder, "k", [], build)
    assert (folder / "labels.npy").exists()


def test_prepared_data_of_another_version_or_with_a_changed_manifest_is_made_anew(tmp_path):
    folder = tmp_path / "d"
    for change in ({"format": 1}, {"meta": {"note": "y"}}):
        prepare(folder, "k", [], build)
        path = folder / "MANIFEST.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        assert "broken" in check(folder, KEY)
        assert list(prepare(folder, "k", [], build)["tokens"][0]) == [1, 2, 3] and check(folder, KEY) is None


@pytest.mark.parametrize("change", ["content", "new file", "file gone"])
def test_sources_that_change_while_they_are_read(tmp_path, change):
    """What was read is of neither version: it may not be stored under the key of one."""
    source = tmp_path / "corpus"
    source.mkdir()
    for name in ("a.txt", "b.txt"):
        (source / name).write_text("one")

    def changing(folder):
        if change == "file gone":
            (source / "a.txt").unlink()
        else:
            (source / ("a.txt" if change == "content" else "c.txt")).write_text("two")
        return build(folder)

    with pytest.raises(UserError, match=r"[ac]\.txt: c.* while .* was read"):
        prepare(tmp_path / "d", "k", [str(source)], changing)
    assert not (tmp_path / "d").exists()
    prepare(tmp_path / "d", "k", [str(source)], build)


WITHOUT_LOCKS = """
import errno, fcntl, os, sys, time
from pathlib import Path
def flock(file, operation):
    raise OSError(getattr(errno, sys.argv[2]), "no locks")
fcntl.flock = flock
from fastft import files
from fastft.data import prepared
files.TOUCHED, files.ABANDONED = 0.1, 1.5
def build(folder):
    with open(sys.argv[3], "a") as f:
        f.write("built ")
    time.sleep(2.0)  # longer than a folder that nobody touches would be respected
    writer = prepared.RaggedWriter(folder, "tokens")
    writer.append([1])
    writer.close()
    return {}
print(len(prepared.prepare(Path(sys.argv[1]), "k", [], build)["tokens"]))
"""


@pytest.mark.parametrize("left_behind", [False, True])
@pytest.mark.parametrize(
    "answer", ["ENOLCK", *(pytest.param(a, marks=pytest.mark.long) for a in ("ENOSYS", "EOPNOTSUPP"))]
)
def test_a_file_system_without_locks(tmp_path, answer, left_behind):
    """Three processes at once, one of them builds; a held lock of a killed process holds nobody up for long."""
    if left_behind:
        (tmp_path / ".d.lock.fastft-held").write_text("somebody")
    command = [sys.executable, "-c", WITHOUT_LOCKS, str(tmp_path / "d"), answer, str(tmp_path / "builds")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [p.communicate(timeout=120)[0] for p in processes] == ["1\n"] * 3
    assert (tmp_path / "builds").read_text() == "built "
    assert sorted(p.name for p in tmp_path.iterdir()) == ["builds", "d", "d.lock"]


def test_a_lock_of_another_is_left_to_it(tmp_path, monkeypatch):
    """One that was taken over: by the look at it before it is taken away,
    and at the release of a holder who was stopped for long.
    """
    path = tmp_path / "lock"
    path.write_text("new holder")
    files._take_away(path, "old holder")
    assert path.read_text() == "new holder" and list(tmp_path.iterdir()) == [path]
    files._take_away(path, "new holder")
    monkeypatch.setattr(files, "TOUCHED", 0.05)
    with files._locked_by_file(path):
        path.write_text("new holder")
        os.utime(path, ns=(0, 0))
        time.sleep(0.3)
    assert path.read_text() == "new holder" and path.stat().st_mtime_ns == 0
    path.unlink()
    with files._locked_by_file(path):
        path.unlink()
        time.sleep(0.2)


def test_a_lock_that_fails_otherwise_is_an_error(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.EBADF, "?")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="Errno 9"):
        prepare(tmp_path / "d", "k", [], build)


def test_prepared_data_on_a_read_only_disk(tmp_path):
    """What is complete is used; what would have to be made is refused."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    disk, source = tmp_path / "disk", tmp_path / "x.txt"
    disk.mkdir()
    source.write_text("x")
    os.utime(source, ns=(0, 0))
    prepare(disk / "d", "k", [str(source)], build)
    for other in (["mount", "--bind", str(disk), str(disk)], ["mount", "-o", "remount,ro,bind", str(disk)]):
        if subprocess.run(other, capture_output=True).returncode:
            pytest.skip("this root may not mount")
    try:
        assert len(prepare(disk / "d", "k", [str(source)], build)["tokens"]) == 3
        with pytest.raises(
            UserError, match=r"/d: cannot be used \(inputs, tokenizer or settings changed\), nor written"
        ):
            prepare(disk / "d", "another", [str(source)], build)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_what_is_given_twice_counts_twice(tmp_path):
    a, b = (str(tmp_path / name) for name in ("a", "b"))
    for name in (a, b):
        with open(name, "w") as f:
            f.write(name)
    keys = [prepare(tmp_path / "d", "k", sources, build).key for sources in ([a, b, a], [a, b, b], [a, a, b], [a, b])]
    assert len(set(keys)) == 4


def test_another_file_of_the_same_name_is_seen(tmp_path, monkeypatch):
    """A folder renamed, or a link that leads elsewhere: neither changes a time of the file."""
    monkeypatch.setattr(sources, "SETTLED", -1.0)
    for version in ("v1", "v2"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "x.txt").write_text(version)
        os.utime(tmp_path / version / "x.txt", ns=(0, 0))
    known = fingerprint([tmp_path / "v1" / "x.txt"], {})
    (tmp_path / "v1").rename(tmp_path / "v0")
    (tmp_path / "v2").rename(tmp_path / "v1")
    found = fingerprint([tmp_path / "v1" / "x.txt"], known)
    assert found != known
