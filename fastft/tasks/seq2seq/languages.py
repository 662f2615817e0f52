"""Language codes of tokenizers that write one into every text (mBART, mBART-50, NLLB, M2M100, PLBart)."""

from __future__ import annotations

from typing import Any

from fastft.errors import UserError, did_you_mean


def takes_codes(tokenizer: Any) -> bool:
    """Whether a tokenizer writes language codes."""
    return hasattr(tokenizer, "set_src_lang_special_tokens") and hasattr(tokenizer, "tgt_lang")


def set_codes(tokenizer: Any, source: str | None, target: str | None) -> None:
    """Have a tokenizer write these languages' codes, here and in whatever it is exported to; None: its own.

    Raises UserError for codes that it does not know, for a tokenizer that writes none, and where one is needed.
    """
    if not takes_codes(tokenizer):
        if source is not None or target is not None:
            raise UserError(
                f"data.source_lang, data.target_lang: {type(tokenizer).__name__} writes no language codes.",
                'Remove them; a model that is told its language by text has it in data.source_prefix (">>fra<< ").',
            )
        return
    known = known_codes(tokenizer)
    for key, code in (("source_lang", source), ("target_lang", target)):
        if code is not None and code not in known:
            raise UserError(f"data.{key}: {code!r} is no language of this tokenizer.", did_you_mean(code, known))
    if target is None and tokenizer.tgt_lang is None:
        raise UserError(
            f"data.target_lang: {type(tokenizer).__name__} writes the target's language into every text.",
            f"Give its code, and the source's (data.source_lang). {did_you_mean('', known)}",
        )
    for name, code in (("src_lang", source), ("tgt_lang", target)):
        if code is not None:
            setattr(tokenizer, name, code)
            tokenizer.init_kwargs[name] = code  # which save_pretrained writes


def codes(tokenizer: Any) -> tuple[str | None, str | None]:
    """Codes of source and target; None: the tokenizer writes none."""
    return (tokenizer.src_lang, tokenizer.tgt_lang) if takes_codes(tokenizer) else (None, None)


def known_codes(tokenizer: Any) -> list[str]:
    """What a tokenizer takes for a language: its own list, or its special tokens of such a form (``eng_Latn``)."""
    listed = getattr(tokenizer, "lang_code_to_id", None)
    if listed:
        unknown = tokenizer.unk_token_id
        return sorted(code for code, i in listed.items() if i is not None and i != unknown)
    named = getattr(tokenizer, "additional_special_tokens", None) or getattr(tokenizer, "extra_special_tokens", None)
    return sorted(token for token in map(str, named or []) if token.replace("_", "").isalpha())
