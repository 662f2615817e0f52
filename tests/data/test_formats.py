import gzip
import json
from pathlib import Path

import pytest

from fastft.config import Source
from fastft.data import formats
from fastft.errors import UserError

ROWS = [
    {"text": "one", "label": "a"},
    {"text": 'two, "quoted"\nlines', "label": "b"},
    {"text": "drei é 漢", "label": "a"},
]


def read(path, **source):
    return list(formats.read(Source(path=str(path), **source)))


def write_all(folder):
    import csv

    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "x.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    for name, delimiter in (("x.csv", ","), ("x.tsv", "\t")):
        with open(folder / name, "w", newline="") as f:
            writer = csv.DictWriter(f, ["text", "label"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(ROWS)
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "x.parquet")
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    parts = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
    datasets.DatasetDict(parts).save_to_disk(folder / "splits")
    for name in ("x.jsonl", "x.csv", "x.tsv", "x.parquet"):
        (folder / f"{name}.gz").write_bytes(gzip.compress((folder / name).read_bytes()))


@pytest.mark.parametrize(
    "name", ["x.jsonl", "x.csv", "x.tsv", "x.parquet", "x.jsonl.gz", "x.csv.gz", "x.tsv.gz", "x.parquet.gz", "saved"]
)
def test_every_format_gives_the_same_rows(tmp_path, name):
    write_all(tmp_path)
    assert [r for _, r in read(tmp_path / name)] == ROWS


def test_saved_dataset_dict(tmp_path):
    write_all(tmp_path)
    assert [r for _, r in read(tmp_path / "splits", split="train")] == ROWS
    with pytest.raises(UserError, match="several splits"):
        read(tmp_path / "splits")
    with pytest.raises(UserError, match="Did you mean 'train'"):
        read(tmp_path / "splits", split="trian")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache of the hub's data sets that holds acme/notes, as ``datasets`` writes it; no network."""
    import datasets

    cache = tmp_path / "cache"
    for name, rows in (("train", ROWS), ("test", ROWS[:1])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "test")}
    made = datasets.load_dataset("json", data_files=files, cache_dir=str(cache))
    folder = Path(made["train"].cache_files[0]["filename"]).parent
    there = cache / "acme___notes" / "default" / "0.0.0" / ("a" * 40)
    there.parent.mkdir(parents=True)
    folder.rename(there)
    for file in there.glob("json-*.arrow"):
        file.rename(there / file.name.replace("json-", "notes-"))
    info = json.loads((there / "dataset_info.json").read_text())
    info |= {"builder_name": "notes", "dataset_name": "notes"}
    (there / "dataset_info.json").write_text(json.dumps(info))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    formats.hf._of_hub.cache_clear()
    yield there
    formats.hf._of_hub.cache_clear()


def of_hub(**source):
    return list(formats.read(Source(**source)))


def test_data_sets_of_the_hub_by_name(hub):
    found = of_hub(dataset="acme/notes", split="train")
    assert [dict(r) for _, r in found] == ROWS and found[1][0] == "acme/notes:row 2"
    assert [r["text"] for _, r in of_hub(dataset="acme/notes", name="default", split="test")] == ["one"]
    assert formats.files_of(Source(dataset="acme/notes", split="train")) == [hub / "notes-train.arrow"]
    with pytest.raises(UserError, match="several splits"):
        of_hub(dataset="acme/notes")
    with pytest.raises(UserError, match="Did you mean 'train'"):
        of_hub(dataset="acme/notes", split="trian")
    with pytest.raises(UserError, match=r"acme/notes \(large\): cannot be had.*'large'"):
        of_hub(dataset="acme/notes", name="large", split="train")
    with pytest.raises(UserError, match="acme/other: cannot be had"):
        of_hub(dataset="acme/other", split="train")


def test_trap_names_that_datasets_takes_for_files(hub, tmp_path, monkeypatch):
    """`csv` would read every file below the current folder, a folder's name its files instead of the hub's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "acme" / "notes").mkdir(parents=True)
    (tmp_path / "acme" / "notes" / "train.csv").write_text("text\nhere\n")
    for name in ("csv", "json", "text", "acme/notes"):
        with pytest.raises(UserError, match=f"dataset {name}: is no name on the hub: owner/name"):
            of_hub(dataset=name, split="train")


def test_columns_are_renamed(hub, tmp_path):
    for found in (
        of_hub(dataset="acme/notes", split="train", columns={"content": "text"}),
        read(tmp_path / "train.jsonl", columns={"content": "text"}),
    ):
        assert [dict(r) for _, r in found] == [{"content": r["text"], "label": r["label"]} for r in ROWS]
    swapped = dict(of_hub(dataset="acme/notes", split="test", columns={"text": "label", "label": "text"})[0][1])
    assert swapped == {"text": "a", "label": "one"}
    with pytest.raises(UserError, match=r"row 1: no column 'txet', which columns.content names.*\n.*'text'"):
        of_hub(dataset="acme/notes", split="test", columns={"content": "txet"})


@pytest.mark.parametrize(
    "source, message",
    [
        ({}, "give one"),
        ({"path": "x", "dataset": "acme/notes"}, "give one"),
        ({"path": "x", "revision": "main"}, "files have a path alone"),
    ],
)
def test_a_source_is_in_one_place(source, message):
    with pytest.raises(ValueError, match=message):
        Source(**source)


@pytest.mark.parametrize("zipped", [False, True])
def test_txt(tmp_path, zipped):
    content = b"\n\nfirst\nsecond line\n\n\nother\n"
    path = tmp_path / ("a.txt.gz" if zipped else "a.txt")
    path.write_bytes(gzip.compress(content) if zipped else content)
    assert read(path) == [(f"{path}:3", {"text": "first\nsecond line"}), (f"{path}:7", {"text": "other"})]
    assert [r["text"] for _, r in read(path, documents="line")] == ["first", "second line", "other"]
    assert len(read(path, documents="file")) == 1


def test_folder_reads_all_files_in_order(tmp_path):
    for name in ("b.txt", "a.txt", "notes.bin"):
        (tmp_path / name).write_text(name)
    assert [r["text"] for _, r in read(tmp_path)] == ["a.txt", "b.txt"]


def test_folder_is_read_through_links(tmp_path):
    """To files and folders, each folder once however many links lead to it;
    a link to nothing is an error, not a file less.
    """
    (tmp_path / "corpus").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("a")
    (tmp_path / "elsewhere" / "b.txt").write_text("b")
    (tmp_path / "corpus" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "corpus")
    (tmp_path / "corpus" / "c.txt").symlink_to(tmp_path / "elsewhere" / "b.txt")
    assert [r["text"] for _, r in read(tmp_path / "corpus")] == ["a", "b", "b"]
    (tmp_path / "corpus" / ".#a.txt").symlink_to("me@host.1234:5")  # an editor's lock
    (tmp_path / "corpus" / "v2").mkdir()
    (tmp_path / "corpus" / "v2" / "e.txt").write_text("e")
    (tmp_path / "corpus" / "latest").symlink_to("v2")
    for i in range(9):
        (tmp_path / "elsewhere" / f"s{i}").mkdir()
        for j in range(9):
            (tmp_path / "elsewhere" / f"s{i}" / f"to{j}").symlink_to(tmp_path / "elsewhere" / f"s{j}")
    assert [(w.rpartition("/")[2], r["text"]) for w, r in read(tmp_path / "corpus")] == [
        ("a.txt:1", "a"),
        ("c.txt:1", "b"),
        ("b.txt:1", "b"),
        ("e.txt:1", "e"),
    ]
    assert any("/v2/e.txt" in w for w, _ in read(tmp_path / "corpus"))
    (tmp_path / "corpus" / "d.txt").symlink_to(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"d.txt: is a link to nothing"):
        read(tmp_path / "corpus")


def test_another_delimiter(tmp_path):
    (tmp_path / "a.csv").write_text('text;label\n"x; y, z";a\n')
    source = Source(path=str(tmp_path / "a.csv"), delimiter=";")
    assert [dict(record) for _, record in formats.read(source)] == [{"text": "x; y, z", "label": "a"}]


def test_rows_of_csv_are_known_by_their_first_line(tmp_path):
    """Blank lines, also before the header, are no rows, but are counted."""
    path = tmp_path / "a.csv"
    path.write_text('\n\ntext,label\n\n"two\nlines",a\nx,b\n')
    assert read(path) == [
        (f"{path}:5", {"text": "two\nlines", "label": "a"}),
        (f"{path}:7", {"text": "x", "label": "b"}),
    ]


def test_a_parquet_column_that_stands_twice(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x.parquet: a column name appears twice: text"):
        read(tmp_path / "x.parquet")


@pytest.mark.parametrize(
    "name, content, parts",
    [
        ("a.jsonl", '{"text": "x"}\n{"text": \n', ["a.jsonl:2", "broken JSON"]),
        ("a.jsonl", "[1]\n", ["a.jsonl:1", "object"]),
        ("a.jsonl", '{"text": "x"}\n{"text": "y", "a": 1, "a": 2}\n', ["a.jsonl:2", "'a' appears twice"]),
        ("a.csv", "\n\n", ["is empty"]),
        ("a.csv", 'text,label\n"x\ny",1\n"z\n\n', ["a.csv:4", "quoting: none"]),
        ("a.csv", "text,label\nx,y\nz\n", ["a.csv:3", "1 cells", "2 columns"]),
        ("a.csv", "text,text\n", ["appears twice"]),
        ("a.csv", "", ["is empty"]),
        ("a.csv", 'text,label\n"x,y\n', ["a.csv", "quoting: none"]),
        ("a.weird", "x", ["cannot tell the format"]),
        ("a.parquet", "not parquet", ["not a valid Parquet"]),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, parts):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as e:
        read(tmp_path / name)
    for part in parts:
        assert part in str(e.value)


def test_missing_empty_folder_and_unreadable(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read(tmp_path / "nothing.jsonl")
    with pytest.raises(UserError, match="no file of a known format"):
        read(tmp_path)
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(UserError, match="UTF-8"):
        read(tmp_path / "latin.txt")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"x" * 10_000)[:-9])
    with pytest.raises(UserError, match=r"cut.txt.gz"):
        read(tmp_path / "cut.txt.gz")
    with pytest.raises(UserError, match="Unknown data format"):
        read(tmp_path / "latin.txt", format="docx")


def test_registering_a_name_twice_is_an_error():
    with pytest.raises(RuntimeError, match="registered twice"):
        formats.FORMATS.register("txt")(lambda path, source: iter(()))


def test_quoting_none_takes_quotes_as_text(tmp_path):
    (tmp_path / "a.tsv").write_text('text\tlabel\nsay "hi\t1\n')
    assert [r for _, r in read(tmp_path / "a.tsv", quoting="none")] == [{"text": 'say "hi', "label": "1"}]


def test_real_files_of_every_kind(shared_data):
    assert sum(1 for _ in formats.read(Source(path=str(shared_data / "classification/banking77/train.csv")))) == 10_003
    assert (
        sum(
            1
            for _ in formats.read(
                Source(path=str(shared_data / "classification/goemotions/train.tsv.gz"), quoting="none")
            )
        )
        == 20_000
    )
    assert sum(1 for _ in formats.read(Source(path=str(shared_data / "instruct/gsm8k/train.jsonl.gz")))) == 5_000
    assert sum(1 for _ in formats.read(Source(path=str(next((shared_data / "corpus/medical").glob("*.txt*")))))) > 100


def test_an_array_of_objects(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(ROWS, indent=2))
    found = read(tmp_path / "x.json")
    assert [r for _, r in found] == ROWS and found[1][0] == f"{tmp_path / 'x.json'}:row 2"
    (tmp_path / "lines.json").write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    assert [r for _, r in read(tmp_path / "lines.json")] == ROWS


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ('{\n "text": "x"\n}', "one JSON object"),
        ('[{"text": "x"}, 3]', "row 2: expected a JSON object"),
        ('[{"text": "x", "text": "y"}]', "row 1: the key 'text' appears twice"),
        ('[{"text": "x"},\n{"text": ]', ":2: broken JSON"),
    ],
)
def test_bad_json_names_the_place(tmp_path, content, part):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UserError, match=r"x.json") as e:
        read(tmp_path / "x.json")
    assert part in str(e.value)


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_a_column_that_python_cannot_show_is_read_by_nobody(tmp_path, kind):
    """A date beyond Python's, in a column that nobody asks for; the row is named where somebody does."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    from fastft.data.encoder import check_text

    stamp = pa.array([2**62, 0], pa.int64()).cast(pa.timestamp("us"))
    table, path = pa.table({"text": ["one", "two"], "when": stamp}), tmp_path / kind
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        datasets.Dataset(datasets.table.InMemoryTable(table)).save_to_disk(path)
    rows = read(path, format="parquet" if kind == "parquet" else "auto")
    assert [(r["text"], set(r)) for _, r in rows] == [("one", {"text", "when"}), ("two", {"text", "when"})]
    with pytest.raises(UserError, match="row 1: column 'when' cannot be read"):
        check_text(rows[0][0], "when", rows[0][1]["when"])


def test_a_folder_that_is_a_clone(tmp_path):
    """Hidden folders, copies of notebooks and texts about the data are no data; what looks like data is said."""
    for name in ("data.jsonl", ".ipynb_checkpoints/data-checkpoint.jsonl", ".hidden.jsonl", "__MACOSX/data.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "x"}\n')
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "description.txt").write_text("Unnamed repository\n")
    for name in ("README.txt", "LICENSE.txt", "dataset_info_old.json"):
        (tmp_path / name).write_text('{"a": 1}\n')
    assert {where.rpartition("/")[2] for where, _ in read(tmp_path)} == {"data.jsonl:1", "dataset_info_old.json:1"}
    source = Source(path=str(tmp_path))
    assert {path.name for path in formats.not_read(source)} == {"README.txt", "LICENSE.txt"}
    assert len(read(tmp_path / "README.txt")) == 1, "a file is read when it is named"


def test_split_of_a_folder_as_hubs_lay_it_out(tmp_path):
    for name in ("train-00000-of-00001.jsonl", "test-00000-of-00001.jsonl", "dev/part.jsonl", "latest.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
    for split, name in (("test", "test-00000-of-00001.jsonl"), ("validation", "dev/part.jsonl")):
        assert [r["text"] for _, r in read(tmp_path, split=split)] == [name]
    with pytest.raises(UserError, match=r"no file of a split 'unseen' among 4(.|\n)*train"):
        read(tmp_path, split="unseen")
    with pytest.raises(UserError, match="names a part of a folder, and this is one file"):
        read(tmp_path / "latest.jsonl", split="train")


def test_a_pipe_is_said_to_be_one(tmp_path):
    import os

    os.mkfifo(tmp_path / "x.jsonl")
    with pytest.raises(UserError, match="pipe"):
        read(tmp_path / "x.jsonl")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_utf_16_is_told_from_a_broken_file(tmp_path, encoding):
    start = b"" if encoding == "utf-16" else b"\xfe\xff"
    (tmp_path / "x.jsonl").write_bytes(start + '{"text": "x"}\n'.encode(encoding))
    with pytest.raises(UserError, match=r"x.jsonl: is UTF-16(.|\n)*iconv"):
        read(tmp_path / "x.jsonl")


def test_short_floats_are_read_as_they_were_written(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"x": pa.array([0.1, None, 2.0], pa.float32())}), tmp_path / "x.parquet")
    assert [r["x"] for _, r in read(tmp_path / "x.parquet")] == [0.1, None, 2.0]
