"""Rows of instruction data, in the forms that are about, as conversations of one form: OpenAI's messages."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from fastft.data.encoder import RowError, check_text
from fastft.data.formats import Record
from fastft.data.formats.base import Unreadable

Message = dict[str, Any]

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
HEAVIEST = 1000  # weight of an answer
CALLS = ("function_call", "tool_call")  # ShareGPT's roles of an answer that is nothing but a call
FORMS = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
}
NAMES = ("messages", "conversations", "prompt", "completion", "instruction", "input", "output", "system", "history")
KNOWN = (*NAMES, "tools")
KNOWN_FORMS = (
    "A row has messages (a list of role and content), conversations (of from and value), prompt and completion, or "
    "instruction and output. Name other columns in data.columns: {prompt: question, completion: answer}."
)


@dataclass(frozen=True)
class Conversation:
    """Messages as chat templates take them.

    Attributes
    ----------
    messages : list of dict
        ``role`` (system, developer, user, assistant, tool), ``content`` (text) and what else the row says:
        ``tool_calls``, ``reasoning_content``, ``name``, ``tool_call_id``.
    tools : list of dict, optional
        JSON schemas of the functions that may be called.
    weights : list of float
        How much each message counts in the loss: 0 for all that are no answers.
    plain : bool
        One prompt and one completion, as text.
    """

    messages: list[Message]
    tools: list[dict] | None = None
    weights: list[float] = field(default_factory=list)
    plain: bool = False

    @property
    def trained(self) -> list[int]:
        """Indices of the messages that are learned."""
        return [i for i, weight in enumerate(self.weights) if weight]


def read(where: str, record: Record, columns: dict[str, str], train_on: str) -> Conversation:
    """The conversation of a row.

    Parameters
    ----------
    columns : dict of str
        Our name of a column -> its name in the data, where that differs.
    train_on : {"all", "last"}
        Which answers are learned.

    Raises
    ------
    RowError
        The row has none of the forms, or is no conversation: what is wrong with which message.
    """
    row = {name: record[theirs] for name in KNOWN if (theirs := columns.get(name, name)) in record}
    row = {name: value for name, value in row.items() if value is not None}
    for name, value in row.items():
        if isinstance(value, Unreadable):
            raise RowError(f"{where}: column {columns.get(name, name)!r} cannot be read: {value.reason}.", "Fix it.")
    form = next((name for name, needed in FORMS.items() if all(column in row for column in needed)), None)
    if form is None:
        raise RowError(f"{where}: no conversation; its columns: {', '.join(record) or 'none'}.", KNOWN_FORMS)
    messages = messages_of(where, _as_list(where, row, form), row.get("system"))
    weights = [message.pop("weight", 0.0) * (message["role"] == "assistant") for message in messages]
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=None)
    if last is None:
        raise RowError(f"{where}: the conversation has no answer (assistant).", "There is nothing to learn; remove it.")
    if train_on == "last":
        weights = [weight if i == last else 0.0 for i, weight in enumerate(weights)]
    plain = form == "prompt" and isinstance(row["prompt"], str) and "tools" not in row and len(messages) == 2
    return Conversation(messages, tools_of(where, row.get("tools")), weights, plain)


def messages_of(where: str, raw: list[Any], system: Any = None) -> list[Message]:
    """Messages in one form, each with its ``weight``, behind a system message where there is none. Raises RowError."""
    messages = [_message(where, number, one) for number, one in enumerate(raw, 1)]
    if system and not any(message["role"] == "system" for message in messages):
        check_text(where, "system", system)
        messages.insert(0, {"role": "system", "content": system})
    _check_order(where, messages)
    return messages


def _as_list(where: str, row: dict[str, Any], form: str) -> list[Any]:
    """The messages as the row writes them."""
    if form in ("messages", "conversations"):
        found = row[form]
        if isinstance(found, str):
            found = _json(where, form, found)
        if not isinstance(found, list):
            raise RowError(f"{where}: {form} is a {type(found).__name__}, not a list of messages.", "Fix the row.")
        return found
    if form == "prompt":
        first, then = row["prompt"], row["completion"]
        return [
            *(first if isinstance(first, list) else [{"role": "user", "content": first}]),
            *(then if isinstance(then, list) else [{"role": "assistant", "content": then}]),
        ]
    found, history = [], row.get("history") or []
    if not isinstance(history, list):
        raise RowError(f"{where}: history is a {type(history).__name__}, not a list of pairs.", "Fix the row.")
    for turn in history:
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise RowError(f"{where}: history holds {turn!r}, not pairs of instruction and answer.", "Fix the row.")
        found += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    for name in ("instruction", "input"):
        if name in row:
            check_text(where, name, row[name])
    asked = "\n\n".join(part for part in (row["instruction"], row.get("input", "")) if part)
    return [*found, {"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]


def _message(where: str, number: int, raw: Any) -> Message:
    here = f"{where}: message {number}"
    if not isinstance(raw, dict):
        raise RowError(f"{here} is a {type(raw).__name__}, not a role and a content.", KNOWN_FORMS)
    raw = {name: value for name, value in raw.items() if value is not None}
    said = raw.get("role", raw.get("from"))
    content = raw.get("content", raw.get("value"))
    if not isinstance(said, str) or said.lower() not in ROLES:
        raise RowError(f"{here}: unknown role {said!r}.", f"Known: {', '.join(ROLES)}.")
    said, role = said.lower(), ROLES[said.lower()]
    more = {k: v for k, v in raw.items() if k not in ("role", "from", "content", "value", "weight", "train")}
    if said in CALLS:
        more["tool_calls"], content = _calls(here, content), ""
    elif "tool_calls" in more:
        more["tool_calls"] = _calls(here, more["tool_calls"])
    if isinstance(content, list):
        content = _text_parts(here, content)
    if content is None and (more.get("tool_calls") or more.get("reasoning_content")):
        content = ""
    check_text(here, "content", content)
    nothing = not str(content).strip() and not more.get("tool_calls") and not more.get("reasoning_content")
    if role == "assistant" and nothing:
        raise RowError(f"{here}: the answer is empty.", "Remove the conversation, or write what is to be answered.")
    return {"role": role, "content": content, **more, "weight": _weight(here, raw)}


def _weight(here: str, raw: dict[str, Any]) -> float:
    weight, train = raw.get("weight", 1.0), raw.get("train", True)
    if not isinstance(train, bool):
        raise RowError(f"{here}: train {train!r}.", "It is true or false; false leaves the answer out.")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= HEAVIEST:
        raise RowError(
            f"{here}: weight {weight!r}.", f"A weight is a number from 0 to {HEAVIEST:,}; 0 leaves the answer out."
        )
    return float(weight) * train


def _text_parts(here: str, parts: list[Any]) -> str:
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise RowError(f"{here}: its content has a part of type {kind!r}.", "Only text can be trained.")
    return "".join(part["text"] for part in parts)


def _calls(here: str, calls: Any) -> list[dict]:
    """Tool calls as OpenAI writes them, their arguments as mappings, which chat templates expect."""
    calls = _json(here, "tool_calls", calls) if isinstance(calls, str) else calls
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"{here}: a tool call without a function's name: {call!r}.", "Fix the row.")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _json(here, "arguments", arguments)
        more = {"id": call["id"]} if "id" in call else {}
        found.append({**more, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return found


def tools_of(where: str, tools: Any) -> list[dict] | None:
    """Tools as chat templates take them, of a list or its JSON. Raises RowError."""
    if isinstance(tools, str):
        tools = _json(where, "tools", tools) if tools.strip() else None
    if not tools:
        return None
    found = [tool.get("function", tool) if isinstance(tool, dict) else None for tool in _as_tools(tools)]
    if not all(isinstance(function, dict) and isinstance(function.get("name"), str) for function in found):
        raise RowError(f"{where}: tools are no list of JSON schemas of functions, each with a name.", "Fix the row.")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def _as_tools(tools: Any) -> list[Any]:
    return tools if isinstance(tools, list) else [None]


def _json(where: str, name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise RowError(f"{where}: {name} is broken JSON: {e}.", "Fix the row.") from None


def _check_order(where: str, messages: list[Message]) -> None:
    before = None
    for number, message in enumerate(messages, 1):
        role = message["role"]
        if role in ("system", "developer") and before not in (None, "system", "developer"):
            raise RowError(f"{where}: message {number}: a {role} message after others.", "It comes first; fix the row.")
        if role == "assistant" and before is None:
            raise RowError(
                f"{where}: message {number}: the conversation begins with an answer.",
                "Nothing was asked; remove that message, or put a user's before it.",
            )
        if role == "tool" and before not in ("tool", "assistant"):
            raise RowError(
                f"{where}: message {number}: a tool's result that no call comes before.", "Fix the row's order."
            )
        before = role
