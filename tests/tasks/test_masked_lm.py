"""Masked language modeling: what is masked, that packed documents stay apart, and that the loss is the model's own."""

import itertools
import json

import jobs
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

import launch
from fastft import assemble, track
from fastft.errors import UserError


@pytest.fixture
def mlm_config(lm_config, tiny_masked) -> dict:
    lm_config |= {"task": "masked_lm", "model": {"path": str(tiny_masked)}}
    return lm_config


def masked(job, ids, epoch=0):
    batch = jobs.batch_of(job, ids, epoch)
    return batch.labels != -100, batch


def test_what_is_masked(mlm_config):
    """15 % of every document, whole words, 80/10/10; another choice each epoch, the same for the same one."""
    job = jobs.job_of(mlm_config)
    everything = np.arange(len(job.train))
    chosen, batch = masked(job, everything)
    again, _ = masked(job, everything)
    other, _ = masked(job, everything, epoch=1)
    assert torch.equal(chosen, again) and not torch.equal(chosen, other)
    real = job.train.totals["tokens"]
    assert 0.10 < int(chosen.sum()) / real < 0.155
    assert batch.weights.sum() == pytest.approx(job.train.targets[everything].sum(), rel=1e-5)
    ids, mask = batch.inputs["input_ids"], job.task.tokenizer.mask_token_id
    shares = [float((ids[chosen] == value).float().mean()) for value in (mask, batch.labels[chosen])]
    assert shares[0] == pytest.approx(0.8, abs=0.05) and 0.07 < shares[1] < 0.15
    assert not (ids[~chosen] == mask).any()
    special = torch.tensor(job.task.tokenizer.all_special_ids)
    assert not torch.isin(batch.labels[chosen], special).any()


def test_a_word_is_masked_whole(mlm_config):
    mlm_config["data"] |= {"replace_mask": 1.0, "replace_random": 0.0, "packing": "none"}
    job = jobs.job_of(mlm_config)
    checked = 0
    for i in range(20):
        chosen, _ = masked(job, [i])
        data = job.train.data
        p = data["packs"][i][0]
        doc, start, length = (int(data[name][p]) for name in ("piece_doc", "piece_start", "piece_length"))
        words = data["words"][doc][start : start + length]
        hit = chosen[0, 1 : 1 + length].numpy()
        for word in np.unique(words):
            assert hit[words == word].all() or not hit[words == word].any()
            checked += (words == word).sum() > 1
    assert checked > 20


def test_chinese_words(mlm_config, tmp_path):
    pytest.importorskip("jieba", reason="pip install 'fastft[zh]'")
    (tmp_path / "zh.jsonl").write_text(json.dumps({"text": "人工智能技术在医学影像诊断中的应用 works"}) + "\n")
    mlm_config["data"] |= {"train": str(tmp_path / "zh.jsonl"), "eval": {}, "packing": "none", "chinese_words": "jieba"}
    task = jobs.task_of(mlm_config)
    words = np.asarray(task.train_split().data["words"][0])
    assert words[0] == words[1] == words[2] == words[3]  # one word to jieba, or two of two: never cut inside
    mlm_config["data"]["chinese_words"] = "none"
    alone = np.asarray(jobs.task_of(mlm_config).train_split().data["words"][0])
    assert len(set(alone[:17])) == 17 and len(set(words[:17])) < 12


@pytest.mark.parametrize("implementation", ["linear_cross_entropy", "cross_entropy"])
@pytest.mark.parametrize("packing", ["isolated", "none"])
def test_the_loss_is_that_of_documents_alone(mlm_config, packing, implementation):
    """Against F.cross_entropy of every document by itself, through the model's plain forward."""
    mlm_config["data"]["packing"] = packing
    mlm_config["loss"] = {"implementation": implementation}
    job = jobs.job_of(mlm_config)
    ids = np.arange(len(job.train) - 4, len(job.train))
    batch = jobs.batch_of(job, ids)
    begin = job.task.tokenizer.cls_token_id
    total, documents = 0.0, 0
    with torch.no_grad():
        got = jobs.loss_of(job, batch)
        for row, labels, factors in zip(batch.inputs["input_ids"], batch.labels, batch.weights, strict=True):
            starts = [*torch.nonzero(row == begin).flatten().tolist(), len(row)]
            for a, b in itertools.pairwise(starts):
                end = a + 1 + int(torch.nonzero(row[a:b] == job.task.tokenizer.sep_token_id).flatten()[0])
                losses = F.cross_entropy(job.model(row[None, a:end]).logits[0], labels[a:end], reduction="none")
                total += float((losses * factors[a:end]).sum())
                documents += 1
    assert documents > 4 or packing == "none"
    assert float(got) == pytest.approx(total, rel=2e-6)


def test_dummy_batch_has_no_loss(mlm_config):
    for packing in ("isolated", "none"):
        mlm_config["data"]["packing"] = packing
        job = jobs.job_of(mlm_config)
        loss = jobs.loss_of(job, jobs.batch_of(job, []))
        loss.backward()
        assert loss == 0 and all(p.grad is None or p.grad.abs().max() == 0 for p in job.model.parameters())


@pytest.mark.parametrize("family", ["roberta", "distilbert", "electra", "funnel"])
def test_families(mlm_config, tiny_masked, tmp_path, family):
    """Positions are numbered as each family does it, or packing is refused."""
    shape = {"vocab_size": 600, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    kinds = {
        "roberta": (transformers.RobertaConfig(**shape, intermediate_size=64, max_position_embeddings=98), "Roberta"),
        "distilbert": (
            transformers.DistilBertConfig(vocab_size=600, dim=32, hidden_dim=64, n_layers=2, n_heads=2),
            "DistilBert",
        ),
        "funnel": (transformers.FunnelConfig(vocab_size=600, d_model=32, n_head=2, d_head=16, d_inner=64), "Funnel"),
        "electra": (transformers.ElectraConfig(**shape, embedding_size=16, intermediate_size=64), "Electra"),
    }
    config, name = kinds[family]
    torch.manual_seed(0)
    getattr(transformers, f"{name}ForMaskedLM")(config).save_pretrained(tmp_path / "m")
    transformers.AutoTokenizer.from_pretrained(tiny_masked).save_pretrained(tmp_path / "m")
    mlm_config["model"]["path"] = str(tmp_path / "m")
    if family == "funnel":  # takes no position_ids
        with pytest.raises(UserError, match="packing: none"):
            jobs.job_of(mlm_config)
        mlm_config["data"]["packing"] = "none"
    job = jobs.job_of(mlm_config)
    assert jobs.loss_of(job, jobs.batch_of(job, [0, 1])) > 0


def test_train_resume_eval_predict(mlm_config, tmp_path):
    """Two ranks at ZeRO 2 learn what one does; a resumed run sees the same masks."""
    mlm_config["train"]["steps"] = 8
    mlm_config["optim"]["lr"] = 3e-3
    mlm_config["checkpoint"] = {"every": 4, "keep": 9}
    curves = {}
    for name, ranks, zero in (("one", 1, 0), ("two", 2, 2)):
        mlm_config["run"]["dir"] = str(tmp_path / name)
        mlm_config["parallel"] = {"zero": zero}
        launch.ranks(ranks, ["-m", "fastft", "train", launch.write_config(tmp_path / f"{name}.yaml", mlm_config)])
        curves[name] = [r["loss"] for r in track.read(tmp_path / name) if r["kind"] == "train"]
    assert curves["one"][-1] < curves["one"][0] - 0.1
    assert curves["two"][0] == pytest.approx(curves["one"][0], rel=0.05)  # dropout differs
    launch.fastft("resume", tmp_path / "one", "train.steps=9")
    _, output = launch.fastft("eval", tmp_path / "one", "--json")
    records = [r["loss"] for r in track.read(tmp_path / "one") if r["kind"] == "eval"]
    assert json.loads(output.splitlines()[-1])["eval"]["loss"] == pytest.approx(records[-1], rel=1e-5)
    _, output = launch.fastft("predict", tmp_path / "one", "top_k=3", "--text", "the [MASK] of the class [MASK]")
    masks = json.loads(output.splitlines()[-1])["masks"]
    assert len(masks) == 2 and all(len(m) == 3 and m[0]["score"] >= m[1]["score"] for m in masks)
    code, output = launch.fastft("predict", tmp_path / "one", "--text", "no mask here", check=False)
    assert code == 1 and "the text has no [MASK]" in output
    assert assemble.trained(str(tmp_path / "one" / "model")).config.task == "masked_lm"


def test_mistakes(mlm_config, tiny_llama):
    mlm_config["model"]["path"] = str(tiny_llama)
    with pytest.raises(UserError, match="has no mask token"):
        jobs.task_of(mlm_config).train_split()
    mlm_config["data"]["replace_random"] = 0.3
    with pytest.raises(UserError, match="more than 1 together"):
        jobs.task_of(mlm_config)
