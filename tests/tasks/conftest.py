"""Small encoder-decoder models, and runs of them."""

from pathlib import Path

import pairs
import pytest


@pytest.fixture(scope="session")
def pair_models(tmp_path_factory):
    """Folder of a family's small model; made once."""
    root = tmp_path_factory.mktemp("pairs")

    def folder(kind: str) -> Path:
        if kind == "marian":
            pytest.importorskip("sentencepiece", reason="pip install 'fastft[seq2seq]' brings Marian's tokenizer")
        return root / kind if (root / kind).is_dir() else pairs.model_of(kind, root / kind)

    return folder


@pytest.fixture
def pair_config(tmp_path, pair_models):
    """A run of a family: English to Chinese, on sixteen rows."""

    def make(kind: str, **data) -> dict:
        rows = pairs.write(tmp_path / "rows.jsonl", pairs.rows())
        columns = {"source": "en", "target": "zh", "max_length": 40, **pairs.spoken(kind)}
        return {
            "task": "seq2seq",
            "model": {"path": str(pair_models(kind))},
            "data": {"train": rows, **columns, **data},
            "batch": {"size": 5},
            "optim": {"lr": 1e-3},
            "train": {"steps": 3, "log_every": 1},
            "run": {"dir": str(tmp_path / "run"), "offline": True, "device": "cpu", "threads": 1},
        }

    return make
