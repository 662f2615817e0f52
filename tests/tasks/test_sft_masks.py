"""sft: which tokens are learned, for the chat templates that are about."""

import json
from pathlib import Path

import numpy as np
import pytest
from chats import ANSWERED, ASKED, CHAT, TEMPLATES, TOOL, TOOL_CHAT, conversation, tokenizer_of

from fastft.data.encoder import RowError
from fastft.errors import UserError
from fastft.tasks.sft import conversations
from fastft.tasks.sft.rendering import ChatTemplate

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


@pytest.fixture(scope="session")
def tokenizer(tiny_llama):
    return tokenizer_of(tiny_llama)


@pytest.fixture
def template(tokenizer):
    def make(name: str, **options) -> ChatTemplate:
        tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text().rstrip("\n")
        return ChatTemplate(tokenizer, options)

    return make


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
