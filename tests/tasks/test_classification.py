import json

import jobs
import numpy as np
import pytest
import torch

from fastft.errors import UserError


@pytest.fixture
def task_of(classification_config):
    def make(**data):
        classification_config["data"].update(data)
        return jobs.task_of(classification_config)

    return make


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def test_labels_and_batches(task_of):
    task = task_of()
    split = task.train_split()
    learned = task.learned(split)
    assert learned == {"labels": ["a", "b", "c"]} and len(split) == 48 and split.targets.sum() == 48
    batch = jobs.collate(task, split, [0, 1, 2])
    assert (
        batch.labels.tolist() == [0, 1, 2]
        and batch.inputs["attention_mask"].sum() == batch.tokens == split.lengths[:3].sum()
    )
    assert task.model(learned).overrides["id2label"] == {0: "a", 1: "b", 2: "c"}


def test_whole_number_labels_keep_their_order(task_of, tmp_path):
    rows = [{"text": "x y", "label": n} for n in (10, 2, 1)]
    task = task_of(train=write(tmp_path / "n.jsonl", rows))
    assert task.learned(task.train_split())["labels"] == ["1", "2", "10"]


def test_label_not_seen_in_training(task_of, tmp_path):
    task = task_of(
        eval={"test": write(tmp_path / "t.jsonl", [{"text": "x", "label": "a"}, {"text": "x", "label": "bb"}])}
    )
    learned = task.learned(task.train_split())
    with pytest.raises(UserError) as e:
        task.eval_splits(learned)
    assert (
        "t.jsonl:2" in str(e.value)
        and "'bb' does not occur in the training data" in str(e.value)
        and "Did you mean" in str(e.value)
    )


@pytest.mark.parametrize(
    "rows, part",
    [
        ([{"text": "x", "label": None}, {"text": "y", "label": "b"}], "the label is empty"),
        ([{"text": "x", "label": " "}, {"text": "y", "label": "b"}], "the label is empty"),
        ([{"text": "x", "label": ["a", "b"]}], "multi_label: true"),
        ([{"text": "x", "label": "a"}, {"text": "y", "label": "a"}], "same label"),
        ([{"text": "x", "lable": "a"}], "Did you mean 'lable'"),
    ],
)
def test_bad_labels(task_of, tmp_path, rows, part):
    with pytest.raises(UserError, match=part):
        task = task_of(train=write(tmp_path / "b.jsonl", rows))
        task.learned(task.train_split())


def test_multi_label_by_names_indices_and_lists(classification_config, tmp_path):
    (tmp_path / "names.txt").write_text("joy\nanger\nlove\n")
    rows = [
        {"text": "x", "label": "joy,love"},
        {"text": "y", "label": "1"},
        {"text": "z", "label": ""},
        {"text": "w", "label": ["anger", 2]},
    ]
    train, labels = write(tmp_path / "m.jsonl", rows), str(tmp_path / "names.txt")
    classification_config["data"] |= {"train": train, "multi_label": True, "labels": labels}
    job = jobs.job_of(classification_config)
    assert np.asarray(job.train.data["labels"]).tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 0], [0, 1, 1]]
    batch = jobs.batch_of(job, np.arange(4))
    outputs = job.model(**batch.inputs)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(outputs.logits, batch.labels)
    assert torch.allclose(jobs.loss_of(job, batch, 0.25), expected)
    assert jobs.loss_of(job, jobs.batch_of(job, [])) == 0


def test_pairs(task_of, tmp_path):
    rows = [{"text": "one two", "b": "three four five", "label": k} for k in "xy"]
    split = task_of(train=write(tmp_path / "p.jsonl", rows), text_pair="b").train_split()
    assert len(split.data["segments"]) == 2 and split.lengths[0] == len(split.data["segments"][0])


def test_truncation_keeps_what_the_tokenizer_keeps(classification_config, minilm, tmp_path):
    """A real BERT tokenizer: [SEP] stays the last token."""
    classification_config["model"]["path"] = minilm
    classification_config["data"] |= {
        "train": write(tmp_path / "l.jsonl", [{"text": "word " * 99, "label": k} for k in "ab"]),
        "truncation": "truncate",
    }
    task = jobs.task_of(classification_config)
    split = task.train_split()
    row = split.data["tokens"][0]
    assert len(row) == 32 and row[0] == task.tokenizer.cls_token_id and row[-1] == task.tokenizer.sep_token_id
    assert split.data.meta["counts"]["truncated"] == 2


def test_truncation_error_counts_and_split_is_refused(task_of, tmp_path):
    data = write(tmp_path / "l.jsonl", [{"text": "word " * 99, "label": "a"}, {"text": "x", "label": "b"}])
    with pytest.raises(UserError, match="1 of 2 texts are longer"):
        task_of(train=data).train_split()
    with pytest.raises(UserError, match="makes no sense"):
        task_of(truncation="split")


def test_decoder_pools_the_last_real_token(classification_config, tiny_llama):
    """Padded and unpadded rows give the same logits."""
    classification_config["model"]["path"] = str(tiny_llama)
    job = jobs.job_of(classification_config)
    model, split = job.model, job.train
    assert job.initialized == ["score.weight"]
    shortest, longest = int(split.lengths.argmin()), int(split.lengths.argmax())
    assert split.lengths[shortest] < split.lengths[longest]
    with torch.no_grad():
        alone = model(**jobs.batch_of(job, [shortest]).inputs).logits[0]
        padded = model(**jobs.batch_of(job, [shortest, longest]).inputs).logits[0]
    assert torch.allclose(alone, padded, atol=1e-5)


def test_labels_without_their_blanks(task_of, tmp_path):
    rows = [{"text": "x", "label": label} for label in ("pos", "pos ", " neg", "neg\n")]
    task = task_of(train=write(tmp_path / "n.jsonl", rows))
    assert task.learned(task.train_split())["labels"] == ["neg", "pos"]


def test_doubtful_labels_are_named(task_of, tmp_path, caplog):
    """A typo that became a class, and one name in two cases; the number of classes is said."""
    rows = [{"text": "x", "label": label} for label in ["card_arrival"] * 9 + ["lost_card"] * 5 + ["card_arival"]]
    rows += [{"text": "x", "label": "Lost_card"}] * 3
    task = task_of(train=write(tmp_path / "n.jsonl", rows))
    split = task.train_split()
    task.learned(split)
    assert "label 'card_arival' (1 of 18 rows) is nearly 'card_arrival' (9)" in caplog.text
    assert "labels 'Lost_card' and 'lost_card' are the same but for case or signs that are not seen" in caplog.text
    (said,) = task.describe(split)
    assert said.startswith("4 classes, rarest: card_arival (1 row)") and said.endswith("most common: card_arrival (9)")


def test_measurements_are_no_labels(task_of, tmp_path, caplog):
    task = task_of(train=write(tmp_path / "n.jsonl", [{"text": "x", "label": n / 10} for n in range(1, 40)]))
    task.learned(task.train_split())
    assert "task: regression" in caplog.text


@pytest.mark.parametrize("loss", [{"label_smoothing": 0.3}, {"z_loss": 0.1}])
def test_an_evaluation_measures_the_plain_loss(classification_config, loss):
    found = []
    for settings in ({}, loss):
        job = jobs.job_of({**classification_config, "loss": settings}, evals=True)
        metrics = job.task.new_metrics(job.measured, job.learned)
        with torch.no_grad():
            metrics.update(job.model, jobs.collate(job.task, job.evals["test"], range(12)))
        found.append(metrics.finish([metrics.state()])["loss"])
    assert found[0] == found[1]


def test_a_text_that_begins_with_bos(classification_config, tmp_path):
    """The tokenizer adds one: the text has one, in training and in predictions."""
    from tokenizers import processors
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(classification_config["model"]["path"])
    tokenizer.add_special_tokens({"bos_token": "<eos>"})  # a token that the model has
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", bos)]
    )
    tokenizer.save_pretrained(tmp_path / "tok")
    rows = [{"text": f"{start}one two", "label": label} for start in ("<eos>", "") for label in "ab"]
    classification_config["model"]["tokenizer"] = str(tmp_path / "tok")
    classification_config["data"] |= {"train": write(tmp_path / "n.jsonl", rows)}
    task = jobs.task_of(classification_config)
    tokens = [task.train_split().data["tokens"][i].tolist() for i in range(4)]
    assert all(row[0] == bos and row[1] != bos for row in tokens) and tokens[0] == tokens[2]
    inputs, lengths = task.encode_texts(["<eos>one two", "one two"], [None, None], 32)
    assert inputs["input_ids"].tolist() == tokens[:1] * 2 and lengths == [len(tokens[0])] * 2


def test_labels_that_look_the_same(task_of, tmp_path, caplog):
    labels = ["caf\u00e9", "cafe\u0301", "neg", "neg\u200b"]
    task = task_of(train=write(tmp_path / "n.jsonl", [{"text": "x", "label": label} for label in labels * 4]))
    task.learned(task.train_split())
    assert caplog.text.count("are the same but for case or signs that are not seen") == 2


def test_all_bad_rows_are_counted(task_of, tmp_path):
    rows = [{"text": "x", "label": label} for label in ("a", "", "b", None, " ")]
    unknown = [{"text": "x", "label": label} for label in ("a", "z", "y", "z")]
    task = task_of(eval={"test": write(tmp_path / "e.jsonl", unknown)})
    with pytest.raises(UserError, match=r"e.jsonl:2: label 'z' does not occur .*; 2 more rows have such labels"):
        task.eval_splits(task.learned(task.train_split()))
    with pytest.raises(UserError, match=r"n.jsonl:2: the label is empty \(2 more rows cannot be used\)"):
        task_of(train=write(tmp_path / "n.jsonl", rows)).train_split()


@pytest.mark.parametrize("rows, classes", [(1, 2), (7, 5), (400, 3), (400, 60)])
def test_f1_is_that_of_sklearn(rows, classes):
    """Also where classes are missing, and where rows or classes have no label at all."""
    from sklearn.metrics import f1_score

    from fastft.tasks._judged import f1_scores

    rng = np.random.default_rng(rows + classes)
    one = [rng.integers(0, classes, rows) for _ in range(2)]
    many = [rng.random((rows, classes)) > share for share in (0.7, 0.9)]
    for values in many:
        values[:, -1] = False
    for labels, predicted in (one, many, (many[0] & False, many[1] & False)):
        averages = ("micro", "macro") if labels.ndim == 2 else ("macro",)
        expected = {f"f1_{name}": f1_score(labels, predicted, average=name, zero_division=0) for name in averages}
        assert f1_scores(labels, predicted) == pytest.approx(expected, abs=1e-12)
