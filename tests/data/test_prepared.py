import numpy as np
import pytest

from fastft.data.prepared import RaggedWriter, check, prepare, verify
from fastft.errors import UserError

ROWS = [[1, 2, 3], [], [70_000]]


def build(folder):
    writer = RaggedWriter(folder, "tokens")
    for row in ROWS:
        writer.append(row)
    writer.close()
    np.save(folder / "labels.npy", np.arange(3))
    return {"note": "x"}


def test_round_trip(tmp_path):
    data = prepare(tmp_path / "d", "k", ["in.txt"], build)
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
    assert "cut short" in check(folder, "k")
    assert list(prepare(folder, "k", [], build)["tokens"][0]) == [1, 2, 3]
    (folder / "MANIFEST.json").unlink()
    assert check(folder, "k") == "not there"
    with pytest.raises(UserError, match="holds other files"):
        prepare(folder, "k", [], build)
    (folder / "MANIFEST.json").write_text("{")
    assert check(folder, "k") == "manifest is broken"
    prepare(folder, "k", [], build)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        prepare(folder, "another", [], build)
    assert (folder / "notes.txt").exists() and check(folder, "k") is None


def test_a_failed_build_leaves_nothing_that_looks_done(tmp_path):
    def fail(folder):
        (folder / "half.npy").touch()
        raise UserError("bad row")

    with pytest.raises(UserError):
        prepare(tmp_path / "d", "k", [], fail)
    assert check(tmp_path / "d", "k") == "not there"


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
