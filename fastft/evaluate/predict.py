"""`fastft predict`: labels or text from an exported model, a JSON object a line."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch

from fastft.config import Model
from fastft.errors import UserError
from fastft.models import load


def predict(
    path: str,
    rows: Iterable[tuple[str, str, str | None]],
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 17,
) -> Iterator[dict]:
    """One record per row, in order.

    Parameters
    ----------
    path : str
        An exported model folder, a run folder, or a hub id.
    rows : iterable of (where, text, second text or None)
    max_length : int, optional
        Classifiers: longer texts are cut to so many tokens, and say so; default: the model's limit, at most 1024, as in training.
    temperature : float
        0: the likeliest token; otherwise sampling at this temperature, at least 0.01 (causal models).

    Yields
    ------
    dict
        Classification: ``text``, ``label`` and ``scores`` (label -> probability; with several labels per text ``labels`` instead
        of ``label``), ``truncated`` when the text was cut to the model's limit. Causal models: ``text``, ``generated``.
    """
    if 0 < temperature < 0.01:
        raise UserError(f"temperature {temperature}: sampling below 0.01 overflows.", "0 takes the likeliest token.")
    if (Path(path) / "model" / "config.json").is_file():
        path = str(Path(path) / "model")
    settings = Model(path=path)
    model_config, tokenizer = load.config(settings), load.tokenizer(settings)
    kinds = model_config.architectures or ["(none)"]
    if "ForSequenceClassification" in kinds[0]:
        auto, run = "AutoModelForSequenceClassification", _classify
    elif "CausalLM" in kinds[0] or "LMHead" in kinds[0]:
        auto, run = "AutoModelForCausalLM", _generate
    else:
        raise UserError(
            f"model path {path}: {kinds[0]} is neither a classifier nor a causal language model.",
            "Give a model that fastft exported.",
        )
    model, _ = load.build(settings, auto, (), seed)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    rows = iter(rows)
    with torch.inference_mode():
        while chunk := list(islice(rows, batch_size)):
            if empty := [where for where, text, _ in chunk if not text.strip()]:
                raise UserError(f"{empty[0]}: the text is empty.", "Remove it, or give it some text.")
            yield from run(
                model,
                tokenizer,
                [text for _, text, _ in chunk],
                [pair for _, _, pair in chunk],
                max_length=max_length,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
            )


def _classify(
    model, tokenizer, texts: list[str], pairs: list[str | None], max_length: int | None, **_
) -> Iterator[dict]:
    limit = min(x for x in (load.length_limit(model.config), max_length or 1024) if x is not None)
    if None in pairs and any(pairs):
        raise UserError("Some rows have a second text and others none.", "Give every row one, or none.")
    both = (texts,) if None in pairs else (texts, pairs)
    encoded = tokenizer(*both, verbose=False)
    full = [len(ids) for ids in encoded["input_ids"]]
    segments = len(both) == 2 and load.takes(model, "token_type_ids")
    inputs = tokenizer(
        *both, padding=True, truncation=True, max_length=limit, return_tensors="pt", return_token_type_ids=segments
    ).to(model.device)
    logits = model(**inputs).logits.float()
    many = model.config.problem_type == "multi_label_classification"
    probabilities = (logits.sigmoid() if many else logits.softmax(-1)).cpu()
    names = model.config.id2label
    for text, length, row in zip(texts, full, probabilities.tolist(), strict=True):
        scores = {names[i]: p for i, p in sorted(enumerate(row), key=lambda pair: -pair[1])}
        record = {
            "text": text,
            **({"labels": [n for n, p in scores.items() if p > 0.5]} if many else {"label": next(iter(scores))}),
            "scores": scores,
        }
        yield {**record, "truncated": True} if length > limit else record


def _generate(
    model, tokenizer, texts: list[str], pairs: list[str | None], max_new_tokens: int, temperature: float, **_
) -> Iterator[dict]:
    if any(pair is not None for pair in pairs):
        raise UserError("A causal model continues one text.", "Leave --pair and --pair-column out.")
    tokenizer.padding_side = "left"
    inputs = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False).to(model.device)
    width, limit = inputs["input_ids"].shape[1], load.length_limit(model.config)
    if limit is not None and width + max_new_tokens > limit:
        raise UserError(
            f"The longest prompt ({width} tokens) and {max_new_tokens} new ones exceed the model's limit of {limit} positions.",
            "Shorten the prompt or lower --max-new-tokens.",
        )
    how = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    out = model.generate(**inputs, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id, **how)
    for text, row in zip(texts, out, strict=True):
        yield {"text": text, "generated": tokenizer.decode(row[width:], skip_special_tokens=True)}
