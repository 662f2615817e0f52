"""Small encoder-decoder models with random weights, and tokenizers trained on pairs of texts.

python benchmarks/pair_models.py marian|t5 ROWS.jsonl FOLDER   one of them, of the columns en and zh
"""

import json
import sys
from pathlib import Path

VOCABULARY = 6000


def build(kind: str, rows: list[dict], folder: Path) -> Path:
    """A Hugging Face folder: Marian (d_model 192, 3 + 3 layers) or T5 of the same sizes.

    Parameters
    ----------
    rows : list of dict
        ``en`` and ``zh``: what the tokenizer is trained on, as one text each.
    """
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    texts = [row[name] for row in rows for name in ("en", "zh")]
    tokenizer, model = (_marian if kind == "marian" else _t5)(texts, folder, torch)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _pieces(texts: list[str], folder: Path) -> Path:
    import sentencepiece

    prefix = folder / "pieces"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(prefix),
        vocab_size=VOCABULARY,
        hard_vocab_limit=False,
        character_coverage=1.0,
        minloglevel=2,
    )
    prefix.with_suffix(".vocab").unlink()
    return prefix.with_suffix(".model")


def _marian(texts, folder, torch):
    import sentencepiece
    from transformers import MarianConfig, MarianMTModel, MarianTokenizer

    source = _pieces(texts, folder).rename(folder / "source.spm")
    (folder / "target.spm").write_bytes(source.read_bytes())
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(source))
    names = ["</s>", "<unk>", *(pieces.id_to_piece(i) for i in range(3, len(pieces))), "<pad>"]
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    files = {"source_spm": source, "target_spm": folder / "target.spm", "vocab": folder / "vocab.json"}
    tokenizer = MarianTokenizer(**{name: str(file) for name, file in files.items()}, source_lang="en", target_lang="zh")
    pad = len(names) - 1
    sizes = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in (("layers", 3), ("ffn_dim", 768))}
    heads = {f"{part}_attention_heads": 4 for part in ("encoder", "decoder")}
    torch.manual_seed(0)
    config = MarianConfig(
        vocab_size=len(names),
        d_model=192,
        **sizes,
        **heads,
        max_position_embeddings=128,
        scale_embedding=True,
        dropout=0.1,
        pad_token_id=pad,
        decoder_start_token_id=pad,
        eos_token_id=0,
        forced_eos_token_id=0,
    )
    return tokenizer, MarianMTModel(config)


def _t5(texts, folder, torch):
    import sentencepiece
    from transformers import T5Config, T5ForConditionalGeneration, T5Tokenizer

    path = _pieces(texts, folder)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
    vocabulary = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(3, len(pieces))]
    path.unlink()
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    tokenizer = T5Tokenizer(vocab=special + vocabulary, extra_ids=0, additional_special_tokens=[])
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=192,
        d_kv=48,
        d_ff=768,
        num_layers=3,
        num_heads=4,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return tokenizer, T5ForConditionalGeneration(config)


if __name__ == "__main__":
    with open(sys.argv[2]) as file:
        build(sys.argv[1], [json.loads(line) for line in file], Path(sys.argv[3]))
