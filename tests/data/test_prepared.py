import os

import numpy as np
import pytest

from fastft.data import prepared
from fastft.data.prepared import RaggedWriter, check, digest, fingerprint, prepare, verify
from fastft.errors import UserError

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
    assert [list(data["tokens"][i]) for i in range(3)] == ROWS and data["labels"].tolist() == [0, 1, 2] and data.meta == {"note": "x"}


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
    (folder / "MANIFEST.json").write_text("{")
    assert check(folder, KEY).startswith("manifest is broken")
    prepare(folder, "k", [], build)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        prepare(folder, "another", [], build)
    assert (folder / "notes.txt").exists() and check(folder, KEY) is None


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
    with pytest.raises(UserError, match="tokens.values.bin"):
        verify(folder)


def test_no_rows_at_all(tmp_path):
    def nothing(folder):
        RaggedWriter(folder, "tokens").close()
        return {}

    assert len(prepare(tmp_path / "d", "k", [], nothing)["tokens"]) == 0


def test_sources_are_read_again_only_when_they_changed(tmp_path, monkeypatch):
    """By their bytes; a file left alone is known by its size and times, so that a resume does not read the corpus again."""
    folder, reads, builds = tmp_path / "d", [], []
    sha256_file = prepared.sha256_file
    monkeypatch.setattr(prepared, "sha256_file", lambda path: reads.append(path.name) or sha256_file(path))
    monkeypatch.setattr(prepared, "SETTLED", -1.0)  # a test does not wait
    source = tmp_path / "corpus"
    source.mkdir()
    for name in ("a.txt", "b.txt"):
        (source / name).write_text(name)

    def opened() -> tuple[list[str], bool]:
        reads.clear()
        before = len(builds)
        prepare(folder, "k", [str(source)], lambda scratch: builds.append(1) or build(scratch))
        return [name for name in reads if name.endswith(".txt")], len(builds) > before

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


@pytest.mark.parametrize("content", ["[]", "null", "{}", '{"format": 2}', '{"format": 2, "sources": [], "files": {}, "meta": {}}', "\x00\xff"])
def test_a_manifest_that_is_none_is_made_anew(tmp_path, content):
    folder = tmp_path / "d"
    prepare(folder, "k", [], build)
    (folder / "MANIFEST.json").write_bytes(content.encode("latin-1"))
    assert "broken" in check(folder, KEY)
    assert list(prepare(folder, "k", [], build)["tokens"][0]) == [1, 2, 3] and check(folder, KEY) is None


def test_what_is_given_twice_counts_twice(tmp_path):
    a, b = (str(tmp_path / name) for name in ("a", "b"))
    for name in (a, b):
        with open(name, "w") as f:
            f.write(name)
    keys = [prepare(tmp_path / "d", "k", sources, build).key for sources in ([a, b, a], [a, b, b], [a, a, b], [a, b])]
    assert len(set(keys)) == 4


def test_another_file_of_the_same_name_is_seen(tmp_path, monkeypatch):
    """A folder renamed, or a link that leads elsewhere: neither changes a time of the file."""
    monkeypatch.setattr(prepared, "SETTLED", -1.0)
    for version in ("v1", "v2"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "x.txt").write_text(version)
        os.utime(tmp_path / version / "x.txt", ns=(0, 0))
    known = fingerprint([tmp_path / "v1" / "x.txt"], {})
    (tmp_path / "v1").rename(tmp_path / "v0")
    (tmp_path / "v2").rename(tmp_path / "v1")
    found = fingerprint([tmp_path / "v1" / "x.txt"], known)
    assert found != known
