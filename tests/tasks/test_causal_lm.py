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


@pytest.mark.parametrize("implementation", ["linear_cross_entropy", "cross_entropy"])
def test_experts_are_balanced_where_the_config_asks_for_it(lm_config, tmp_path, implementation):
    """The loss and its gradient at the routers are transformers' own; an evaluation measures the plain loss."""
    import shutil

    import transformers

    shutil.copytree(lm_config["model"]["path"], tmp_path / "m")
    sizes = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    asked = {"output_router_logits": True, "router_aux_loss_coef": 0.5, "attn_implementation": "eager"}
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**sizes, **heads, **asked)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "m")
    lm_config["model"] = {"path": str(tmp_path / "m"), "attention": "eager"}
    lm_config["data"] |= {"packing": "none", "truncation": "truncate"}
    lm_config["loss"] = {"implementation": implementation}
    job = jobs.job_of(lm_config)
    batch = jobs.batch_of(job, [3])
    ids = batch.inputs["input_ids"]
    router = job.model.model.layers[0].mlp.gate.weight
    whole = job.model(input_ids=ids, labels=ids, use_cache=False)
    (wanted,) = torch.autograd.grad(whole.loss, router)
    loss = jobs.loss_of(job, batch, 1.0 / int((batch.labels != -100).sum()))
    (found,) = torch.autograd.grad(loss, router)
    torch.testing.assert_close(loss, whole.loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    metrics = job.task.new_metrics(job.measured, job.learned)
    with torch.no_grad():
        metrics.update(job.model, batch)
    plain = float(whole.loss - 0.5 * whole.aux_loss)
    assert abs(metrics.finish([metrics.state()])["loss"] - plain) < 1e-5


def test_a_text_without_a_token_is_counted_as_empty(task_of, tmp_path):
    """A tokenizer that drops control characters, and a text of nothing else."""
    from tokenizers import normalizers
    from transformers import AutoTokenizer

    task = task_of(train=write(tmp_path / "x.jsonl", "one two", "\u0007", "three"))
    tokenizer = AutoTokenizer.from_pretrained(task.config.model.path)
    tokenizer.backend_tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.save_pretrained(tmp_path / "tok")
    task.config.model.tokenizer = str(tmp_path / "tok")
    split = task.train_split()
    assert split.data.meta["counts"]["empty"] == 1 and split.data.meta["documents"] == 2


def test_a_prompt_goes_on(lm_config, tmp_path):
    """What ends a text is not part of a prompt, what begins one is, once."""
    from tokenizers import processors
    from transformers import AutoTokenizer

    from fastft.inference.generate import Generator

    tokenizer = AutoTokenizer.from_pretrained(lm_config["model"]["path"])
    tokenizer.add_special_tokens({"bos_token": "<pad>"})
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<pad> $A <eos>", special_tokens=[("<pad>", bos), ("<eos>", eos)]
    )
    generator = Generator(None, tokenizer, "text", 4, 0.0)
    plain = tokenizer("one two", add_special_tokens=False)["input_ids"]
    assert generator._prompts(["one two", "<pad>one two"]) == [[bos, *plain]] * 2
