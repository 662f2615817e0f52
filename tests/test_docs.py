"""What README, docs and configs say is true: every YAML is a configuration, every shipped config trains, every link
leads somewhere, and the task of CONTRIBUTING.md works.
"""

import importlib
import json
import re
from pathlib import Path

import jsonschema
import pairs
import pytest
import yaml

import fastft.tasks
import launch
from fastft import config as configuration
from fastft import rooms, track
from fastft.config.corpus import corpus_config

ROOT = launch.ROOT
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
CONFIGS = sorted((ROOT / "configs").glob("*/*.yaml"))
SCHEMA = ROOT / "docs" / "config.schema.json"
CORPUS_SCHEMA = ROOT / "docs" / "corpus.schema.json"
WRITTEN = {  # by `fastft config ...`
    SCHEMA: "schema",
    CORPUS_SCHEMA: "schema --corpus",
    ROOT / "docs" / "config_reference.md": "reference",
}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


YAML = [(page, block) for page in PAGES for block in blocks(page, "yaml")]


@pytest.mark.parametrize("page, block", YAML, ids=[f"{p.stem}-{i}" for i, (p, _) in enumerate(YAML)])
def test_yaml_blocks_are_configurations(page, block):
    """For the loader and for the schema; parts of one are completed by what every run needs."""
    raw = yaml.safe_load(block.replace("...", "x"))
    if "sources" in raw:  # of `fastft prepare`
        jsonschema.validate(raw, json.loads(CORPUS_SCHEMA.read_text()))
        corpus_config(raw, str(page))
        return
    whole = {"task": "classification", "model": {"path": "x"}, **raw}
    whole["model"].setdefault("path", "x")
    jsonschema.validate(whole, json.loads(SCHEMA.read_text()))
    configuration.validate(whole, str(page))


@pytest.mark.parametrize("path", WRITTEN, ids=lambda p: p.name)
def test_written_pages_are_current(path):
    _, text = launch.fastft("config", *WRITTEN[path].split())
    same = text.splitlines() == path.read_text().splitlines()
    assert same, f"write it again: make reference, or fastft config {WRITTEN[path]} > {path.relative_to(ROOT)}"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_shipped_configs_fit_the_schema_that_they_name(path):
    named = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", path.read_text().splitlines()[0])
    assert named and (path.parent / named[1]).resolve() == SCHEMA
    jsonschema.validate(yaml.safe_load(path.read_text()), json.loads(SCHEMA.read_text()))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), target


def test_the_readme_is_short_and_its_table_complete():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    for name in rooms.TASKS.names():
        assert f"docs/tasks/{name}.md" in text and (ROOT / "docs" / "tasks" / f"{name}.md").is_file(), name
    for config in CONFIGS:
        if config.parent.name != "quickstart":
            assert str(config.relative_to(ROOT)) in text, config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_shipped_configs_train(path, tiny_bert, tiny_llama, tmp_path, monkeypatch):
    """From the repository's root, on the data that lies there, a few steps of a tiny model in the place of theirs."""
    monkeypatch.chdir(ROOT)
    config = configuration.load(path)
    sources = [s.path for group in (config.data.train, *config.data.eval.values()) for s in group]
    if path.parent.name == "quickstart":  # on what `fastft quickstart` writes
        assert all(s.startswith("runs/quickstart/corpus/") for s in sources)
        return
    assert all(Path(s).is_file() for s in sources)
    model = tiny_llama if config.task in ("causal_lm", "sft") else tiny_bert
    if config.task == "masked_lm":
        model = masked(tiny_bert, tmp_path)
    if config.task == "seq2seq":
        path_says = {"mbart": "mbart50", "opus": "marian"}
        kind = next((kind for part, kind in path_says.items() if part in config.model.path), "t5")
        model = pairs.model_of(kind, tmp_path / "model")
    if config.task == "sft":
        model = chatting(tiny_llama, tmp_path)
    changes = [
        "train.epochs=null",
        "train.steps=2",
        "train.eval_every=null",
        "checkpoint.every=null",
        f"data.max_length={256 if config.task == 'sft' else 32}",  # which a question alone would fill
    ]
    if config.task == "seq2seq":
        changes += ["data.max_target_length=32", "evaluation.generation.max_new_tokens=6"]
    changes += ["data.truncation=truncate", "batch.size=2", "run.device=cpu", "run.threads=1", "run.offline=true"]
    launch.fastft("train", path, f"model.path={model}", f"run.dir={tmp_path / 'run'}", *changes)
    end = track.read(tmp_path / "run")[-1]
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert end["kind"] == "end" and end["step"] == 2 and end["eval"] and config.task in card and "| train |" in card


def masked(bert: Path, folder: Path) -> Path:
    """The tiny encoder with a mask token."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    tokenizer.add_special_tokens({"mask_token": "<pad>"})
    tokenizer.save_pretrained(folder / "model")
    transformers.AutoModel.from_pretrained(bert).save_pretrained(folder / "model")
    return folder / "model"


def chatting(llama: Path, folder: Path) -> Path:
    """The tiny decoder with a chat template."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    tokenizer.save_pretrained(folder / "model")
    transformers.AutoModelForCausalLM.from_pretrained(llama).save_pretrained(folder / "model")
    return folder / "model"


def test_how_to_add_a_task(tiny_bert, tmp_path, monkeypatch):
    """The code of CONTRIBUTING.md, in at most 60 lines of text, is a task that trains."""
    text = (ROOT / "CONTRIBUTING.md").read_text().partition("## How to add a task")[2]
    assert len(text.splitlines()) <= 60
    (code,) = blocks(ROOT / "CONTRIBUTING.md", "python")
    (tmp_path / "minutes.py").write_text(code)
    monkeypatch.setattr(fastft.tasks, "__path__", fastft.tasks.__path__)
    fastft.tasks.__path__.append(str(tmp_path))
    try:
        assert "minutes" in rooms.TASKS.names()
        rows = [{"text": "word " * n, "minutes": n / 4} for n in range(1, 13)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        config = configuration.validate(
            {
                "task": "minutes",
                "model": {"path": str(tiny_bert)},
                "data": {"train": str(tmp_path / "rows.jsonl"), "eval": str(tmp_path / "rows.jsonl"), "max_length": 64},
                "batch": {"size": 4},
                "train": {"steps": 2},
                "run": {"dir": str(tmp_path / "run"), "device": "cpu", "threads": 1},
            }
        )
        script = tmp_path / "train.py"
        script.write_text(
            "import sys, fastft.tasks\n"
            f"fastft.tasks.__path__.append({str(tmp_path)!r})\n"
            "from fastft.cli.main import main\n"
            f"main(['train', {str(tmp_path / 'c.yaml')!r}])\n"
        )
        (tmp_path / "c.yaml").write_text(configuration.dump(config))
        launch.ranks(1, [script])
        assert 0 <= track.read(tmp_path / "run")[-1]["eval"]["eval"]["within_a_minute"] <= 1
    finally:
        fastft.tasks.__path__.remove(str(tmp_path))
        importlib.invalidate_caches()
