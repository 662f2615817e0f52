"""Talk to a model that has a chat template, or was trained by task sft."""

import sys
from typing import Annotated

import typer

from fastft.errors import UserError
from fastft.streams import results_only


def run(
    model: Annotated[str, typer.Argument(help="Run folder, exported model folder, or hub id.")],
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the likeliest token.")] = 0.0,
) -> None:
    """Talk to a model that has a chat template, or was trained by task sft.

    A line is a message; the answer is written as it comes. /new begins anew, the end of the input (Ctrl-D) ends it;
    Ctrl-C ends an answer.
    """
    with results_only():
        from fastft.evaluate.predict import predictor

        ready = predictor(model, {"max_new_tokens": max_new_tokens, "temperature": temperature}, "sft")
    answer = getattr(ready, "answer", None)
    if answer is None:
        raise UserError(f"{model}: was not trained for conversations.", "fastft chat takes models of task sft.")
    messages: list[dict[str, str]] = []
    while (asked := _read()) is not None:
        if asked in ("", "/new"):
            messages = [] if asked else messages
            continue
        messages.append({"role": "user", "content": asked})
        said: list[str] = []

        def say(text: str, said: list[str] = said) -> None:
            said.append(text)
            print(text, end="", flush=True)

        try:
            answer(ready.prepare("chat", {"messages": messages, "system": system}), say)
        except KeyboardInterrupt:
            pass
        except UserError as e:  # it grew too long, or its template refuses it
            print(f"error: {e.message} /new begins anew.", file=sys.stderr)
            messages.pop()
            continue
        print()
        if "".join(said).strip():
            messages.append({"role": "assistant", "content": "".join(said)})
        else:
            print("no answer: the model ended at once; the message is taken back.", file=sys.stderr)
            messages.pop()


def _read() -> str | None:
    """A line, without blanks around it; None: there are no more."""
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    return line.strip() if line else None
