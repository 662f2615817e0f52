"""Mixtures in real runs: from files and corpora, recorded, traced, resumed; what a configuration may not say."""

import json
import shutil

import corpora
import jobs
import numpy as np
import pytest
import yaml

import launch
from fastft import config as configuration
from fastft import track
from fastft.errors import UserError
from fastft.evaluate.trace import steps_of, trace
from fastft.train import loop


@pytest.fixture
def two(lm_config, corpus, tmp_path):
    """lm_config with two sources of files: the second is small."""
    texts = [json.loads(line)["text"] for line in (corpus / "train.jsonl").read_text().splitlines()]
    for name, part in (("domain", texts[:-10]), ("general", texts[-10:])):
        corpora.jsonl(tmp_path / f"{name}.jsonl", part)
    sources = [{"path": str(tmp_path / f"{name}.jsonl")} for name in ("domain", "general")]
    lm_config["data"] |= {"train": sources, "eval": {}}
    return lm_config


def weigh(config, *weights, **more):
    for source, weight in zip(config["data"]["train"], weights, strict=True):
        source["weight"] = weight
    config["data"] |= more
    return config


def test_a_run_on_files_is_recorded_traced_and_resumed(two, tmp_path):
    weigh(two, 0.75, 0.25)["checkpoint"] = {"every": 2}
    path = launch.write_config(tmp_path / "c.yaml", two)
    code, output = launch.fastft("train", path)
    assert code == 0 and "mixture: domain: 75.00% of the targets" in output
    assert "mixture: general: 25.00% of the targets" in output
    records = track.read(tmp_path / "run")
    start, end = (next(r for r in records if r["kind"] == kind) for kind in ("run", "end"))
    assert start["mixture"].keys() == {"domain", "general"} and end["mixture"] == start["mixture"]
    one_sample = 63 / (end["mixture"]["domain"]["targets"] + end["mixture"]["general"]["targets"])
    assert abs(end["mixture"]["domain"]["seen"] - 0.75) < one_sample
    steps = [r for r in records if r["kind"] == "mixture"]
    assert [r["step"] for r in steps] == list(range(1, 5)) and steps[-1]["sources"] == end["mixture"]
    samples = [sample for step in range(1, 5) for sample in trace(tmp_path / "run", [], step)]
    for name in ("domain", "general"):
        own = [sample for sample in samples if sample["source"] == name]
        assert len(own) == end["mixture"][name]["rows"]
        assert all(f"{name}.jsonl:" in where for sample in own for where in sample["documents"])
    said = launch.fastft("trace", tmp_path / "run", "--step", 3)[1]
    assert "(general): " in said and "(domain): " in said
    # The second half is lost, and made again.
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-4")
    loop.resumed(configuration.load_run(tmp_path / "run"))
    again = track.read(tmp_path / "run")
    again = again[max(i for i, r in enumerate(again) if r["kind"] == "run") :]
    losses = [[r["loss"] for r in part if r["kind"] == "train"] for part in (records, again)]
    assert len(losses[1]) == 2 and losses[1] == losses[0][2:] and again[-1]["mixture"] == end["mixture"]
    with pytest.raises(UserError, match="written with another mixture"):
        changed = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
        changed["data"]["train"][0]["weight"], changed["train"]["steps"] = 0.5, 6
        loop.resumed(configuration.validate(changed))


def test_two_ranks_take_the_batches_of_one(two, no_dropout, tmp_path):
    """Their losses are of all targets of a step: those of one rank, but for the order of sums."""
    weigh(two, 0.75, 0.25)["train"] |= {"steps": 3}
    found = []
    for world in (1, 2):
        two["run"]["dir"] = str(tmp_path / f"run{world}")
        two["batch"] = {"size": 6, "micro": 3}
        launch.ranks(world, ["-m", "fastft", "train", launch.write_config(tmp_path / f"{world}.yaml", two)])
        records = track.read(tmp_path / f"run{world}")
        assert records[0]["world_size"] == world
        found.append([[r for r in records if r["kind"] == kind] for kind in ("train", "mixture")])
    (losses, mixed), (others, mixed_too) = found
    assert [r["sources"] for r in mixed] == [r["sources"] for r in mixed_too] and len(losses) == 3
    assert [r["loss"] for r in losses] == pytest.approx([r["loss"] for r in others], rel=1e-5)


def test_the_name_of_a_part_is_known_to_trace(two, tmp_path):
    """As --step shows it; a document that is in two parts is told apart by it."""
    two["data"]["train"].append({"path": two["data"]["train"][1]["path"], "name": "again"})
    two["train"]["steps"] = 60
    path = launch.write_config(tmp_path / "c.yaml", weigh(two, 0.5, 0.3, 0.2))
    place = f"{two['data']['train'][1]['path']}:3"
    bare, general, again = (
        steps_of(path, [], said)["steps"] for said in (place, f"general:{place}", f"again: {place}")
    )
    assert general and again and len(bare) == len(general) + len(again)
    assert {e["sample"] for e in bare} == {e["sample"] for e in general} | {e["sample"] for e in again}
    with pytest.raises(UserError, match="has no document 'other:"):
        steps_of(path, [], f"other:{place}")


def test_a_stage_without_a_step_is_told(two):
    job = jobs.job_of(weigh(two, 1, 1, curriculum=[{"until": u, "weights": {"domain": 1}} for u in (0.01, 0.5)]))
    told = [line for line in job.order.describe(24) if "has no step" in line]
    assert len(told) == 1 and "data.curriculum: the stage until 0.01 has no step" in told[0]


def test_a_changed_weight_needs_no_new_preparation_and_no_pack_crosses_a_source(two, tmp_path):
    first = jobs.task_of(weigh(two, 0.75, 0.25)).train_split()
    made = (first.data.folder / "MANIFEST.json").stat()
    second = jobs.task_of(weigh(two, 3, 7, curriculum=[{"until": 2, "weights": {"domain": 1}}])).train_split()
    assert (second.data.folder / "MANIFEST.json").stat() == made
    cut = int(second.sample_starts()[1])
    assert list(second.sample_starts()) == [0, cut, len(second)]
    task = jobs.task_of(two)
    for sample in range(len(second)):
        said = {"domain.jsonl" in where for where in task.documents(second, sample)}
        assert said == {sample < cut}
    del two["data"]["curriculum"]
    plain = jobs.task_of({**two, "data": two["data"] | {"train": [s["path"] for s in two["data"]["train"]]}})
    assert plain.train_split().starts is None and len(plain.train_split()) <= len(second), (
        "read as one: packed together"
    )


def test_prepared_corpora_and_patterns(two, tiny_llama, tmp_path):
    """Two corpora, already packed for a run without weights; then a pattern, whose files are one source."""
    made = []
    for source in two["data"]["train"]:
        (folder := tmp_path / "made" / str(len(made))).mkdir(parents=True)
        made.append(str(corpora.made(folder, tiny_llama, source["path"], duplicates="keep").folder))
    two["data"] |= {"train": made}
    before = (jobs.task_of(two).train_split().data.folder / "MANIFEST.json").stat()
    two["data"]["train"] = [{"path": path, "name": name} for path, name in zip(made, ("a", "b"), strict=True)]
    job = jobs.job_of(weigh(two, 0.5, 0.5))
    assert (job.train.data.folder / "MANIFEST.json").stat() == before
    found = job.order.samples(0, 60)
    share = job.train.targets[found.ids[found.ids < job.train.sample_starts()[1]]].sum()
    assert share / job.train.targets[found.ids].sum() == pytest.approx(0.5, abs=63 / (30 * 60))
    assert {job.order.source_of(int(i)) for i in found.ids} == {"a", "b"}
    two["data"]["train"] = [{"path": f"{tmp_path}/*.jsonl", "weight": 2, "name": "all"}, {"path": made[0], "weight": 1}]
    config = configuration.validate(two)
    assert [(s.name, s.weight) for s in config.data.train] == [("all", 2), ("all", 2), (None, 1)]
    assert [(p.name, p.first, p.last) for p in config.data.shares.parts] == [("all", 0, 2), ("out", 2, 3)]
    again = configuration.validate(config.model_dump(mode="json"))
    assert again.data.shares == config.data.shares


def test_sources_of_one_corpus(two, tiny_llama, tmp_path):
    """Each by its name there; without weights, one of them alone."""
    sources = [{"path": source["path"], "name": name} for source, name in zip(two["data"]["train"], "ab", strict=True)]
    made = corpora.made(tmp_path, tiny_llama, sources, duplicates="keep")
    two["data"]["train"] = [{"path": str(made.folder), "source": name, "weight": w} for name, w in (("b", 3), ("a", 1))]
    job = jobs.job_of(two)
    found = job.order.samples(0, 80).ids.tolist()
    share = (
        job.train.targets[[i for i in found if job.order.source_of(i) == "b"]].sum() / job.train.targets[found].sum()
    )
    assert share == pytest.approx(0.75, abs=63 / (40 * 60))
    assert all(job.task.documents(job.train, i)[0].startswith(f"{job.order.source_of(i)}: ") for i in found)
    two["data"]["train"] = {"path": str(made.folder), "source": "b"}
    split = jobs.task_of(two).train_split()
    shard = next(shard for shard in made.shards if shard.source == 1)
    assert split.data.meta["documents"] == shard.documents and split.data.meta["characters"] == shard.characters
    two["data"]["train"]["source"] = "c"
    with pytest.raises(UserError, match="has no source 'c', but a, b"):
        jobs.task_of(two).train_split()
    two["data"]["train"] = {"path": sources[0]["path"], "source": "a"}
    with pytest.raises(UserError, match="source: a is a source in a prepared corpus, and these are files"):
        jobs.task_of(two).train_split()


def test_rows_of_other_tasks_are_mixed_too(classification_config, tmp_path):
    train = classification_config["data"]["train"]
    classification_config["data"]["train"] = [
        {"path": train, "weight": 0.9, "name": "a"},
        {"path": train, "weight": 0.1, "name": "b"},
    ]
    job = jobs.job_of(classification_config)
    found = job.order.samples(0, 100).ids
    assert (found >= job.train.sample_starts()[1]).sum() == 10 and len(np.unique(found)) > 20


@pytest.mark.parametrize(
    "change, said",
    [
        ({"train": [{"path": "a", "weight": 1}, "b"]}, "some sources have a weight, these have none: b"),
        ({"train": [{"path": "a", "weight": 0}, {"path": "b", "weight": 0}]}, "all weights are 0"),
        ({"train": [{"path": n, "weight": 1e308} for n in "ab"]}, "data.train: the weights are too large to be added"),
        ({"curriculum": [{"until": 5, "weights": {"a": 1e308, "b": 1e308}}]}, "until 5: the weights are too large"),
        ({"train": [{"path": "x/a.txt", "weight": 1}, {"path": "y/a.txt", "weight": 2}]}, "two sources are called 'a'"),
        ({"train": [{"path": "a", "weight": -1}]}, "weight: Input should be greater than or equal to 0"),
        ({"train": ["a"], "curriculum": [{"until": 5, "weights": {"a": 1}}]}, "no source of data.train has a weight"),
        ({"curriculum": [{"until": 5, "weights": {"c": 1}}]}, "no source is called 'c'; data.train has a, b"),
        ({"curriculum": [{"until": 0.5, "weights": {"a": 0}}]}, "until 0.5: all weights are 0"),
        ({"curriculum": [{"until": 1.5, "weights": {"a": 1}}]}, "neither a fraction of all steps"),
        ({"curriculum": [{"until": 5, "weights": {"a": 1}}, {"until": 0.5, "weights": {"b": 1}}]}, "give all in steps"),
        ({"curriculum": [{"until": 5, "weights": {"a": 1}}, {"until": 5, "weights": {"b": 1}}]}, "5, 5 do not rise"),
        ({"order": "length_groups"}, "a mixture .* has an order of its own"),
        ({"eval": {"dev": {"path": "a", "weight": 1}}}, "weight: unknown key"),
    ],
)
def test_what_contradicts_is_refused_before_anything_is_read(two, change, said):
    two["data"]["train"] = [{"path": "a", "weight": 1}, {"path": "b", "weight": 2}]
    two["data"] |= change
    with pytest.raises(UserError, match=said):
        configuration.validate(two)


def test_sources_that_do_not_last_are_refused(two):
    for source in weigh(two, 1, 1)["data"]["train"]:
        source["epochs"] = 1
    two["train"]["steps"] = 1000
    with pytest.raises(UserError, match=r"read as often as its epochs say after [0-9,]+ samples"):
        loop.train(configuration.validate(two))
