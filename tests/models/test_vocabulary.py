"""New tokens for a domain: which, in which tokenizers, with which rows; and what trains on them."""

import json
from collections import Counter

import pytest
import torch
import transformers
import vocabularies

import launch
from fastft import config as configuration
from fastft import track
from fastft.errors import UserError
from fastft.models import vocabulary
from fastft.train import loop

WORDS = ["carcinoma", "lymphadenopathy", "thrombocytopenia", "patient", "with", "and"]
TEXTS = [" ".join(WORDS[(i * 5 + j * j) % 6] for j in range(30)) + f". Case {i}." for i in range(20)]


def pieces_of(extension, token: str) -> list[str]:
    return extension.tokens.get(token, [token])


@pytest.fixture(scope="module")
def bert(tmp_path_factory, corpus):
    """A masked language model with a WordPiece tokenizer, and an output bias."""
    wordpiece = vocabularies.word_pieces([(corpus / "train.jsonl").read_text()], 600)
    folder = tmp_path_factory.mktemp("bert")
    transformers.BertTokenizerFast(tokenizer_object=wordpiece._tokenizer).save_pretrained(folder)
    shape = {"vocab_size": 600, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(transformers.BertConfig(**shape, intermediate_size=32))
    torch.nn.init.normal_(model.cls.predictions.bias)
    model.save_pretrained(folder)
    return folder


def test_bpe_goes_on_as_it_was_trained(tiny_llama, tmp_path):
    """A new token stands for exactly the old ids, its row is their mean, and other texts are cut as before."""
    old = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    found = vocabulary.chosen(old, TEXTS, 40, 3)
    assert 20 < len(found.tokens) <= 40 and "Ġcarcinoma" in found.tokens and len(found.merges) == len(found.tokens)
    vocabulary.save(str(tiny_llama), tmp_path / "out", old, found, TEXTS)
    new = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(new) == len(old) + len(found.tokens)
    counts = Counter()
    for text in [*TEXTS, "Something else altogether: 12 carcinomas!", "Ωmega \n\n  carcinoma"]:
        ids = new(text)["input_ids"]
        assert new.decode(ids) == text
        tokens = new.convert_ids_to_tokens(ids)
        counts.update(tokens)
        assert [p for t in tokens for p in pieces_of(found, t)] == old.tokenize(text)
    plain = "def f(x): return x"
    assert new(plain)["input_ids"] == old(plain)["input_ids"]
    assert found.before == sum(len(old(text)["input_ids"]) for text in TEXTS)
    assert found.after == sum(len(new(text)["input_ids"]) for text in TEXTS) < 0.7 * found.before
    assert found.characters == sum(map(len, TEXTS))
    before, after = (transformers.AutoModelForCausalLM.from_pretrained(f) for f in (tiny_llama, tmp_path / "out"))
    assert after.config.vocab_size == len(new) and after.lm_head.weight.shape[0] == len(new)
    for kind in ("get_input_embeddings", "get_output_embeddings"):
        rows, table = getattr(before, kind)().weight, getattr(after, kind)().weight
        assert torch.equal(table[: len(old)], rows)
        for token, parts in found.tokens.items():
            wanted = rows[old.convert_tokens_to_ids(parts)].mean(0)
            assert torch.allclose(table[new.convert_tokens_to_ids(token)], wanted)
    ids = torch.tensor([old(plain)["input_ids"]])
    assert torch.equal(before.eval()(ids).logits, after.eval()(ids).logits[..., : len(old)])


def test_wordpiece_takes_whole_words_and_the_bias_of_a_head(bert, tmp_path):
    old = transformers.AutoTokenizer.from_pretrained(bert)
    found = vocabulary.chosen(old, TEXTS, 3, 3)
    saved = {word: sum(text.count(word) for text in TEXTS) * (len(old.tokenize(word)) - 1) for word in WORDS}
    assert list(found.tokens) == sorted(saved, key=saved.get, reverse=True)[:3] and "carcinoma" in found.tokens
    vocabulary.save(str(bert), tmp_path / "out", old, found, TEXTS)
    new = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert new.tokenize("Carcinoma with thrombocytopenia") == ["carcinoma", *old.tokenize("with"), "thrombocytopenia"]
    assert found.after == sum(len(new.tokenize(text)) for text in TEXTS) < found.before
    before, after = (transformers.AutoModelForMaskedLM.from_pretrained(f) for f in (bert, tmp_path / "out"))
    old_ids = old.convert_tokens_to_ids(found.tokens["carcinoma"])
    for name in ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias"):
        rows, table = before.get_parameter(name), after.get_parameter(name)
        assert torch.allclose(table[new.convert_tokens_to_ids("carcinoma")], rows[old_ids].mean(0))
        assert torch.equal(table[: len(old)], rows)


def test_rows_that_no_token_had_are_taken_first(tiny_llama, tmp_path):
    """An embedding that is longer than the vocabulary, as some models' are."""
    old = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.resize_token_embeddings(len(old) + 64, mean_resizing=False)
    found = vocabulary.chosen(old, TEXTS, 10, 3)
    vocabulary.extended(model, old, found)
    table = model.get_input_embeddings().weight
    assert len(table) == len(old) + 64
    parts = old.convert_tokens_to_ids(next(iter(found.tokens.values())))
    assert torch.allclose(table[len(old)], table[parts].mean(0))


def test_the_command_and_training_on_what_it_wrote(lm_config, tiny_llama, tmp_path):
    for name, rows in (("train", TEXTS[:16]), ("eval", TEXTS[16:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"body": row}) + "\n" for row in rows))
    (tmp_path / "words.txt").write_text("carcinoma\nlymphadenopathy\n")
    texts = ("--from", f"{tmp_path}/tr*.jsonl", "--column", "body")
    arguments = ("extend-vocabulary", tiny_llama, tmp_path / "out", *texts)
    said = launch.fastft(*arguments, "--tokens", tmp_path / "words.txt", "--json")[1]
    found = json.loads(said[said.index("{") :])
    assert "Ġlymphadenopathy" in found["tokens"] and len(found["tokens"]) > 10
    assert found["tokens_per_character"]["after"] < 0.8 * found["tokens_per_character"]["before"]
    code, said = launch.fastft(*arguments, check=False)
    assert code == 1 and "is there already" in said
    said = launch.fastft("extend-vocabulary", tiny_llama, tmp_path / "two", *texts, "--count", 30)[1]
    assert "30 new tokens: 0." in said
    lm_config["data"] |= {"train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "eval.jsonl"), "text": "body"}
    lm_config["model"] = {"path": str(tmp_path / "two"), "lora": {"r": 4, "train": ["*embed_tokens*", "lm_head*"]}}
    loop.train(configuration.validate(lm_config))
    end = track.read(tmp_path / "run")[-1]
    new = transformers.AutoTokenizer.from_pretrained(tmp_path / "two")
    assert end["eval"]["eval"]["tokens"] == sum(len(new(text)["input_ids"]) for text in TEXTS[16:])


def test_what_cannot_be_extended(tiny_llama, bert, tmp_path):
    from tokenizers import Tokenizer, models

    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    unigram = transformers.PreTrainedTokenizerFast(tokenizer_object=unigram)
    with pytest.raises(UserError, match="this one is Unigram"):
        vocabulary.chosen(unigram, TEXTS, 5, 1)
    whole = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(UserError, match="this one is BPE of whole texts"):
        vocabulary.chosen(whole, TEXTS, 5, 1)
    llama, wordpiece = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (tiny_llama, bert))
    with pytest.raises(UserError, match="no new token stands 1000 times or more"):
        vocabulary.chosen(llama, TEXTS, 5, 1000)
    with pytest.raises(UserError, match="'and' is a token already"):
        vocabulary.of_words(wordpiece, ["and"], TEXTS)
    with pytest.raises(UserError, match="'two words' is no word to this tokenizer"):
        vocabulary.of_words(llama, ["two words"], TEXTS)
