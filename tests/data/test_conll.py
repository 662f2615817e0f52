import gzip

import pytest

from fastft.config import Source
from fastft.data import formats
from fastft.errors import UserError

TEXT = "-DOCSTART- -X- -X- O\n\nEU NNP I-NP B-ORG\nrejects VBZ I-VP O\n\n\nPeter NNP I-NP B-PER\n"


def read(path, **source):
    return list(formats.read(Source(path=str(path), **source)))


@pytest.mark.parametrize("name", ["x.conll", "x.bio", "x.iob", "x.conll.gz"])
def test_first_and_last_column(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(TEXT.encode()) if name.endswith("gz") else TEXT.encode())
    first = {"tokens": ["EU", "rejects"], "tags": ["B-ORG", "O"]}
    assert read(path) == [(f"{path}:3", first), (f"{path}:7", {"tokens": ["Peter"], "tags": ["B-PER"]})]


def test_header_names_all_columns(tmp_path):
    (tmp_path / "x.conll").write_text(TEXT)
    (_, record), _ = read(tmp_path / "x.conll", header=["word", "pos", "chunk", "ner"])
    assert record["pos"] == ["NNP", "VBZ"] and record["ner"] == ["B-ORG", "O"]
    with pytest.raises(UserError, match=r"x\.conll:3: 4 columns, but header names 2 \(word, ner\)"):
        read(tmp_path / "x.conll", header=["word", "ner"])


def test_only_tabs_or_spaces_separate(tmp_path):
    """A no-break space, an empty token and a token with a space in it are tokens, and stay in their places."""
    (tmp_path / "x.conll").write_text("\u00a0\tO\n\tO\nNew York\tB-LOC\r\n\u3000\tO\n \t \nb  O\n")
    (_, first), (_, second) = read(tmp_path / "x.conll")
    assert first == {"tokens": ["\u00a0", "", "New York", "\u3000"], "tags": ["O", "O", "B-LOC", "O"]}
    assert second == {"tokens": ["b"], "tags": ["O"]}


@pytest.mark.parametrize(
    "text, message",
    [
        ("a\tO\nb\n", r"x\.conll:2: no tag column: 'b' stands alone"),
        ("a\tO\nb\t\n", r"x\.conll:2: no tag column"),
        ("a X O\nb O\n", r"x\.conll:2: 2 columns, but the lines before have 3"),
        ("a\nb\n", r"x\.conll:1: no tag column"),
    ],
)
def test_errors_name_file_and_line(tmp_path, text, message):
    (tmp_path / "x.conll").write_text(text)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "x.conll")


def test_words_alone_to_predict_on(tmp_path):
    (tmp_path / "x.conll").write_text("a\nb\n\nc\n")
    assert [r for _, r in read(tmp_path / "x.conll", header=["tokens"])] == [{"tokens": ["a", "b"]}, {"tokens": ["c"]}]


def test_real_files(shared_data):
    assert len(read(shared_data / "ner" / "wnut17" / "train.conll")) == 3394
    assert len(read(shared_data / "ner" / "bc5cdr" / "train.conll.gz")) == 4560
