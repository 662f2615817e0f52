"""sft: which tokens are learned, for the chat templates that are about; training, prediction and export of it."""

import json
import sys
from pathlib import Path

import jobs
import numpy as np
import pytest
import torch
import transformers

import launch
from fastft import config as configuration
from fastft import track
from fastft.data.encoder import RowError
from fastft.errors import UserError
from fastft.evaluate.predict import predict, predictor
from fastft.tasks.sft import conversations
from fastft.tasks.sft.rendering import ChatTemplate, Plain

TEMPLATES = Path(__file__).parent / "chat_templates"
ADDED = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "[TOOL_CALLS]",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<|START_OF_TURN_TOKEN|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|USER_TOKEN|>",
    "<|CHATBOT_TOKEN|>",
    "<|SYSTEM_TOKEN|>",
    "<tool_call>",
    "</tool_call>",
    "<think>",
    "</think>",
]
# What a model has to write of an answer, by kind of template: content -> text.
WRITTEN = {
    "alpaca": lambda c: c,
    "chatml": lambda c: f"{c}<|im_end|>",
    "chatml_default_system": lambda c: f"{c}<|im_end|>",
    "chatml_marked": lambda c: f"{c}<|im_end|>",
    "command_r": lambda c: f"{c.strip()}<|END_OF_TURN_TOKEN|>",
    "deepseek": lambda c: f"{c}</s>",
    "gemma": lambda c: f"{c.strip()}<end_of_turn>",
    "llama2": lambda c: f" {c.strip()} </s>",
    "llama3": lambda c: f"{c.strip()}<|eot_id|>",
    "mistral": lambda c: f" {c}</s>",
    "phi3": lambda c: f"{c}<|end|>",
    "qwen25": lambda c: f"{c}<|im_end|>",
    "vicuna": lambda c: f" {c}</s>",
    "zephyr": lambda c: f"{c}</s>",
}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "And 3 + 3?"},
    {"role": "assistant", "content": "That makes 6, not <7>."},
    {"role": "user", "content": "Thanks."},
    {"role": "assistant", "content": "Welcome.\n\nAnything else?"},
]
ASKED, ANSWERED = CHAT[1], CHAT[2]
TOOL = {"type": "function", "function": {"name": "add", "description": "Add.", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
TOOL_CHAT = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "4"},
    {"role": "assistant", "content": "It is 4."},
]


@pytest.fixture(scope="session")
def tokenizer(tiny_llama):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": ADDED[2:-4]})
    tokenizer.add_tokens(ADDED[-4:])
    return tokenizer


@pytest.fixture
def template(tokenizer):
    def make(name: str, **options) -> ChatTemplate:
        tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text().rstrip("\n")
        return ChatTemplate(tokenizer, options)

    return make


def conversation(messages, train_on: str = "all", **more) -> conversations.Conversation:
    return conversations.read("rows:1", {"messages": json.loads(json.dumps(messages)), **more}, {}, train_on)


def learned(template, sample) -> list[str]:
    """The stretches of a sample that are learned, as text."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], sample.weights > 0, [0]])))
    decode = template.tokenizer.decode
    return [decode(sample.tokens[a:b].tolist(), skip_special_tokens=False) for a, b in edges.reshape(-1, 2)]


@pytest.mark.parametrize("name", sorted(WRITTEN))
def test_answers_alone_are_learned(template, name):
    ready, chat = template(name), CHAT[name == "mistral" :]  # which loses its system message
    samples = ready.samples("rows:1", conversation(chat))
    wanted = [WRITTEN[name](m["content"]) for m in chat if m["role"] == "assistant"]
    if len(samples) == 1:
        assert learned(ready, samples[0]) == wanted
        whole = ready.tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"]
        assert samples[0].tokens.tolist() == whole
    else:  # earlier turns are written otherwise once others follow
        assert name in ("mistral", "phi3") and [learned(ready, sample) for sample in samples] == [[w] for w in wanted]
    for sample, answer in zip(samples, wanted[-len(samples) :], strict=True):  # what is given when the model is used
        index = [i for i, m in enumerate(chat) if m["role"] == "assistant" and WRITTEN[name](m["content"]) == answer]
        if len(samples) > 1:
            prompt = ready.prompt(chat[: index[0]], None, "x")
            assert sample.tokens[: len(prompt)].tolist() == prompt and sample.weights[len(prompt)] == 1
            assert not sample.weights[: len(prompt)].any()


def test_thinking_is_learned_where_it_is_written(template):
    chat = [
        {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "A.", "reasoning_content": "first"},
        {"role": "user", "content": "b?"},
        {"role": "assistant", "content": "<think>\nsecond\n</think>\n\nB."},
    ]
    ready = template("qwen3")
    found = [learned(ready, sample) for sample in ready.samples("rows:1", conversation(chat))]
    assert found == [["<think>\nfirst\n</think>\n\nA.<|im_end|>"], ["<think>\nsecond\n</think>\n\nB.<|im_end|>"]]
    plain = [{k: v for k, v in m.items() if k != "reasoning_content"} for m in chat[:2]]
    assert learned(ready, ready.samples("rows:1", conversation(plain))[0]) == ["<think>\n\n</think>\n\nA.<|im_end|>"]
    without = template("qwen3", enable_thinking=False)
    assert learned(without, without.samples("rows:1", conversation(plain))[0]) == ["A.<|im_end|>"]


@pytest.mark.parametrize(
    "name, call",
    [
        ("qwen25", '\n<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 2}}\n</tool_call><|im_end|>'),
        ("llama3", '{"name": "add", "parameters": {"a": 2, "b": 2}}<|eot_id|>'),
        ("mistral", '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 2, "b": 2}}]</s>'),
    ],
)
def test_tool_calls_are_learned_and_results_are_not(template, name, call):
    ready = template(name)
    samples = ready.samples("rows:1", conversation(TOOL_CHAT, tools=[TOOL]))
    found = [stretch for sample in samples for stretch in learned(ready, sample)]
    assert found == [call.removeprefix("\n") if name == "qwen25" else call, WRITTEN[name]("It is 4.")]


@pytest.mark.parametrize(
    "name, messages, more, part",
    [
        (
            "deepseek_r1",
            CHAT,
            {},
            "message 3: the chat template does not write it behind its own generation prompt.*<think>",
        ),
        ("llama2", [ASKED, ASKED, ANSWERED], {}, "refuses the conversation: roles must alternate"),
        ("mistral", CHAT, {}, "message 1: the chat template does not write this system message"),
        ("chatml", TOOL_CHAT, {}, "message 2: the chat template does not write the call of add"),
        ("llama2", [ASKED, ANSWERED], {"tools": [TOOL]}, "does not write the tool 'add'"),
        ("zephyr", [ASKED, {"role": "assistant", "content": " "}], {}, "message 2: the answer is empty"),
        ("zephyr", CHAT[2:], {}, "message 1: the conversation begins with an answer"),
        ("zephyr", CHAT[:2], {}, "has no answer"),
        ("zephyr", [ASKED, CHAT[0], ANSWERED], {}, "message 2: a system message after others"),
        ("zephyr", [ASKED, TOOL_CHAT[2], ANSWERED], {}, "message 2: a tool's result that no call comes before"),
        ("zephyr", [{"role": "narrator", "content": "a"}], {}, "message 1: unknown role 'narrator'"),
        ("zephyr", [ASKED, {"role": "assistant", "content": 3}], {}, "message 2: column 'content' holds int"),
        ("zephyr", "nothing", {}, "messages is broken JSON"),
        ("zephyr", [ASKED, {**ANSWERED, "weight": -1}], {}, "message 2: weight -1"),
        ("zephyr", [ASKED, {**ANSWERED, "weight": 1e39}], {}, "message 2: weight 1e"),
        ("zephyr", [ASKED, {**ANSWERED, "train": "false"}], {}, "message 2: train 'false'"),
        ("zephyr", [ASKED, {**ANSWERED, "reasoning_content": "Hm."}], {}, "does not write its reasoning_content 'Hm.'"),
        ("zephyr", [ASKED, ANSWERED], {"tools": [{"type": "function", "function": "x"}]}, "tools are no list"),
        ("zephyr", [ASKED, ANSWERED], {"tools": [{"name": None}]}, "tools are no list"),
        ("zephyr", [ASKED, {"role": "assistant", "content": [{"type": "image_url"}]}], {}, "of type 'image_url'"),
    ],
)
def test_what_cannot_be_learned_is_refused_by_place(template, name, messages, more, part):
    ready = template(name)
    with pytest.raises(RowError, match=f"(?s)rows:1.*{part}"):
        ready.samples("rows:1", conversation(messages, **more))


BARE = (
    "{% for m in messages if m.role in ('user', 'assistant') %}"
    "{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}"
)
PROMPT = "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"


@pytest.mark.parametrize(
    "source, messages, part",
    [
        (BARE + PROMPT, [{"role": "system", "content": "a"}, ASKED, ANSWERED], "message 1: .*this system message"),
        (BARE + PROMPT, [*TOOL_CHAT[:1], ANSWERED, TOOL_CHAT[2], ANSWERED], "message 3: .*this tool message"),
        ("{{ 1 // 0 }}", [ASKED, ANSWERED], ".*refuses the conversation: ZeroDivisionError"),
    ],
)
def test_other_templates_are_refused_by_place(template, source, messages, part):
    ready = template("zephyr")
    ready.tokenizer.chat_template = source
    with pytest.raises(RowError, match=f"rows:1: {part}"):
        ready.samples("rows:1", conversation(messages))


def test_a_broken_template_is_told_once(template):
    ready = template("zephyr")
    ready.tokenizer.chat_template = "{% for m in messages %}\n{{ m.content }"
    with pytest.raises(UserError, match=r"The chat template is broken, in line 2"):
        ready.samples("rows:1", conversation(CHAT))


def test_a_prompt_that_ends_in_a_blank_keeps_its_tokens(template):
    """A token that would span prompt and answer is two, as when the model is used; so the first word is learned."""
    ready = template("zephyr")
    ready.tokenizer.chat_template = BARE + PROMPT
    (sample,) = ready.samples("x", conversation([ASKED, ANSWERED, ASKED, ANSWERED]))
    assert learned(ready, sample) == ["It is 4.<|im_end|>"] * 2
    prompt = ready.prompt([ASKED], None, "x")
    assert sample.tokens[: len(prompt)].tolist() == prompt and sample.weights[len(prompt)] == 1
    (sample,) = template("chatml").samples("x", conversation([ASKED, {"role": "assistant", "content": "\n\n  It is."}]))
    assert learned(ready, sample) == ["\n\n  It is.<|im_end|>"]


def test_a_template_that_needs_a_system_message(template):
    ready = template("chatml")
    need = "{% if messages[0].role != 'system' %}{{ raise_exception('system needed') }}{% endif %}"
    ready.tokenizer.chat_template = need + ready.tokenizer.chat_template
    assert ready.end_of_turn() == ready.tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_an_answer_that_is_a_thought_alone(template):
    chat = [
        {"role": None, "from": "human", "value": "a?"},
        {"role": "assistant", "content": None, "reasoning_content": "T"},
    ]
    ready = template("qwen3")
    (sample,) = ready.samples("x", conversation(chat))
    assert learned(ready, sample) == ["<think>\nT\n</think>\n\n<|im_end|>"]


def test_a_template_that_moves_what_it_marks_is_refused(template):
    ready = template("chatml_marked")
    ready.tokenizer.chat_template = ready.tokenizer.chat_template.replace("m.role == 'assistant'", "loop.last")
    with pytest.raises(RowError, match=r"marks 1 answers .*has 3"):
        ready.samples("rows:1", conversation(CHAT))


FORMS = [
    {"messages": CHAT[1:3]},
    {"messages": json.dumps(CHAT[1:3])},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "What is 2 + 2?"}]}, CHAT[2]]},
    {"conversations": [{"from": "human", "value": "What is 2 + 2?"}, {"from": "gpt", "value": "It is 4."}]},
    {"prompt": "What is 2 + 2?", "completion": "It is 4."},
    {"prompt": CHAT[1:2], "completion": CHAT[2:3]},
    {"instruction": "What is 2 + 2?", "input": "", "output": "It is 4.", "history": [], "system": ""},
]


@pytest.mark.parametrize("row", FORMS, ids=lambda row: "-".join(row))
def test_all_forms_are_one(row):
    assert conversations.read("x", row, {}, "all").messages == CHAT[1:3]


def test_a_history_that_is_none():
    with pytest.raises(RowError, match="x: history is a int"):
        conversations.read("x", {"instruction": "a", "output": "b", "history": 5}, {}, "all")


def test_more_of_the_forms():
    row = {
        "conversations": [
            {"from": "human", "value": "What is 2 + 2?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2, "b": 2}}'},
            {"from": "observation", "value": "4"},
            {"from": "gpt", "value": "It is 4."},
        ],
        "tools": json.dumps([TOOL["function"]]),
        "system": "Be brief.",
    }
    found = conversations.read("x", row, {}, "all")
    assert found.messages == [CHAT[0], *TOOL_CHAT] and found.tools == [TOOL] and found.trained == [2, 4]
    assert conversations.read("x", row, {}, "last").trained == [4]
    row = {"instruction": "Add.", "input": "2 and 2", "output": "4", "history": [["Hi", "Hello"]]}
    assert [m["content"] for m in conversations.read("x", row, {}, "all").messages] == [
        "Hi",
        "Hello",
        "Add.\n\n2 and 2",
        "4",
    ]
    row = {"question": "2 + 2?", "answer": "4", "id": 3}
    assert conversations.read("x", row, {"prompt": "question", "completion": "answer"}, "all").trained == [1]
    with pytest.raises(RowError, match=r"x: no conversation; its columns: question, answer, id.*(?s:.*)data.columns"):
        conversations.read("x", row, {}, "all")
    assert conversation([CHAT[1], {**CHAT[2], "train": False}, CHAT[3], {**CHAT[4], "weight": 0.5}]).weights == [
        0,
        0,
        0,
        0.5,
    ]


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


def real_rows(folder: Path) -> list[tuple[dict, dict]]:
    """Rows of the real sets, and the names of their columns."""
    import gzip

    found = []
    for path in sorted((folder / "instruct").rglob("*.json*")):
        text = (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8").read()
        rows = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]
        columns = {"prompt": "question", "completion": "answer"} if "question" in rows[0] else {}
        found += [(row, columns) for row in rows]
    return found


@pytest.mark.parametrize("name", sorted(WRITTEN))
@pytest.mark.parametrize("step", [211, pytest.param(1, marks=[pytest.mark.long, pytest.mark.timeout(3600)])])
def test_masks_of_real_conversations(shared_data, template, name, step):
    """What is learned of chats, questions with answers and calls is what the template writes of each answer."""
    ready, checked = template(name), 0
    for row, columns in real_rows(shared_data)[::step]:
        found = conversations.read("x", row, columns, "all")
        if found.tools and name not in ("llama3", "qwen25", "mistral"):
            continue  # their templates know no calls: refused
        wanted = []
        for message in (found.messages[i] for i in found.trained):
            if "tool_calls" in message:
                wanted.append(message["tool_calls"][0]["function"]["name"])
            else:
                wanted.append(WRITTEN[name](message["content"]))
        written = [stretch for sample in ready.samples("x", found) for stretch in learned(ready, sample)]
        assert len(written) == len(wanted)
        for answer, text, i in zip(written, wanted, found.trained, strict=True):
            assert text in answer if "tool_calls" in found.messages[i] else answer == text, (row, name)
        checked += 1
    assert checked > 20


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
