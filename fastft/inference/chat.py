"""Answers to conversations."""

from __future__ import annotations

from typing import Any

from fastft.errors import UserError
from fastft.inference.base import Row
from fastft.inference.generate import Generator


class Chat(Generator):
    """``messages`` (those that were given) and ``generated``, the answer.

    A row's ``messages`` are a list of role and content, as JSON or not, or one question as text.

    Parameters
    ----------
    template
        With ``prompt(messages, tools)``: the tokens that an answer follows.
    columns : dict of str
        Names of columns in data files, where they are others: messages, prompt, tools.
    """

    def __init__(self, model: Any, template: Any, columns: dict[str, str], max_new_tokens: int, temperature: float):
        asked = next((columns[name] for name in ("messages", "prompt", "instruction") if name in columns), "messages")
        super().__init__(model, template.tokenizer, asked, max_new_tokens, temperature)
        self.template = template
        self.fields = {"messages": asked}

    def prepare(self, where: str, row: Row) -> Row:
        given = super().prepare(where, row)["messages"]
        messages = [{"role": "user", "content": given}] if isinstance(given, str) else given
        good = isinstance(messages, list) and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        )
        if not good or not messages:
            raise UserError(f"{where}: no conversation.", "Give a text, or a list of messages with role and content.")
        while messages and messages[-1]["role"] == "assistant":  # what is there already is answered anew
            messages = messages[:-1]
        if not messages:
            raise UserError(f"{where}: the conversation asks nothing.", "Its last message is a user's.")
        return {"messages": messages}

    def run(self, rows: list[Row]) -> list[dict]:
        answers = self.continued([self.template.prompt(row["messages"], None) for row in rows])
        return [{"messages": row["messages"], "generated": more} for row, more in zip(rows, answers, strict=True)]
