"""Conversations to tokens by the tokenizer's chat template, and which of those are learned.

What a template writes of an answer is found by rendering, never by looking for markers. The prompt of an answer is the
conversation before it, rendered with the template's generation prompt: what the model is given when it is used. An
answer is what the rendering of the conversation up to it has after that, and it ends with the token that ends a turn.
Where the whole conversation's rendering holds every answer right behind its own prompt, it is one sample. Templates
that write earlier turns otherwise once others follow (thinking that is dropped, tools that move to the last question)
give a sample for each answer. A template that puts something else behind its generation prompt cannot be masked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from fastft.data.encoder import RowError
from fastft.errors import UserError
from fastft.tasks.sft.conversations import Conversation, Message

OTHER = "Zqx7"  # an answer that ends like no other, and that no filter of a template changes
MARKS = re.compile(r"\{%-?\s*generation\b")  # transformers' {% generation %} blocks
NEAR = 64  # characters: longer than any token that ends a turn
SHOWN = 60  # characters around a place that is shown


@dataclass(frozen=True)
class Sample:
    """Tokens, and how much each counts as a target.

    Attributes
    ----------
    tokens : (n,) int32
    weights : (n,) float32
        0: not learned.
    """

    tokens: np.ndarray
    weights: np.ndarray


class _Refusal(Exception):
    """A template does not take a conversation."""


class ChatTemplate:
    """The chat template of a fast tokenizer.

    Parameters
    ----------
    options : dict
        What the template gets beside the messages (enable_thinking).
    """

    def __init__(self, tokenizer: Any, options: dict[str, Any]):
        if not tokenizer.is_fast:
            raise UserError(
                f"{type(tokenizer).__name__}: is no fast tokenizer: which tokens are an answer's cannot be told.",
                "Take one that has a tokenizer.json.",
            )
        if not tokenizer.chat_template:
            raise UserError(
                "The tokenizer has no chat template.",
                "Set data.chat_template to a file with one; or data.plain: true for rows of prompt and completion.",
            )
        try:
            tokenizer.get_chat_template()
        except ValueError as e:  # several by name, and none that is the default
            raise UserError(
                f"The tokenizer's chat template: {e}", "Set data.chat_template to a file with one."
            ) from None
        self.tokenizer, self.options = tokenizer, options
        self.ends = set(tokenizer.added_tokens_decoder)  # what can end a turn

    def render(self, messages: list[Message], tools: list[dict] | None, prompt: bool = False) -> str:
        """Text. ``prompt``: with what the template puts before an answer."""
        from jinja2 import TemplateSyntaxError

        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=prompt, **self.options
            )
        except TemplateSyntaxError as e:
            raise UserError(f"The chat template is broken, in line {e.lineno}: {e.message}.", "Fix it.") from None
        except Exception as e:  # its own, or whatever its code runs into
            raise _Refusal(f"{type(e).__name__}: {e}" if type(e).__module__ == "builtins" else e) from None

    def prompt(self, messages: list[Message], tools: list[dict] | None, where: str) -> list[int]:
        """Tokens of a conversation that is to be answered. Raises RowError where the template refuses it."""
        with _refused(where):
            text = self.render(messages, tools, prompt=True)
            self._check_asked(where, messages, tools, text)
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def end_of_turn(self) -> int | None:
        """The token that ends an answer; None: the template writes none that a simple conversation shows."""
        asked, answer = {"role": "user", "content": "."}, {"role": "assistant", "content": OTHER}
        for before in ([asked], [{"role": "system", "content": "."}, asked]):
            try:
                text = self.render([*before, answer], None)
            except _Refusal:
                continue
            encoded = self._encoded(text)
            end = self._end(encoded, text.rfind(OTHER) + len(OTHER)) if OTHER in text else None
            return None if end is None else int(encoded["input_ids"][end])
        return None

    def samples(self, where: str, conversation: Conversation) -> list[Sample]:
        """The conversation as one sample, or one for each answer. Raises RowError where the template refuses it, or
        cannot be masked.
        """
        with _refused(where):
            messages, tools = conversation.messages, conversation.tools
            whole = self.render(messages, tools)
            self._check_asked(where, messages, tools, whole)
            if MARKS.search(self._source(tools)):
                return [self._marked(where, conversation)]
            return self._proven(where, conversation, whole)

    def _source(self, tools: list[dict] | None) -> str:
        return self.tokenizer.get_chat_template(tools=tools)

    def _proven(self, where: str, conversation: Conversation, whole: str) -> list[Sample]:
        messages, tools = conversation.messages, conversation.tools
        answers = {i: self._answer(where, conversation, i) for i in conversation.trained}
        if all(whole.startswith(prompt + answer) for prompt, answer in answers.values()):
            spans = [(len(p), len(p) + len(a), conversation.weights[i]) for i, (p, a) in answers.items()]
            return [self._sample(where, conversation, messages, whole, spans)]
        found = []
        for i, (prompt, answer) in answers.items():
            text = self.render(messages[: i + 1], tools)
            span = (len(prompt), len(prompt) + len(answer), conversation.weights[i])
            found.append(self._sample(where, conversation, messages[: i + 1], text, [span]))
        return found

    def _answer(self, where: str, conversation: Conversation, index: int) -> tuple[str, str]:
        """The prompt of an answer, and what the model is to write behind it, with the token that ends it."""
        messages, tools = conversation.messages, conversation.tools
        before, answer = messages[:index], messages[index]
        prompt, answered = self.render(before, tools, prompt=True), self.render([*before, answer], tools)
        if not answered.startswith(prompt):
            at = _common(prompt, answered)
            raise RowError(
                f"{where}: message {index + 1}: the chat template does not write it behind its own generation prompt: "
                f"that goes on with {prompt[at : at + SHOWN]!r}, the conversation with {answered[at : at + SHOWN]!r}.",
                "Set data.template_options (enable_thinking: false, for example), or data.chat_template to a template "
                "that writes answers as the model is to give them.",
            )
        other = self.render([*before, {"role": "assistant", "content": OTHER}], tools)
        tail = _common(answered[::-1], other[::-1])
        content_end = max(len(answered) - tail, len(prompt))
        self._check_written(where, index, answer, answered[len(prompt) :])
        near = max(content_end - NEAR, len(prompt))
        encoded = self._encoded(answered[near:])
        end = self._end(encoded, content_end - near)
        stop = near + encoded["offset_mapping"][end][1] if end is not None else len(answered.rstrip())
        return prompt, answered[len(prompt) : max(stop, content_end)]

    def _check_written(self, where: str, index: int, answer: Message, written: str) -> None:
        """RowError when the template leaves out what was to be learned."""
        lost = [c["function"]["name"] for c in answer.get("tool_calls") or [] if c["function"]["name"] not in written]
        content = answer["content"].rpartition("</think>")[2].strip()
        thought = str(answer.get("reasoning_content", "")).strip()
        if lost or content not in written or thought not in written:
            of = ("content", content) if content not in written else ("reasoning_content", thought)
            what = f"the call of {lost[0]}" if lost else f"its {of[0]} {of[1][:SHOWN]!r}"
            raise RowError(
                f"{where}: message {index + 1}: the chat template does not write {what}.",
                "Set data.chat_template to a template that does, or leave such rows out.",
            )

    def _end(self, encoded: Any, content_end: int) -> int | None:
        """Index of the first added token behind the content: it ends the turn."""
        pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        return next((n for n, (i, (_, end)) in enumerate(pairs) if end > content_end and i in self.ends), None)

    def _encoded(self, text: str) -> Any:
        return self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)

    def _sample(
        self,
        where: str,
        conversation: Conversation,
        messages: list[Message],
        text: str,
        spans: list[tuple[int, int, float]],
    ) -> Sample:
        tokens, offsets = self._placed(text, [])
        self._check_tokens(where, messages, conversation.tools, tokens)
        # A token that begins in the prompt is not the model's to write: it is given the prompt's own tokens.
        if joined := [start for start, *_ in spans if ((offsets[:, 0] < start) & (offsets[:, 1] > start)).any()]:
            whole = self.tokenizer.decode(tokens)
            tokens, offsets = self._placed(text, joined)
            if self.tokenizer.decode(tokens) != whole:
                near = text[max(joined[0] - SHOWN, 0) : joined[0]]
                raise RowError(
                    f"{where}: an answer begins within a token of its prompt, which ends with {near!r}.",
                    "Set data.chat_template to a template whose generation prompt does not end in a blank.",
                )
        weights = np.zeros(len(tokens), np.float32)
        for start, end, weight in spans:
            weights[(offsets[:, 0] >= start) & (offsets[:, 1] <= end) & (offsets[:, 1] > offsets[:, 0])] = weight
        return Sample(tokens, weights)

    def _placed(self, text: str, cuts: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens, and first and last character of each; tokenized apart before and behind each cut."""
        tokens, offsets = [], []
        for start, end in pairwise([0, *cuts, len(text)]):
            encoded = self._encoded(text[start:end])
            tokens += encoded["input_ids"]
            offsets += [(start + a, start + b) for a, b in encoded["offset_mapping"]]
        return np.asarray(tokens, np.int32), np.asarray(offsets, np.int64).reshape(-1, 2)

    def _check_asked(self, where: str, messages: list[Message], tools: list[dict] | None, text: str) -> None:
        """RowError when the template leaves out a question, a system message, a tool's result or a tool."""
        places = {f"{OTHER}{n}{OTHER}": n for n, m in enumerate(messages) if m["role"] != "assistant"}
        named = {n: {**messages[n], "content": name} for name, n in places.items()}
        shown = self.render([named.get(n, message) for n, message in enumerate(messages)], tools)
        if lost := [n for name, n in places.items() if name not in shown]:
            raise RowError(
                f"{where}: message {lost[0] + 1}: the chat template does not write this {messages[lost[0]]['role']} "
                "message.",
                "Set data.chat_template to a template that does, or leave such messages out.",
            )
        names = [tool["function"]["name"] for tool in tools or []]
        if absent := [name for name in names if name not in text]:
            raise RowError(
                f"{where}: the chat template does not write the tool {absent[0]!r}.",
                "Set data.chat_template to a template for tools, or leave the column tools out.",
            )

    def _check_tokens(self, where: str, messages: list[Message], tools: list[dict] | None, tokens: np.ndarray) -> None:
        """The tokens are those that transformers' own call gives."""
        theirs = self.tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=True, return_dict=True, **self.options
        )["input_ids"]
        if theirs != tokens.tolist():
            raise RowError(f"{where}: apply_chat_template gives other tokens.", "Report this with the tokenizer.")

    def _marked(self, where: str, conversation: Conversation) -> Sample:
        """By the template's own {% generation %} blocks, which are its answers in order."""
        messages, tools = conversation.messages, conversation.tools
        found = self.tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **self.options
        )
        mask = np.asarray(found["assistant_masks"], bool)
        starts = np.flatnonzero(mask & ~np.concatenate([[False], mask[:-1]]))
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if len(starts) != len(answers):
            raise RowError(
                f"{where}: the chat template marks {len(starts)} answers ({{% generation %}}), the conversation has "
                f"{len(answers)}.",
                "Set data.chat_template to a template that marks each, or that has no marks.",
            )
        weights = np.zeros(len(mask), np.float32)
        for start, end, i in zip(starts, [*starts[1:], len(mask)], answers, strict=True):
            weights[start:end] = conversation.weights[i] * mask[start:end]
        return Sample(np.asarray(found["input_ids"], np.int32), weights)


def _common(a: str, b: str) -> int:
    """Characters that both begin with."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@contextmanager
def _refused(where: str) -> Iterator[None]:
    """What a template raises, as a RowError."""
    try:
        yield
    except _Refusal as e:
        raise RowError(f"{where}: the chat template refuses the conversation: {e}.", "Fix the row.") from None


class Plain:
    """Prompt and completion without a template: one behind the other, tokenized apart, and the end of the text."""

    def __init__(self, tokenizer: Any):
        if tokenizer.eos_token_id is None:
            raise UserError("data.plain: the tokenizer has no token that ends a text.", "Give one that has.")
        self.tokenizer = tokenizer

    def prompt(self, messages: list[Message], tools: list[dict] | None, where: str) -> list[int]:
        from fastft.models.load import starts_twice

        if len(messages) > 1 or tools:
            raise RowError(f"{where}: without a chat template (data.plain) only one text can be asked.", "Fix the row.")
        text = messages[0]["content"]
        ids = self.tokenizer(text, verbose=False)["input_ids"]
        ids = ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids
        return ids[1:] if starts_twice(self.tokenizer, ids) else ids

    def end_of_turn(self) -> int:
        return self.tokenizer.eos_token_id

    def samples(self, where: str, conversation: Conversation) -> list[Sample]:
        if not conversation.plain:
            raise RowError(f"{where}: data.plain: true takes rows of prompt and completion, as text.", "Fix the row.")
        asked, answer = conversation.messages
        before = self.prompt([asked], None, where)
        after = self.tokenizer(answer["content"], add_special_tokens=False, verbose=False)["input_ids"]
        tokens = np.array([*before, *after, self.tokenizer.eos_token_id], np.int32)
        weights = np.full(len(tokens), conversation.weights[1], np.float32)
        weights[: len(before)] = 0
        return [Sample(tokens, weights)]
