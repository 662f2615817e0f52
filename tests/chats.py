"""Conversations and chat templates that the tests of sft share."""

import json
from pathlib import Path

import transformers

from fastft.tasks.sft import conversations

TEMPLATES = Path(__file__).parent / "tasks" / "chat_templates"
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


def tokenizer_of(model: Path):
    """That of a model, with the special tokens of all templates."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": ADDED[2:-4]})
    tokenizer.add_tokens(ADDED[-4:])
    return tokenizer


def conversation(messages, train_on: str = "all", **more) -> conversations.Conversation:
    return conversations.read("rows:1", {"messages": json.loads(json.dumps(messages)), **more}, {}, train_on)
