import json
import re

import jobs
import numpy as np
import pytest
import seqeval.metrics
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import launch
from fastft import config as configuration
from fastft import track
from fastft.errors import UserError
from fastft.evaluate.metrics import evaluate_model
from fastft.evaluate.predict import predict, predictor
from fastft.tasks.token_classification import alignment, schemes

TRAIN = [
    {"tokens": ["Angela", "Merkel", "visited", "Paris"], "tags": ["B-PER", "I-PER", "O", "B-LOC"]},
    {"tokens": ["Siemens", "is", "in", "Munich"], "tags": ["B-ORG", "O", "O", "B-LOC"]},
    {"tokens": ["\u200d", "Alan", "", "Turing", "spoke"], "tags": ["O", "B-PER", "O", "B-PER", "O"]},
]


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


@pytest.fixture
def config(tmp_path, tiny_bert) -> dict:
    train = write(tmp_path / "train.jsonl", TRAIN)
    return {
        "task": "token_classification",
        "model": {"path": str(tiny_bert)},
        "data": {"train": train, "eval": {"dev": train}, "max_length": 48},
        "batch": {"size": 3},
        "optim": {"lr": 3e-3},
        "train": {"steps": 3, "log_every": 1},
        "run": {"dir": str(tmp_path / "run"), "offline": True, "device": "cpu", "threads": 1},
    }


def rows(config, tmp_path, rows, **data):
    config["data"] |= {"train": write(tmp_path / "rows.jsonl", rows), "eval": {}, **data}
    return jobs.task_of(config)


def trained_on(texts, tokenizer, trainer, **special):
    tokenizer.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def targets_by_word(task, split, sample):
    """(word, labels of its tokens) of one sample."""
    labels = jobs.collate(task, split, [sample]).labels[0].tolist()
    words = split.data["words"][sample].tolist()
    found = {}
    for word, label in zip(words, labels, strict=False):
        found.setdefault(word, []).append(label)
    assert set(found.pop(-1, [-100])) == {-100}
    return found


# -- which tokens have a target


def test_first_token_of_a_word_or_all_with_inside_tags(config):
    """Trap: only the first piece of a word is labelled, or all with B- turned into I-."""
    task = jobs.task_of(config)
    split = task.train_split()
    names = task.learned(split)["labels"]
    assert names == ["O", "B-LOC", "B-ORG", "B-PER", "I-PER"] and split.data.meta["scheme"] == "iob2"
    found = targets_by_word(task, split, 0)
    assert all(len(labels) > 1 and set(labels[1:]) == {-100} for word, labels in found.items() if word < 2)
    assert [names[labels[0]] for labels in found.values()] == TRAIN[0]["tags"]
    assert split.targets.tolist() == [4, 4, 4]  # a target per word that has a token
    config["data"]["label_pieces"] = "all"
    task = jobs.task_of(config)
    split = task.train_split()
    names = task.learned(split)["labels"]
    assert names == ["O", "B-LOC", "B-ORG", "B-PER", "I-LOC", "I-ORG", "I-PER"]
    first, paris = (targets_by_word(task, split, 0)[word] for word in (0, 3))
    assert [names[i] for i in first] == ["B-PER"] + ["I-PER"] * (len(first) - 1) and names[paris[-1]] == "I-LOC"
    assert split.targets[0] == split.lengths[0]


def test_words_without_tokens_shift_nothing(config, minilm, caplog):
    """A control character and an empty string have no token: the words after them keep their own tags."""
    config["model"]["path"] = minilm
    task = jobs.task_of(config)
    split = task.train_split()
    names = task.learned(split)["labels"]
    found = targets_by_word(task, split, 2)
    assert {word: names[labels[0]] for word, labels in found.items()} == {1: "B-PER", 3: "B-PER", 4: "O"}
    assert split.data.meta["counts"]["words_without_tokens"] == 2 and "words without tokens" in caplog.text


def test_sentencepiece_by_word_ids(config, tmp_path):
    """Trap: a lone mark of the word's beginning is the word's first token."""
    letters = sorted({letter for row in TRAIN for word in row["tokens"] for letter in word if letter.isalpha()})
    pieces = {"<pad>": 0, "<unk>": 0, "\u2581": -2, "\u2581Angela": -1, "Merkel": -1, **dict.fromkeys(letters, -3)}
    unigram = Tokenizer(models.Unigram(list(pieces.items()), unk_id=1))
    unigram.pre_tokenizer, unigram.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=unigram, pad_token="<pad>", unk_token="<unk>")
    tokenizer.save_pretrained(tmp_path / "sp")
    config["model"]["tokenizer"] = str(tmp_path / "sp")
    task = jobs.task_of(config)
    split = task.train_split()
    names = task.learned(split)["labels"]
    assert [names[labels[0]] for labels in targets_by_word(task, split, 0).values()] == TRAIN[0]["tags"]
    pieces = task.tokenizer.convert_ids_to_tokens(split.data["tokens"][0])
    assert [piece for piece in pieces if len(piece) > 1 or piece == "\u2581"] == [
        "\u2581Angela",
        *("\u2581", "Merkel"),
        *("\u2581", "\u2581"),
    ]


# -- byte-level tokenizers


def byte_level(kind, texts, folder):
    """A GPT-2, RoBERTa or Qwen tokenizer, small and without add_prefix_space."""
    bpe = Tokenizer(models.BPE())
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind != "qwen")
    split = pre_tokenizers.Split(Regex(r" ?[^\s]+|\s+"), behavior="isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, plain]) if kind == "qwen" else plain
    bpe.normalizer = normalizers.NFC() if kind == "qwen" else None
    bpe.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    made = trained_on(texts, bpe, trainer, pad_token="<pad>", eos_token="<|endoftext|>")
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    if kind == "roberta":
        made = transformers.RobertaTokenizerFast(vocab=model["vocab"], merges=merges)
    elif kind == "qwen":
        made = transformers.Qwen2Tokenizer(vocab=model["vocab"], merges=merges, pad_token="<pad>")
    made.save_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["gpt2", "roberta", "qwen"])
def test_byte_level_words_get_their_space(tmp_path, kind):
    """Trap: words of a list must become the tokens that they are in running text; and after an export too."""
    texts = ["the cat doesn't see the dog on the mat"] * 20
    tokenizer = byte_level(kind, texts, tmp_path / "old")
    words = texts[0].split()
    expected = tokenizer(" " + texts[0], add_special_tokens=False)["input_ids"]

    def ids(tok):
        return tok(words, is_split_into_words=True, add_special_tokens=False)["input_ids"]

    assert ids(tokenizer) != expected
    fixed = alignment.for_words(tokenizer, "x")
    assert ids(fixed) == expected
    fixed.save_pretrained(tmp_path / "new")
    transformers.AutoConfig.for_model("qwen2" if kind == "qwen" else kind).save_pretrained(tmp_path / "new")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "new")
    assert ids(alignment.for_words(again, "x")) == expected  # as fastft loads it
    if kind == "qwen":  # transformers 5 rebuilds this class and passes over the normalizer in tokenizer.json
        again = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "new")
    assert ids(again) == expected and alignment.for_words(again, "x") is again
    assert fixed.pad_token == again.pad_token == "<pad>"


def test_slow_tokenizers_are_refused():
    slow = transformers.CanineTokenizer()
    with pytest.raises(UserError, match="needs a fast tokenizer"):
        alignment.for_words(slow, "canine")


# -- schemes


@pytest.mark.parametrize(
    "scheme, tags",
    [
        ("iob2", "B-P I-P O B-L B-L"),
        ("iob1", "I-P I-P O I-L B-L"),
        ("bioes", "B-P E-P O S-L S-L"),
        ("bioes", "B-P L-P O U-L U-L"),
        ("raw", "P P O L L"),
    ],
)
def test_schemes_are_detected_and_give_the_same_entities(config, tmp_path, scheme, tags):
    """Trap: IOB1, BIOES, BILOU, and raw tags, in which neighbors of one type are one entity."""
    tags = tags.split()
    task = rows(config, tmp_path, [{"tokens": list("abcde"), "tags": tags}])
    assert task.learned(task.train_split())["scheme"] == scheme
    last = [("L", 3, 5)] if scheme == "raw" else [("L", 3, 4), ("L", 4, 5)]
    assert schemes.entities(tags, scheme) == [("P", 0, 2), *last]
    assert schemes.scores([tags], [tags], scheme) == {"precision": 1.0, "recall": 1.0, "f1": 1.0}


def test_invalid_sequences_are_read_as_seqeval_reads_them():
    assert schemes.entities(["O", "I-P", "I-L", "I-L"], "iob2") == [("P", 1, 2), ("L", 2, 4)]
    assert schemes.scores([["O", "B-P"]], [["O", "I-P"]], "iob2")["f1"] == 1.0


@pytest.mark.parametrize(
    "tags, data, part",
    [
        (["B-P", "LOC"], {}, "others have none: LOC.*data.scheme: raw"),
        (["B-P", "0"], {}, r"rows.jsonl:1: tag '0' is the digit 0, not the letter O"),
        (["B-P"], {}, "rows.jsonl:1: 2 tokens, but 1 tags"),
        (["B-P", None], {}, "rows.jsonl:1: tag 2 is no tag"),
        ([1, 0], {}, r"tag 1 is the number 1.*data.labels: \[O"),
        ([2, 0], {"labels": ["O", "P"]}, "data.labels names 2 tags"),
        (["B-P", "O"], {"tokens": "words"}, "no column 'words'.*data.tokens"),
        ("B-P O", {}, "holds str, not a list"),
        (["O", "O"], {}, "same tag 'O'"),
        (["P", "O"], {"scheme": "iob2"}, "the tag 'P' has no prefix"),
    ],
)
def test_bad_rows_name_file_and_line(config, tmp_path, tags, data, part):
    """Traps: the letter O and the digit 0 among them."""
    task = rows(config, tmp_path, [{"tokens": ["a", "b"], "tags": tags}], **data)
    with pytest.raises(UserError) as e:
        task.learned(task.train_split())
    assert re.search(part, str(e.value), re.DOTALL)


def test_all_bad_rows_are_counted(config, tmp_path):
    bad = [{"tokens": ["a", "b"], "tags": tags} for tags in (["O"], ["O", None], "O O")]
    with pytest.raises(UserError, match=r"rows.jsonl:2: 2 tokens, but 1 tags \(2 more rows cannot be used\)"):
        rows(config, tmp_path, [TRAIN[0], bad[0], TRAIN[1], *bad[1:]]).train_split()


@pytest.mark.parametrize("tag, part", [("B-PRE", "Did you mean 'B-PER'"), ("0", "the digit 0, not the letter O")])
def test_tags_not_seen_in_training(config, tmp_path, tag, part):
    config["data"]["eval"] = {"dev": write(tmp_path / "d.jsonl", [{"tokens": ["a", "b"], "tags": ["O", tag]}])}
    task = jobs.task_of(config)
    with pytest.raises(UserError, match=part) as e:
        task.eval_splits(task.learned(task.train_split()))
    assert "d.jsonl:1" in str(e.value)


def test_numbers_with_names(config, tmp_path):
    task = rows(config, tmp_path, [{"tokens": ["a", "b", "c"], "tags": [1, 2, 0]}], labels=["O", "B-P", "I-P"])
    split = task.train_split()
    assert task.learned(split)["labels"] == ["O", "B-P", "I-P"]
    assert [labels[0] for labels in targets_by_word(task, split, 0).values()] == [1, 2, 0]


# -- long sentences


LONG = {
    "tokens": ["word"] * 5 + ["New", "York", "City"] + ["word"] * 8,
    "tags": ["O"] * 5 + ["B-L", "I-L", "I-L"] + ["O"] * 8,
}


def test_windows_cut_no_word_and_no_entity(config, tmp_path):
    pieces = {w: len(alignment.pieces_of(jobs.task_of(config).tokenizer, [[w]])[0].ids) for w in set(LONG["tokens"])}
    room = 5 * pieces["word"] + pieces["New"] + pieces["York"]  # a cut by length would fall into the entity
    task = rows(config, tmp_path, [LONG], truncation="split", max_length=room)
    split = task.train_split()
    words = [[int(w) for w in row if w >= 0] for row in (split.data["words"][i] for i in range(len(split)))]
    assert words[0] == sorted(words[0]) and max(words[0]) == 4 and min(words[1]) == 5
    assert np.unique(np.concatenate(words)).tolist() == list(range(16)) and split.targets.sum() == 16
    counts = split.data.meta["counts"]
    assert counts["split"] == 1 and not {"entities_cut", "words_dropped", "tokens_dropped"} & set(counts)
    assert "words 5 to" in task.documents(split, 1)[0]


def test_truncation_says_what_it_drops(config, tmp_path, caplog):
    """Trap: a sentence cut in the middle of an entity."""
    tokenizer = jobs.task_of(config).tokenizer
    sizes = [len(alignment.pieces_of(tokenizer, [[w]])[0].ids) for w in LONG["tokens"]]
    task = rows(config, tmp_path, [LONG], truncation="truncate", max_length=sum(sizes[:6]) + sizes[6] - 1)
    split = task.train_split()
    counts = split.data.meta["counts"]
    assert split.data["words"][0].max() == 5  # York would not have fit whole
    assert counts["truncated"] == counts["entities_cut"] == 1 and counts["words_dropped"] == 10
    assert counts["tokens_dropped"] == sum(sizes[6:]) and "10 words dropped" in caplog.text
    with pytest.raises(UserError, match="1 of 1 texts are longer"):
        rows(config, tmp_path, [LONG], truncation="error").train_split()
    kept = rows(config, tmp_path, [LONG, TRAIN[1]], truncation="drop", max_length=30).train_split()
    assert len(kept) == 1 and kept.data.meta["counts"]["dropped"] == 1


def test_a_word_longer_than_a_window_keeps_its_first_tokens(config, tmp_path):
    row = {"tokens": ["a", "x" * 100, "b"], "tags": ["O", "B-L", "O"]}
    split = rows(config, tmp_path, [row], truncation="split", max_length=16).train_split()
    assert split.lengths.max() == 16 and split.targets.sum() == 3
    assert split.data.meta["counts"]["tokens_dropped"] > 0


# -- the whole way


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_bert, tiny_llama):
    """Runs of 1 rank and of 2 with ZeRO-2, and of a decoder; long sentences in windows."""
    folder = tmp_path_factory.mktemp("tokens")
    train = write(
        folder / "train.jsonl", [*TRAIN, {**LONG, "tags": [t.replace("-L", "-LOC") for t in LONG["tags"]]}] * 2
    )
    runs = {}
    for name, model, zero in (("one", tiny_bert, 0), ("llama", tiny_llama, 0), ("two", tiny_bert, 2)):
        config = {
            "task": "token_classification",
            "model": {"path": str(model)},
            "data": {"train": train, "eval": {"dev": train}, "max_length": 32, "truncation": "split"},
            "batch": {"size": 5},
            "optim": {"lr": 5e-3, "schedule": "constant"},
            "train": {"steps": 30 if name == "one" else 3, "log_every": 1},
            "parallel": {"zero": zero},
            "run": {"dir": str(folder / name), "offline": True, "device": "cpu", "threads": 1},
        }
        runs[name] = str(launch.write_config(folder / f"{name}.yaml", config))
    script = str(launch.ROOT / "tests" / "train" / "runs.py")
    launch.ranks(1, [script, "train", runs["one"], runs["llama"]])
    launch.ranks(2, [script, "train", runs["two"]])
    return folder


def losses(folder):
    return [r["loss"] for r in track.read(folder) if r["kind"] == "train"]


def test_two_ranks_with_zero_2_learn_what_one_does(trained):
    one, two = losses(trained / "one"), losses(trained / "two")
    assert np.allclose(one[:3], two, rtol=1e-4)
    assert len(losses(trained / "llama")) == 3


def test_metrics_are_of_whole_sentences(trained):
    found = [r for r in track.read(trained / "one") if r["kind"] == "eval"][-1]
    assert found["sentences"] == 8 and found["words"] == 2 * (4 + 4 + 5 + 16)
    assert found["f1"] > 0.9 and found["accuracy"] > 0.9 and found["loss"] < 1


def test_sentences_are_judged_whole(trained):
    """Rows of an evaluation, in the files' order, and entities by type: what seqeval says of the same tags."""
    found = evaluate_model(configuration.of_trained(trained / "one"), rows=True)["dev"]
    data = [json.loads(line) for line in (trained / "train.jsonl").read_text().splitlines()]
    assert [row["tokens"] for row in found.rows] == [row["tokens"] for row in data]
    assert [row["gold"] for row in found.rows] == [row["tags"] for row in data]
    words = [a == b for row in found.rows for a, b in zip(row["gold"], row["predicted"], strict=True)]
    assert np.mean(words) == pytest.approx(found.metrics["accuracy"])
    gold, tags = ([row[key] for row in found.rows] for key in ("gold", "predicted"))
    report = seqeval.metrics.classification_report(gold, tags, output_dict=True, zero_division=0)
    for kind, scores in found.classes.items():
        assert scores == pytest.approx({name.replace("f1-score", "f1"): v for name, v in report[kind].items()})
    assert sum(scores["support"] for scores in found.classes.values()) == report["micro avg"]["support"]


def test_predictions_of_the_exported_model(trained):
    ready = predictor(str(trained / "one"), {})
    given = [{"tokens": TRAIN[0]["tokens"]}, {"tokens": "Siemens is in Munich"}, {"tokens": LONG["tokens"]}]
    first, second, third = predict(ready, [("x", row) for row in given])
    assert first["tags"] == TRAIN[0]["tags"] and second["tokens"] == TRAIN[1]["tokens"]
    assert {"type": "PER", "start": 0, "end": 2, "text": "Angela Merkel"} in first["entities"]
    assert third["windows"] > 1 and len(third["tags"]) == 16
    assert ready.prepare("x", {"text": "Siemens is"})["tokens"] == ["Siemens", "is"]
    assert ready.prepare("x", {"tokens": "我爱北京"})["tokens"] == list("我爱北京")
    with pytest.raises(UserError, match="x: the tokens are"):
        ready.prepare("x", {"tokens": []})
    bare = predictor(str(trained / "one" / "model"), {})  # the folder alone says which task and scheme
    assert next(predict(bare, [("x", given[0])])) == first
    model = transformers.AutoModelForTokenClassification.from_pretrained(trained / "one" / "model")
    assert model.config.tag_scheme == "iob2" and model.config.id2label[0] == "O"


def test_real_sets(config, minilm, shared_data):
    """CoNLL files as they are; the Chinese one with its position digits taken off the characters."""
    from fastft.config import Source
    from fastft.data import formats

    folder = shared_data / "ner"
    config["model"]["path"] = minilm
    config["data"] = {"train": str(folder / "wnut17" / "dev.conll"), "max_length": 128}
    split = jobs.task_of(config).train_split()
    assert len(split) == 1009 and split.data.meta["scheme"] == "iob2" and len(split.data.meta["labels"]) == 13
    post = next(r for _, r in formats.read(Source(path=str(folder / "weibo_zh" / "dev.conll"))))
    task = jobs.task_of(config)
    characters = [token[:-1] for token in post["tokens"]]
    assert len(np.unique(alignment.pieces_of(task.tokenizer, [characters])[0].words)) == len(characters)


def test_shipped_config_reads_its_data(minilm, tmp_path, monkeypatch):
    from fastft import assemble
    from fastft import config as configuration

    monkeypatch.chdir(launch.ROOT)
    options = [f"model.path={minilm}", f"run.dir={tmp_path}", "run.offline=true"]
    job = assemble.start(configuration.load("configs/token_classification/wnut17.yaml", options))
    assemble.add_data(job)
    assert len(job.train.data["sentence"]) >= 600 and len(job.evals["dev"]) >= 300 and len(job.learned["labels"]) == 13
