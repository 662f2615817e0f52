import json

import jobs
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastft.errors import UserError
from fastft.tasks._documents import pack


@pytest.fixture
def task_of(lm_config):
    def make(**data):
        lm_config["data"].update(data)
        return jobs.task_of(lm_config)

    return make


def write(path, *texts):
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return str(path)


def test_every_token_is_learnt_once(task_of):
    """split: targets over all packs are all tokens but each document's first."""
    split = task_of().train_split()
    meta = split.data.meta
    assert split.targets.sum() == meta["tokens"] - meta["documents"]
    assert split.lengths.max() <= 64 and split.lengths.sum() / (64 * len(split)) > 0.95
    assert meta["counts"]["split"] > 0


def test_labels_are_the_next_token_within_a_document(task_of):
    task = task_of()
    split = task.train_split()
    batch = jobs.collate(task, split, np.arange(5))
    ids, labels, positions = batch.inputs["input_ids"], batch.labels, batch.inputs["position_ids"]
    used = labels != -100
    assert int(used.sum()) == int(split.targets[:5].sum())
    assert torch.equal(labels[:, :-1][used[:, :-1]], ids[:, 1:][used[:, :-1]])
    assert not used[:, -1].any()
    starts = positions[:, 1:] == 0  # the token before a start has nothing to predict
    assert not used[:, :-1][starts].any()


@pytest.mark.parametrize("packing, implementation", [("isolated", "linear_cross_entropy"), ("none", "cross_entropy")])
def test_loss_equals_documents_one_by_one(lm_config, packing, implementation):
    """Against F.cross_entropy over every piece alone."""
    lm_config["data"]["packing"] = packing
    lm_config["loss"] = {"implementation": implementation}
    job = jobs.job_of(lm_config)
    split, model = job.train, job.model
    ids = np.arange(len(split) - 6, len(split))  # the last packs hold the most pieces
    batch = jobs.batch_of(job, ids)
    with torch.no_grad():
        total = jobs.loss_of(job, batch)
        pieces = [torch.from_numpy(p.astype(np.int64)) for i in ids for p in pack(split.data, int(i))]
        alone = sum(
            F.cross_entropy(model(p[None]).logits[0, :-1], p[1:], reduction="sum") for p in pieces if len(p) > 1
        )
    assert len(pieces) > 6 or packing == "none"
    assert abs(total - alone) / alone < 1e-6


def test_truncation_policies(task_of, tmp_path):
    data = write(tmp_path / "long.jsonl", "short", "long " * 400)
    for policy, sequences, count in (("truncate", 2, "truncated"), ("drop", 1, "dropped"), ("split", None, "split")):
        split = task_of(train=data, truncation=policy, packing="none").train_split()
        assert split.data.meta["counts"][count] == 1
        assert sequences is None or len(split) == sequences
    with pytest.raises(UserError) as e:
        task_of(train=data, truncation="error").train_split()
    assert (
        "1 of 2 texts are longer than max_length = 64" in str(e.value)
        and "long.jsonl:2" in str(e.value)
        and "split" in str(e.value)
    )


def test_empty_rows_are_counted(task_of, tmp_path):
    split = task_of(train=write(tmp_path / "e.jsonl", "one two three", "", "  ")).train_split()
    assert split.data.meta["counts"] | {"rows": 3, "empty": 2} == split.data.meta["counts"]


@pytest.mark.parametrize(
    "content, parts",
    [
        ("", ["is empty", "0 rows"]),
        ('{"txt": "x"}\n', [":1", "no column 'text'", "Did you mean 'txt'"]),
        ('{"text": 5}\n', [":1", "not text"]),
    ],
)
def test_bad_data(task_of, tmp_path, content, parts):
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(UserError) as e:
        task_of(train=str(tmp_path / "bad.jsonl")).train_split()
    for part in parts:
        assert part in str(e.value)


def test_max_length_beyond_the_model(task_of):
    with pytest.raises(UserError, match="model's limit of 256"):
        _ = task_of(max_length=1000).max_length


def test_preparation_is_reused_and_noticed_when_settings_change(task_of):
    first = task_of().train_split().data
    made = (first.folder / "MANIFEST.json").stat().st_mtime_ns
    assert (task_of().train_split().data.folder / "MANIFEST.json").stat().st_mtime_ns == made
    assert task_of(max_length=32).train_split().data.key != first.key


def test_dummy_batch_has_no_loss(lm_config):
    job = jobs.job_of(lm_config)
    batch = jobs.batch_of(job, [])
    loss = jobs.loss_of(job, batch, 0.5)
    loss.backward()
    assert loss == 0 and all(p.grad.abs().max() == 0 for p in job.model.parameters()) and batch.tokens == 0
