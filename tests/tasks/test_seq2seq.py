"""seq2seq: rows to tokens as each family has them; loss and gradients of transformers; refusals; training runs."""

import copy
import csv
import gzip

import jobs
import numpy as np
import pairs
import pytest
import torch
import torch.nn.functional as F
import transformers

import launch
from fastft import config as configuration
from fastft import track
from fastft.data import batches, order
from fastft.errors import UserError
from fastft.tasks.base import IGNORE

RUNS = launch.ROOT / "tests" / "train" / "runs.py"
FAMILIES = ["t5", "bart", "marian", "mbart", "mbart50", "nllb"]


def of_transformers(config: dict, rows: list[dict]) -> tuple[torch.nn.Module, dict]:
    """The model, and what transformers' own collator makes of rows."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(config["model"]["path"])
    for name, key in (("src_lang", "source_lang"), ("tgt_lang", "target_lang")):
        if key in config["data"]:
            setattr(tokenizer, name, config["data"][key])
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(config["model"]["path"]).eval()
    prefix = config["data"].get("source_prefix", "")
    encoded = [dict(tokenizer(prefix + row["en"], text_target=row["zh"])) for row in rows]
    return model, dict(transformers.DataCollatorForSeq2Seq(tokenizer, model=model)(encoded))


def gradients_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """But for weights that are computed and never saved, which transformers trains all the same."""
    computed = model._keys_to_ignore_on_save
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and name not in computed}


def same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """To 1e-5 of each parameter's largest; a bias of keys, whose gradient is 0 but for rounding, of the model's."""
    assert set(found) == set(expected)
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        size = max(float(gradient.abs().max()), 1e-2 * largest)
        assert float((found[name] - gradient).abs().max()) <= 1e-5 * size, name


@pytest.mark.parametrize("implementation", ["linear_cross_entropy", "cross_entropy"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_tokens_loss_and_gradients_are_transformers(pair_config, kind, implementation):
    made = pair_config(kind, source_prefix="to zh: " if kind == "t5" else None) | {
        "loss": {"implementation": implementation}
    }
    made["data"] = {k: v for k, v in made["data"].items() if v is not None}
    model, truth = of_transformers(made, pairs.rows())
    expected = model(**truth).loss
    expected.backward()
    job = jobs.job_of(made)
    assert job.record["loss"]["implementation"] == implementation
    batch = jobs.batch_of(job, range(16))
    assert torch.equal(batch.inputs["input_ids"], truth["input_ids"])
    assert torch.equal(batch.inputs["attention_mask"], truth["attention_mask"])
    assert torch.equal(batch.labels, truth["labels"])
    targets = int((batch.labels != IGNORE).sum())
    assert job.train.totals["targets"] == targets
    assert batch.tokens == int(truth["attention_mask"].sum()) + targets
    loss = jobs.loss_of(job, batch, 1 / targets)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    same_gradients(gradients_of(job.model), gradients_of(model))


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_dummy_batch_has_no_loss(pair_config, kind):
    job = jobs.job_of(pair_config(kind))
    batch = jobs.batch_of(job, [])
    loss = jobs.loss_of(job, batch)
    loss.backward()
    assert float(loss.detach()) == 0 and batch.tokens == 0 and batch.samples == 0


def test_rows_of_a_batch_do_not_see_its_padding(pair_config):
    for kind in FAMILIES:
        job = jobs.job_of(pair_config(kind))
        job.model.eval()
        with torch.no_grad():
            together = job.objective.token_losses(job.model, jobs.batch_of(job, range(16))).sum(1)
            alone = [job.objective.token_losses(job.model, jobs.batch_of(job, [i])).sum(1) for i in range(16)]
        assert torch.allclose(together, torch.cat(alone), rtol=1e-4), kind


@pytest.mark.parametrize(
    "kind",
    ["t5", "bart", "marian", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("mbart", "mbart50"))],
)
def test_zero_stages_on_two_ranks_are_one_big_batch_of_transformers(pair_config, tmp_path, kind):
    """Five rows over two ranks: loss and gradients, at ZeRO 0 to 3, with micro: auto and a rank without rows."""
    base = pair_config(kind)
    rows = pairs.rows()
    ids = order.sample_ids(16, 17, 0, 5)
    model, truth = of_transformers(base, [rows[i] for i in ids])
    loss = model(**truth).loss
    loss.backward()
    paths = []
    for zero in range(4):
        for micro in (1, "auto"):
            changed = copy.deepcopy(base)
            changed |= {"parallel": {"zero": zero}, "batch": {"size": 5, "micro": micro}}
            changed["data"] |= {"cache": str(tmp_path / "prepared"), "order": "permutation"}
            changed["run"]["dir"] = str(tmp_path / f"z{zero}{micro}")
            paths.append(launch.write_config(tmp_path / f"z{zero}{micro}.yaml", changed))
    launch.ranks(2, [RUNS, "gradients", tmp_path, *paths])
    expected = gradients_of(model)
    for path in paths:
        found = torch.load(tmp_path / f"{path.stem}.pt")
        assert float(found["loss"]) == pytest.approx(float(loss.detach()), rel=1e-5), path.stem
        same_gradients(found["grads"], expected)


def test_label_smoothing_is_in_training_only(pair_config):
    made = pair_config("t5") | {"loss": {"label_smoothing": 0.2}}
    job = jobs.job_of(made)
    batch = jobs.batch_of(job, range(16))
    model, truth = of_transformers(made, pairs.rows())
    with torch.no_grad():
        logits = model(**truth).logits
        plain, smooth = (
            F.cross_entropy(logits.mT, truth["labels"], label_smoothing=smoothing, reduction="none")
            for smoothing in (0.0, 0.2)
        )
        trained = float(jobs.loss_of(job, batch))
        measured = job.objective.token_losses(job.model, batch)
    assert trained == pytest.approx(float(smooth.sum()), rel=1e-5)
    assert torch.allclose(measured, plain, rtol=1e-5, atol=1e-5)
    # By token: over all of them the differences of random outputs may come to nothing.
    assert float((smooth - plain).abs().max()) > 0.1


def test_formats(pair_config, tmp_path):
    """The same rows from jsonl, csv, tsv (zipped), parquet, and the mapping that translation sets of the hub have."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = pairs.rows()
    found = tmp_path / "formats"
    found.mkdir()
    for suffix, delimiter in (("csv", ","), ("tsv", "\t")):
        opened = open if suffix == "csv" else gzip.open
        with opened(found / f"rows.{suffix}{'' if suffix == 'csv' else '.gz'}", "wt", newline="") as file:
            writer = csv.DictWriter(file, ("en", "zh"), delimiter=delimiter, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
    pq.write_table(pa.Table.from_pylist(rows), found / "rows.parquet")
    pairs.write(found / "nested.jsonl", [{"translation": {"en": row["en"], "zh": row["zh"]}} for row in rows])
    plain = jobs.task_of(pair_config("t5")).train_split()
    for name in ("rows.csv", "rows.tsv.gz", "rows.parquet", "nested.jsonl"):
        nested = {"source": "translation.en", "target": "translation.zh"} if "nested" in name else {}
        split = jobs.task_of(pair_config("t5", train=str(found / name), **nested)).train_split()
        for column in ("source", "target"):
            assert np.array_equal(split.data[column].values, plain.data[column].values), name


@pytest.mark.parametrize(
    "row, part",
    [
        ({"en": "a", "zh": " "}, r"bad.jsonl:2: the target \(column 'zh'\) is empty"),
        ({"en": "a", "zh": None}, r"bad.jsonl:2: column 'zh' holds NoneType, not text"),
        ({"en": "a", "cn": "b"}, r"bad.jsonl:2: no column 'zh'(?s:.*)data.source / data.target"),
        ({"en": 3, "zh": "b"}, r"bad.jsonl:2: column 'en' holds int"),
    ],
)
def test_bad_rows_are_named(pair_config, tmp_path, row, part):
    train = pairs.write(tmp_path / "bad.jsonl", [pairs.rows()[0], row, row])
    with pytest.raises(UserError, match=rf"{part}(?s:.*)" if "no column" in part else part) as refused:
        jobs.task_of(pair_config("t5", train=train)).train_split()
    assert "(1 more rows cannot be used)" in refused.value.message


def test_long_rows_follow_the_policy_by_part(pair_config, tmp_path):
    """Nothing is cut in silence: sources and targets are counted apart, the first are named; both keep their end."""
    rows = [
        pairs.rows()[0],
        {"en": "the cat " * 40, "zh": "猫。"},
        {"en": "the cat.", "zh": "猫" * 60},
    ]
    train = pairs.write(tmp_path / "long.jsonl", rows)
    with pytest.raises(UserError) as refused:
        jobs.task_of(pair_config("t5", train=train)).train_split()
    said = refused.value.message
    assert "1 sources than data.max_length = 40" in said and "1 targets than data.max_target_length = 40" in said
    assert "long.jsonl:2 (source)" in said and "long.jsonl:3 (target)" in said and "drop" in refused.value.hint
    dropped = jobs.task_of(pair_config("t5", train=train, truncation="drop")).train_split()
    assert len(dropped) == 1 and dropped.data.meta["counts"]["dropped"] == 2
    task = jobs.task_of(pair_config("t5", train=train, truncation="truncate", max_target_length=20))
    cut = task.train_split()
    counts = cut.data.meta["counts"]
    assert (counts["truncated"], counts["long_sources"], counts["long_targets"]) == (2, 1, 1)
    assert len(cut.data["source"][1]) == 40 and len(cut.data["target"][2]) == 20
    assert cut.data["source"][1][-1] == cut.data["target"][2][-1] == task.tokenizer.eos_token_id


@pytest.mark.parametrize(
    "kind, data, part",
    [
        ("bart", {"max_length": 65}, "data.max_length = 65 is beyond the limit of 64 positions of the model's encoder"),
        ("bart", {"max_target_length": 65}, "data.max_target_length = 65 is beyond the limit of 64"),
        ("bart", {"target_lang": "de"}, "writes no language codes"),
        ("mbart", {"target_lang": "zh"}, "data.target_lang: 'zh' is no language of this tokenizer"),
        ("t5", {"truncation": "split"}, "split makes no sense for seq2seq"),
        ("t5", {"target": "en"}, "data.source and data.target are one column"),
    ],
)
def test_bad_settings(pair_config, kind, data, part):
    with pytest.raises(UserError, match=part):
        jobs.task_of(pair_config(kind, **data)).train_split()


def test_trap_relative_positions_have_no_limit(pair_config):
    """T5's config names no limit, or 512 as n_positions, which its relative positions do not have."""
    task = jobs.task_of(pair_config("t5", max_length=2000))
    assert task.max_length == task.target_length == 2000


def test_trap_a_start_token_in_the_labels_is_not_shifted_twice(pair_config, tmp_path):
    """Of a tokenizer that begins every text with the decoder's start token (transformers#29973)."""
    folder = pairs.model_of("bart", tmp_path / "bert_like", decoder_start_token_id=0)
    made = pair_config("bart")
    made["model"]["path"] = str(folder)
    job = jobs.job_of(made)
    batch = jobs.batch_of(job, [0, 1])
    assert (batch.inputs["input_ids"][:, 0] == 0).all() and not (batch.labels == 0).any()
    assert (batch.labels == 2).sum() == 2  # each ends


def test_trap_a_model_that_does_not_say_its_start_token(pair_config, tmp_path):
    folder = pairs.model_of("t5", tmp_path / "no_start", decoder_start_token_id=None)
    made = pair_config("t5")
    made["model"]["path"] = str(folder)
    with pytest.raises(UserError, match=r"cannot tell what its decoder starts with(?s:.*)decoder_start_token_id"):
        jobs.job_of(made)


def test_trap_targets_that_the_tokenizer_does_not_know(pair_config, tmp_path):
    rows = [{"en": row["en"], "zh": "한국어 문장"} for row in pairs.rows()]
    task = jobs.task_of(pair_config("t5", train=pairs.write(tmp_path / "ko.jsonl", rows)))
    (said,) = task.describe(task.train_split())
    assert "of the targets' tokens are unknown to the tokenizer" in said
    assert jobs.task_of(pair_config("t5")).describe(jobs.task_of(pair_config("t5")).train_split()) == []


def test_batches_by_both_lengths():
    """The plan never pads more than one by the sum alone, keeps within micro_tokens, and holds every row once."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(2, 60, (200, 2))
    plan = batches.by_length(np.arange(200), sizes, 2, 512)
    assert sorted(np.concatenate([part for step in plan for part in step])) == list(range(200))

    def cost(plan) -> int:
        parts = [part for step in plan for part in step if len(part)]
        widths = [len(part) * sizes[part].max(0).sum() for part in parts]
        assert all(w <= 512 or len(part) == 1 for w, part in zip(widths, parts, strict=True))
        return sum(widths)

    by_sum = batches.by_length(np.arange(200), sizes.sum(1), 2, 512)
    padded = sum(len(p) * sizes[p].max(0).sum() for step in by_sum for p in step if len(p))
    assert cost(plan) < padded and cost(plan) < 1.35 * sizes.sum()
    one = batches.by_length(np.arange(200), sizes[:, :1], 2, 512)
    same = batches.by_length(np.arange(200), sizes[:, 0], 2, 512)
    assert all(np.array_equal(a, b) for s, t in zip(one, same, strict=True) for a, b in zip(s, t, strict=True))


def test_trap_positions_that_are_computed_are_not_trained(pair_config):
    """transformers trains Marian's sinusoidal positions and leaves them out when it saves."""
    made = pair_config("marian")
    positions = "model.encoder.embed_positions.weight"
    plain = transformers.AutoModelForSeq2SeqLM.from_pretrained(made["model"]["path"])
    assert positions in plain._keys_to_ignore_on_save
    job = jobs.job_of(made)
    assert not job.model.get_parameter(positions).requires_grad and job.frozen == 2 * 64 * 32


@pytest.mark.parametrize("kind, changes", [("bart", {}), ("t5", {"lora": {"r": 4}}), ("marian", {"dtype": "bf16"})])
def test_it_trains(pair_config, tmp_path, kind, changes):
    """With activation checkpointing; LoRA; bf16: the loss falls."""
    made = pair_config(kind, eval=str(tmp_path / "rows.jsonl"))
    made["model"] |= changes
    made |= {
        "parallel": {"activation_checkpointing": True},
        "optim": {"lr": 2e-2},
        "train": {"steps": 12, "log_every": 1},
    }
    launch.fastft("train", launch.write_config(tmp_path / "c.yaml", made))
    records = track.read(tmp_path / "run")
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert losses[-1] < 0.9 * losses[0] and records[-1]["kind"] == "end"
    assert records[-1]["eval"]["eval"]["loss"] < losses[0]


def test_checkpointing_and_frozen_embeddings_reach_every_adapter(pair_config):
    """LoRA under gradient checkpointing: no adapter is without a gradient (peft#1142)."""
    from fastft import assemble

    made = pair_config("t5") | {"parallel": {"activation_checkpointing": True}}
    made["model"]["lora"] = {"r": 4}
    job = assemble.start(configuration.validate(made))
    assemble.add_data(job, evals=False)
    assemble.add_model(job)
    assemble.add_optimizer(job)
    assemble.add_objective(job)
    job.model.train()
    jobs.loss_of(job, jobs.batch_of(job, range(4))).backward()
    adapters = {name: p.grad for name, p in job.model.named_parameters() if "lora_B" in name}
    assert adapters and all(grad is not None and grad.abs().sum() > 0 for grad in adapters.values())


def test_short_texts_take_plain_attention_on_a_cpu(pair_config):
    """The logits are the same; long texts, and who asks for sdpa, have torch's attention."""
    from fastft.models import short_attention

    job = jobs.job_of(pair_config("bart"))
    assert job.task.settled["attention"].startswith("eager: ")
    asked = pair_config("bart")
    asked["model"]["attention"] = "sdpa"
    plain = jobs.job_of(asked)
    assert plain.task.settled["attention"] == plain.model.config._attn_implementation == "sdpa"
    batch = jobs.batch_of(job, range(16))
    with torch.no_grad():
        losses = [float(jobs.loss_of(one, batch)) for one in (job, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert short_attention.take(plain.model, "auto", 129, torch.device("cpu")) == "sdpa"
    assert short_attention.take(plain.model.bfloat16(), "auto", 40, torch.device("cpu")) == "sdpa"
