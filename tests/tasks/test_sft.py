"""sft: training, prediction and export of it. Which tokens are learned: test_sft_masks.py."""

import json
import sys
from pathlib import Path

import jobs
import numpy as np
import pytest
import torch
import transformers
from chats import ANSWERED, ASKED, CHAT, TEMPLATES, TOOL, conversation, tokenizer_of

import launch
from fastft import config as configuration
from fastft import track
from fastft.errors import UserError
from fastft.evaluate.predict import predict, predictor
from fastft.inference.forward import mended
from fastft.tasks.sft.rendering import Plain
from fastft.train.evaluation import measure


@pytest.fixture(scope="session")
def tokenizer(tiny_llama):
    return tokenizer_of(tiny_llama)


@pytest.fixture
def chat_model(tmp_path_factory, tiny_llama, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("chat_model")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, attention_dropout=0.0)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.chat_template = (TEMPLATES / "chatml.jinja").read_text().rstrip("\n")
    tokenizer.save_pretrained(folder)
    return folder


def write(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def config(chat_model, tmp_path) -> dict:
    rows = [{"messages": CHAT[1 : 3 + 2 * (i % 3)]} for i in range(12)]
    return {
        "task": "sft",
        "model": {"path": str(chat_model)},
        "data": {"train": write(tmp_path / "train.jsonl", rows), "max_length": 128},
        "batch": {"size": 4},
        "optim": {"lr": 5e-3},
        "train": {"steps": 4, "log_every": 1},
        "run": {"dir": str(tmp_path / "run"), "offline": True, "device": "cpu", "threads": 1},
    }


@pytest.mark.parametrize("weights", [None, 0.5])
def test_packed_and_unpacked_are_transformers_loss(config, tmp_path, weights):
    """Loss and gradients of the learned tokens, each by its weight; packs of several conversations, or one a row."""
    rows = [
        {"messages": [*CHAT[1:3], CHAT[3], {**CHAT[4], **({"weight": weights} if weights else {})}]},
        {"messages": CHAT},
    ]
    config["data"]["train"] = write(tmp_path / "two.jsonl", rows)
    found, config["data"]["max_length"] = [], 200
    for packing in ("isolated", "none"):
        config["data"] |= {"packing": packing, "cache": str(tmp_path / packing)}
        job = jobs.job_of(config)
        batch = jobs.batch_of(job, range(len(job.train)))
        assert (batch.weights is not None) == (weights is not None)
        loss = jobs.loss_of(job, batch)
        loss.backward()
        found.append((float(loss.detach()), job.model.get_input_embeddings().weight.grad.clone()))
    template, model = job.task.template, job.model
    model.zero_grad()
    total = torch.zeros(())
    for row in rows:
        (sample,) = template.samples("x", conversation(row["messages"]))
        tokens = torch.from_numpy(sample.tokens.astype(np.int64))[None]
        logp = model(input_ids=tokens).logits.log_softmax(-1)[0, :-1].gather(1, tokens[0, 1:, None])[:, 0]
        total = total - (logp * torch.from_numpy(sample.weights[1:])).sum()
    total.backward()
    truth = model.get_input_embeddings().weight.grad
    for loss, grad in found:
        assert loss == pytest.approx(float(total.detach()), rel=1e-6)
        assert (grad - truth).norm() < 1e-6 * truth.norm()
    weighed = sum(float(s.weights[1:].sum()) for r in rows for s in template.samples("x", conversation(r["messages"])))
    assert job.train.totals["targets"] == pytest.approx(weighed)


def test_trap_padding_that_is_the_end_of_a_turn(config, chat_model):
    """The end of every answer is learned, and no padding is, also where both are one token (trl#1623, #3091)."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(chat_model)
    tokenizer.pad_token = "<|im_end|>"
    tokenizer.save_pretrained(chat_model)
    task = jobs.task_of(config)
    split = task.train_split()
    batch = jobs.collate(task, split, range(len(split)))
    ends = int((batch.labels == tokenizer.pad_token_id).sum())
    assert ends == 4 * (1 + 2 + 3) and batch.inputs["input_ids"][0, -1] == tokenizer.pad_token_id


def test_a_cut_leaves_no_conversation_without_targets(config, tmp_path, caplog):
    rows = [
        {"messages": [{"role": "user", "content": "why " * 200}, CHAT[2]]},
        *({"messages": CHAT[1:3]} for _ in range(3)),
    ]
    config["data"]["train"] = write(tmp_path / "long.jsonl", rows)
    with pytest.raises(UserError, match="1 of 4 texts are longer than max_length"):
        jobs.task_of(config).train_split()
    config["data"]["truncation"] = "truncate"
    split = jobs.task_of(config).train_split()
    assert split.data.meta["documents"] == 3 and split.data.meta["counts"]["without_targets"] == 1
    assert "1 conversations are left out: nothing of an answer" in caplog.text


def test_plain_rows_end_with_the_end_of_the_text(config, tmp_path):
    config["data"] |= {"train": write(tmp_path / "p.jsonl", [{"prompt": "2 + 2 =", "completion": " 4"}]), "plain": True}
    task = jobs.task_of(config)
    split = task.train_split()
    tokens, weights = split.data["tokens"][0], split.data["weights"][0]
    assert (
        task.tokenizer.decode(tokens[weights > 0]) == " 4</s>"
        and task.tokenizer.decode(tokens[weights == 0]) == "2 + 2 ="
    )
    assert isinstance(task.template, Plain)
    rows = [{"prompt": "2 + 2 =", "completion": " 4", "system": "Be brief."}]
    config["data"]["train"] = write(tmp_path / "s.jsonl", rows)
    model = transformers.AutoModelForCausalLM.from_pretrained(config["model"]["path"])
    chat = task.predictor(model, {}, type(task).Predict())
    assert chat.fields["messages"] == "prompt", "rows of the training data are read"
    with pytest.raises(UserError, match=r"s.jsonl:1: data.plain: true takes rows of prompt and completion"):
        jobs.task_of(config).train_split()
    config["data"]["train"] = write(tmp_path / "m.jsonl", [{"messages": CHAT}])
    with pytest.raises(UserError, match=r"m.jsonl:1: data.plain: true takes rows of prompt and completion"):
        jobs.task_of(config).train_split()


@pytest.mark.parametrize(
    "data, part",
    [
        ({"truncation": "split"}, "split makes no sense for sft"),
        ({"columns": {"promt": "q"}}, "'promt' is no column of a conversation. Did you mean 'prompt'"),
        ({"plain": True, "template_options": {"a": 1}}, "exclude each other"),
        ({"template_options": {"tools": []}}, "'tools' is no option of a template"),
        ({"chat_template": "nowhere.jinja"}, "data.chat_template: nowhere.jinja: No such file"),
        ({"chat_template": __file__.replace("test_sft.py", "chat_templates/README.md")}, "holds no Jinja template"),
    ],
)
def test_bad_settings(config, data, part):
    config["data"] |= data
    with pytest.raises(UserError, match=part):
        configuration.validate(config)


def test_no_template_is_said(config, tiny_llama):
    config["model"]["path"] = str(tiny_llama)
    with pytest.raises(UserError, match=r"no chat template(?s:.*)data.chat_template.*data.plain"):
        jobs.task_of(config).train_split()


def test_templates_by_name_without_a_default(config, chat_model):
    tokenizer = transformers.AutoTokenizer.from_pretrained(chat_model)
    (chat_model / "chat_template.jinja").unlink()
    tokenizer.chat_template = {"tool_use": "{{ messages }}"}
    tokenizer.save_pretrained(chat_model)
    with pytest.raises(UserError, match=r"no default(?s:.*)data.chat_template"):
        jobs.task_of(config).train_split()


def test_it_learns_stops_and_is_exported_with_its_template(config, tmp_path):
    """Overfits three answers: the folder, through transformers alone, answers as `fastft predict` does, and stops."""
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in (("red?", "Apple."), ("big?", "Bear."), ("high?", "Cloud it is."))
    ]
    marked = tmp_path / "own.jinja"
    marked.write_text((TEMPLATES / "chatml_marked.jinja").read_text().rstrip("\n"))
    config["data"] |= {
        "train": write(tmp_path / "r.jsonl", rows * 8),
        "eval": write(tmp_path / "e.jsonl", rows),
        "chat_template": str(marked),
    }
    config["train"] = {"steps": 60, "log_every": 20}
    config["model"]["path"], config["optim"] = config["model"]["path"], {"lr": 1e-2, "warmup": 5}
    _, output = launch.fastft("train", launch.write_config(tmp_path / "c.yaml", config))
    assert "24 conversations; " in output
    run = tmp_path / "run"
    assert track.read(run)[-1]["eval"]["eval"]["perplexity"] < 1.2
    asked = [("x", {"messages": row["messages"][0]["content"]}) for row in rows]
    ready = predictor(str(run), {"max_new_tokens": 40})
    answers = [p["generated"] for p in predict(ready, [(w, ready.prepare(w, r)) for w, r in asked])]
    assert answers == [row["messages"][1]["content"] for row in rows]
    marked.unlink()  # the run has its text
    assert '"eval": {"loss"' in launch.fastft("eval", run, "--json")[1]
    model = transformers.AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "model")
    assert "generation" in tokenizer.chat_template
    for row, answer in zip(rows, answers, strict=True):
        given = tokenizer.apply_chat_template(
            row["messages"][:1], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        written = model.generate(**given, max_new_tokens=40, do_sample=False)[0, given["input_ids"].shape[1] :]
        assert tokenizer.decode(written, skip_special_tokens=True) == answer and len(written) < 40
    for side in ("left", "right"):
        tokenizer.padding_side = side
        tokenizer.save_pretrained(run / "model")
        pipe = transformers.pipeline("text-generation", model=str(run / "model"))
        ready = predictor(str(run / "model"), {"max_new_tokens": 40})
        for size in (1, 32):
            given = [row["messages"][:1] for row in rows]
            written = pipe(given, batch_size=size, max_new_tokens=40, do_sample=False)
            assert [one[0]["generated_text"][-1]["content"] for one in written] == answers, (side, size)
            prepared = [("x", ready.prepare("x", {"messages": messages})) for messages in given]
            assert [p["generated"] for p in predict(ready, prepared, size)] == answers, (side, size)


@pytest.mark.parametrize(
    "row, part",
    [
        ({"messages": [CHAT[0]]}, "asks nothing"),
        ({"messages": [{"role": "narrator", "content": "a"}]}, "unknown role"),
        ({"messages": 3}, "messages is a int"),
        ({"messages": " "}, "the question is empty"),
        ({"messages": "a", "tools": [TOOL]}, "does not write the tool 'add'"),
        ({"messages": '[{"role": "user", "content": "Hi"}]', "system": ""}, None),
        ({"messages": [*CHAT, {"role": "assistant", "content": "twice"}], "tools": None}, None),
        ({"messages": '[{"no JSON'}, None),
    ],
)
def test_rows_to_be_answered(chat_model, row, part):
    ready = predictor(str(said_to_be_sft(chat_model)), {"max_new_tokens": 4})
    if part is None:
        assert ready.run([ready.prepare("f:1", row)])[0]["messages"][-1]["role"] == "user"
        return
    with pytest.raises(UserError, match=f"f:1: .*{part}"):
        ready.prepare("f:1", row)


def said_to_be_sft(folder: Path) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "fastft_task": "sft"}))
    return folder


def test_two_ranks_learn_what_one_does(config, tmp_path):
    losses = []
    for world, zero in ((1, 0), (2, 2)):
        path = launch.write_config(tmp_path / "c.yaml", {**config, "parallel": {"zero": zero}})
        folder = tmp_path / f"of-{world}"
        launch.ranks(world, ["-m", "fastft", "train", path, f"run.dir={folder}"])
        losses.append([r["loss"] for r in track.read(folder) if r["kind"] == "train"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_chat_answers_line_by_line(chat_model):
    process = launch.start(
        [sys.executable, "-m", "fastft", "chat", chat_model, "--max-new-tokens", "5", "--system", "Be brief."], stdin=-1
    )
    lines = ["Hello?", "", "And " * 200, "/new", "Again?"]
    output, _ = process.communicate("".join(line + "\n" for line in lines), timeout=120)
    assert process.returncode == 0, output
    assert "Traceback" not in output
    assert output.count("error: The longest prompt") == 1 and "/new begins anew" in output


def test_chat_takes_models_with_a_template(tiny_llama, tiny_bert):
    for model, part in ((tiny_llama, "no chat template"), (tiny_bert, "")):
        code, output = launch.fastft("chat", model, check=False)
        assert code == 1 and part in output and "Traceback" not in output


def test_evaluations_generate_the_last_answers(config, tmp_path):
    """Overfitted answers are found again, by length and not by pack; ZeRO 0 and 3 on two ranks, of which one has less
    to generate, give the same."""
    asked = (
        ("red?", "Apple."),
        ("how much is 2 + 2? Please tell me in one word", "So it is #### 4"),
        ("high?", "Cloud."),
    )
    first = [ASKED, ANSWERED]
    rows = [
        {"messages": [*(first if i == 1 else []), {"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for i, (q, a) in enumerate(asked)
    ]
    config["data"] |= {"train": write(tmp_path / "r.jsonl", rows * 8), "eval": write(tmp_path / "e.jsonl", rows)}
    config["evaluation"] = {"metrics": ["exact_match", "rouge", "answer"], "generation": {"max_new_tokens": 30}}
    config |= {"train": {"steps": 60, "log_every": 20}, "optim": {"lr": 1e-2, "warmup": 5}}
    config["checkpoint"] = {"best_by": "eval.exact_match"}
    launch.fastft("train", launch.write_config(tmp_path / "c.yaml", config))
    found = track.read(tmp_path / "run")[-1]["eval"]["eval"]
    assert {name: found[name] for name in ("exact_match", "rouge1", "rougeL")} == dict.fromkeys(
        ("exact_match", "rouge1", "rougeL"), 1
    )
    assert found["answer"] == pytest.approx(1 / 3)  # the others hold no number
    launch.fastft("eval", tmp_path / "run", "--json", "--out", tmp_path / "judged.jsonl")
    judged = [json.loads(line) for line in (tmp_path / "judged.jsonl").read_text().splitlines()]
    assert [(row["gold"], row["generated"], row["exact_match"]) for row in judged] == [(a, a, 1.0) for _, a in asked]
    assert [row["row"].rpartition(":")[2] for row in judged] == ["1", "2", "3"]
    paths = []
    for zero in (0, 3):
        config |= {"parallel": {"zero": zero}}
        config["model"]["path"], config["run"]["dir"] = str(tmp_path / "run" / "model"), str(tmp_path / f"z{zero}")
        paths.append(launch.write_config(tmp_path / f"z{zero}.yaml", config))
    launch.ranks(2, [launch.ROOT / "tests" / "train" / "runs.py", "generated", tmp_path, *paths])
    for path in paths:
        ranks = json.loads(path.with_suffix(".json").read_text())
        assert ranks["tokens"] == [a for _, a in asked] and ranks["metrics"] == pytest.approx(found, rel=1e-3), (
            path.stem
        )


def test_an_answer_that_is_cut_is_not_asked_for(config, tmp_path):
    """Its end is not there, and nothing that is generated could match it."""
    config["data"] |= {"truncation": "truncate", "max_length": 40}
    long = [CHAT[1], {"role": "assistant", "content": "long " * 60}]
    config["data"]["train"] = write(tmp_path / "c.jsonl", [{"messages": long}, {"messages": CHAT[1:3]}])
    config["evaluation"] = {"metrics": ["exact_match"]}
    job = jobs.job_of(config)
    batch = jobs.batch_of(job, range(len(job.train)))
    tokenizer = job.task.tokenizer
    ((place, one),) = batch.asked
    assert one.where.endswith("c.jsonl:2") and tokenizer.decode(one.answer) == "It is 4.<|im_end|>"
    assert tokenizer.decode(one.prompt).endswith("<|im_start|>assistant\n") and 0 <= place < batch.samples


def test_lengths_of_answers_do_not_count_the_prompt(config, chat_model, tmp_path):
    """max_length does: given it is refused, and the model's own, which a prompt may exceed, is not kept."""
    config["data"]["eval"] = config["data"]["train"]
    config["evaluation"] = {"metrics": ["exact_match"], "generation": {"max_length": 10}}
    with pytest.raises(UserError, match="max_length counts the prompt, too"):
        jobs.job_of(config)
    config["evaluation"].pop("generation")
    settings = json.loads((chat_model / "generation_config.json").read_text()) | {"max_length": 12}
    (chat_model / "generation_config.json").write_text(json.dumps(settings))
    job = jobs.job_of(config, evals=True)
    metrics, _ = measure(job, job.evals["eval"])
    own = job.model.generation_config
    assert own.max_new_tokens == 128 and own.max_length is None
    assert max(metrics.lengths) > 12 and metrics.finish([metrics.state()])["exact_match"] == 0


def test_a_set_without_an_answer_to_ask_for(config, tmp_path):
    """All are cut: scores are NaN, by which no checkpoint is the best, and the run goes on."""
    cut = [CHAT[1], {"role": "assistant", "content": "long " * 60}]
    rows = write(tmp_path / "e.jsonl", [{"messages": cut}])
    config["data"] |= {"truncation": "truncate", "max_length": 40, "eval": rows}
    config["evaluation"] = {"metrics": ["exact_match", "rouge"]}
    config["checkpoint"] = {"best_by": "eval.exact_match"}
    config["train"] = {"steps": 2}
    launch.fastft("train", launch.write_config(tmp_path / "c.yaml", config))
    found = track.read(tmp_path / "run")[-1]["eval"]["eval"]
    assert found["loss"] > 0  # and NaN as JSON has it
    assert all(found[name] is None for name in ("exact_match", "rouge1", "rouge2", "rougeL"))


def test_trap_a_generation_config_that_is_not_saved(config, chat_model, tmp_path):
    """A temperature where nothing is sampled does nothing, but once the end of a turn is written beside it transformers
    would not save it: the export is whole."""
    file = chat_model / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"temperature": 0.6, "top_p": 0.9, "num_beams": 2}))
    plain = transformers.AutoModelForCausalLM.from_pretrained(chat_model)
    plain.generation_config.eos_token_id = 3
    with pytest.raises(ValueError, match="temperature"):
        plain.save_pretrained(tmp_path / "x")
    config["train"] = {"steps": 1}
    launch.fastft("train", launch.write_config(tmp_path / "c.yaml", config))
    written = json.loads((tmp_path / "run" / "model" / "generation_config.json").read_text())
    assert written["num_beams"] == 2 and not {"temperature", "top_p"} & set(written)
    job = jobs.job_of(config)
    job.model.generation_config.max_new_tokens = -1
    with pytest.raises(UserError, match="model's generation config: `max_new_tokens` must be greater than 0"):
        mended(job.model.generation_config)
