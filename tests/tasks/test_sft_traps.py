"""What others met in fine-tuning on chats (the rest of it is in test_sft.py)."""

import numpy as np
import pytest
import transformers
from tokenizers.processors import TemplateProcessing

from fastft.tasks.sft import conversations
from fastft.tasks.sft.rendering import ChatTemplate

MESSAGES = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "And 3 + 3?"},
    {"role": "assistant", "content": "6."},
]
BEGINS = (  # a template that writes the begin token, as Llama's and Gemma's do, and one that leaves it to the tokenizer
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def tokenizer(tiny_llama):
    """One that puts a begin token before every text, as Llama's does."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    begin = [("<s>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=begin)
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    return tokenizer


@pytest.mark.parametrize("template", [BEGINS, BEGINS.replace("{{ bos_token }}", "")])
def test_one_begin_token(tokenizer, template):
    """The template's own text, token for token: nothing is put before it, in training and when the model is used."""
    tokenizer.chat_template = template
    ready, written = ChatTemplate(tokenizer, {}), template.count("bos_token")
    (sample,) = ready.samples("rows:1", conversations.read("rows:1", {"messages": MESSAGES}, {}, "all"))
    assert (sample.tokens == tokenizer.bos_token_id).sum() == written
    prompt = np.asarray(ready.prompt(MESSAGES[:3], None, "x"))
    assert (prompt == tokenizer.bos_token_id).sum() == written
    assert sample.tokens[: len(prompt)].tolist() == prompt.tolist()
    whole = tokenizer.apply_chat_template(MESSAGES, tokenize=True, return_dict=True)["input_ids"]
    assert sample.tokens.tolist() == whole


def test_the_token_that_ends_a_turn_is_learned_wherever_padding_is_the_same(tokenizer):
    tokenizer.chat_template, tokenizer.pad_token = BEGINS, "</s>"
    (sample,) = ChatTemplate(tokenizer, {}).samples(
        "rows:1", conversations.read("rows:1", {"messages": MESSAGES}, {}, "all")
    )
    ends = np.flatnonzero(sample.tokens == tokenizer.eos_token_id)
    assert len(ends) == 4 and (sample.weights[ends] > 0).tolist() == [False, True, False, True]
