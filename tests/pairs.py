"""Pairs of sentences in four scripts, and small encoder-decoder models with tokenizers of their own families."""

import json
from pathlib import Path

import vocabularies

WORDS = {
    "the cat": ("die Katze", "猫", "ねこ", "القطة"),
    "the dog": ("der Hund", "狗", "いぬ", "الكلب"),
    "a bird": ("ein Vogel", "鸟", "とり", "طائر"),
    "my friend": ("mein Freund", "我的朋友", "ともだち", "صديقي"),
}
VERBS = {
    "sleeps": ("schläft", "睡觉", "ねます", "ينام"),
    "drinks water": ("trinkt Wasser", "喝水", "みずをのみます", "يشرب الماء"),
    "sees the house": ("sieht das Haus", "看见房子", "いえをみます", "يرى البيت"),
    "reads a long book today": (
        "liest heute ein langes Buch",
        "今天读一本很长的书",
        "きょうながいほんをよみます",
        "يقرأ كتابا طويلا اليوم",
    ),
}
LANGUAGES = ("de", "zh", "ja", "ar")
JOINED = {"de": "{} {}.", "zh": "{}{}。", "ja": "{}は{}。", "ar": "{} {}."}
CODES_NLLB = {"en": "eng_Latn", "de": "deu_Latn", "zh": "zho_Hans", "ja": "jpn_Jpan", "ar": "arb_Arab"}
CODES = {"en": "en_XX", "de": "de_DE", "zh": "zh_CN", "ja": "ja_XX", "ar": "ar_AR"}


def rows() -> list[dict]:
    """Sixteen rows of ``en`` and the four languages."""
    return [
        {"en": f"{noun} {verb}.", **{code: JOINED[code].format(nouns[i], verbs[i]) for i, code in enumerate(LANGUAGES)}}
        for noun, nouns in WORDS.items()
        for verb, verbs in VERBS.items()
    ]


def spoken(kind: str, target: str = "zh") -> dict[str, str]:
    """Languages of a run, of families that write their codes."""
    if not kind.startswith(("mbart", "nllb")):
        return {}
    codes = CODES_NLLB if kind == "nllb" else CODES
    return {"source_lang": codes["en"], "target_lang": codes[target]}


def write(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


def texts() -> list[str]:
    return [text for row in rows() for text in row.values()]


def model_of(kind: str, folder: Path, **changes) -> Path:
    """A model with random weights and without dropout, and its tokenizer, as a Hugging Face folder: "t5", "bart",
    "marian", "mbart", "mbart50" or "nllb".

    ``changes``: of its config.
    """
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, config, cls = MAKERS[kind](folder)
    torch.manual_seed(0)
    for name, value in changes.items():
        setattr(config, name, value)
    model = cls(config).eval()
    with torch.no_grad():  # of some size, as trained weights are: random outputs that differ from row to row
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(1.5 if kind == "t5" else 10)
    if kind == "bart":
        model.final_logits_bias.normal_()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


SIZES = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
}


def _unigram(special: list[str]) -> list[tuple[str, float]]:
    """Pieces of the texts and their scores, behind special tokens."""
    return [(token, 0.0) for token in special] + vocabularies.unigram(texts(), 260)


def _t5(folder):
    from transformers import T5Config, T5ForConditionalGeneration, T5Tokenizer

    tokenizer = T5Tokenizer(vocab=_unigram(["<pad>", "</s>", "<unk>"]), extra_ids=0, additional_special_tokens=[])
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=16,
        d_ff=48,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return tokenizer, config, T5ForConditionalGeneration


def _bart(folder):
    from tokenizers import ByteLevelBPETokenizer, processors
    from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    bpe.train_from_iterator(texts(), vocab_size=420, special_tokens=special, show_progress=False)
    bpe._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **names)
    config = BartConfig(vocab_size=len(tokenizer), **SIZES, pad_token_id=1, bos_token_id=0, eos_token_id=2)
    return tokenizer, config, BartForConditionalGeneration


def _marian(folder):
    import sentencepiece
    from transformers import MarianConfig, MarianMTModel, MarianTokenizer

    lines = iter(texts())
    model = folder / "source"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_prefix=str(model), vocab_size=240, hard_vocab_limit=False, minloglevel=2
    )
    spm = model.with_suffix(".model").rename(folder / "source.spm")
    model.with_suffix(".vocab").unlink()
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(spm))
    names = ["</s>", "<unk>", *(pieces.id_to_piece(i) for i in range(3, len(pieces))), ">>deu<<", "<pad>"]
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    (folder / "target.spm").write_bytes(spm.read_bytes())
    files = {"source_spm": spm, "target_spm": folder / "target.spm", "vocab": folder / "vocab.json"}
    tokenizer = MarianTokenizer(**{name: str(file) for name, file in files.items()}, source_lang="en", target_lang="de")
    pad = len(names) - 1
    config = MarianConfig(
        vocab_size=len(names),
        **SIZES,
        pad_token_id=pad,
        decoder_start_token_id=pad,
        eos_token_id=0,
        forced_eos_token_id=0,
    )
    return tokenizer, config, MarianMTModel


def _mbart(folder, fifty: bool = False):
    from transformers import MBart50Tokenizer, MBartConfig, MBartForConditionalGeneration, MBartTokenizer

    vocab = _unigram(["<s>", "<pad>", "</s>", "<unk>"]) + [(code, 0.0) for code in CODES.values()] + [("<mask>", 0.0)]
    kind = MBart50Tokenizer if fifty else MBartTokenizer
    tokenizer = kind(vocab=vocab, src_lang="en_XX", tgt_lang="de_DE")
    config = MBartConfig(vocab_size=len(tokenizer), **SIZES, pad_token_id=1, bos_token_id=0, eos_token_id=2)
    if fifty:
        config.decoder_start_token_id = 2
    return tokenizer, config, MBartForConditionalGeneration


def _nllb(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import M2M100Config, M2M100ForConditionalGeneration, NllbTokenizer

    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trained.train_from_iterator(
        texts(), trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    codes = [CODES_NLLB[name] for name in CODES]
    vocab = {**model["vocab"], **{code: len(model["vocab"]) + i for i, code in enumerate(codes)}}
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = NllbTokenizer(
        vocab=vocab, merges=merges, src_lang="eng_Latn", tgt_lang="deu_Latn", extra_special_tokens=codes
    )
    sizes = {**SIZES, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}
    config = M2M100Config(vocab_size=len(tokenizer), **sizes, pad_token_id=1, bos_token_id=0, eos_token_id=2)
    return tokenizer, config, M2M100ForConditionalGeneration


MAKERS = {
    "nllb": _nllb,
    "t5": _t5,
    "bart": _bart,
    "marian": _marian,
    "mbart": _mbart,
    "mbart50": lambda folder: _mbart(folder, fifty=True),
}
