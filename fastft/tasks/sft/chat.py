"""Answers to conversations."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from fastft.errors import UserError
from fastft.inference.base import Row
from fastft.inference.generate import Generator
from fastft.lazy import torch
from fastft.tasks.sft.conversations import messages_of, tools_of
from fastft.tasks.sft.rendering import ChatTemplate, Plain


class Chat(Generator):
    """``messages`` (those that were given) and ``generated``, the answer.

    A row's ``messages`` are a list in the form of OpenAI or ShareGPT, as JSON or not, or one question as text; answers
    at its end are given anew. ``tools`` and ``system`` are as in training data.

    Parameters
    ----------
    columns : dict of str
        Names of columns in data files, where they are others.
    """

    optional = frozenset({"tools", "system"})

    def __init__(
        self,
        model: Any,
        template: ChatTemplate | Plain,
        columns: dict[str, str],
        max_new_tokens: int,
        temperature: float,
    ):
        names = ("messages", "conversations", "prompt", "instruction")
        asked = next((columns[name] for name in names if name in columns), "messages")
        super().__init__(model, template.tokenizer, asked, max_new_tokens, temperature)
        self.template = template
        self.fields = {"messages": asked, **{name: columns.get(name, name) for name in ("tools", "system")}}

    def prepare(self, where: str, row: Row) -> Row:
        given = row["messages"]
        if isinstance(given, str) and not given.strip():
            raise UserError(f"{where}: the question is empty.", "Remove it, or ask something.")
        if isinstance(given, str):
            given = _messages_in(given) or [{"role": "user", "content": given}]
        if not isinstance(given, list):
            raise UserError(f"{where}: messages is a {type(given).__name__}.", "Give a text, or a list of messages.")
        messages = messages_of(where, given, row.get("system"))
        for message in messages:
            message.pop("weight", None)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages or messages[-1]["role"] in ("system", "developer"):
            raise UserError(f"{where}: the conversation asks nothing.", "Its last message is a user's, or a tool's.")
        tokens = self.template.prompt(messages, tools_of(where, row.get("tools")), where)
        return {"messages": messages, "tokens": tokens}

    def answer(self, row: Row, say: Callable[[str], None]) -> str:
        """The answer to one prepared row, of which every part is said as it is written."""
        from transformers import TextStreamer

        class Said(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                say(text)

        with torch.inference_mode():
            streamer = Said(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
            return self.continued([row["tokens"]], streamer)[0]

    def run(self, rows: list[Row]) -> list[dict]:
        answers = self.continued([row["tokens"] for row in rows])
        return [{"messages": row["messages"], "generated": more} for row, more in zip(rows, answers, strict=True)]


def _messages_in(text: str) -> list | None:
    """The list of messages that a text is as JSON; None: it is a question."""
    try:
        found = json.loads(text) if text.lstrip().startswith('[{"') else None
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, list) else None
