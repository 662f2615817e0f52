"""seq2seq: evaluations generate what model.generate does, on one rank and several; scores; predictions; export."""

import copy
import json
import shlex

import jobs
import numpy as np
import pairs
import pytest
import torch
import transformers
import yaml

import launch
from fastft import track
from fastft.errors import UserError
from fastft.evaluate.predict import predict, predictor
from fastft.inference.forward import Forward, settle
from fastft.tasks._generated import GenerationEvaluation, Scores, answer, rouge
from fastft.train.evaluation import measure

RUNS = launch.ROOT / "tests" / "train" / "runs.py"
FAMILIES = ["t5", "bart", "marian", "mbart", "mbart50", "nllb"]


def scored(make, kind: str, tmp_path, **generation) -> dict:
    """A run that generates in evaluation, of eleven rows."""
    made = make(kind)
    made["data"]["eval"] = pairs.write(tmp_path / "eval.jsonl", pairs.rows()[:11])
    made["evaluation"] = {"metrics": ["bleu", "chrf", "rouge", "exact_match"], "generation": generation}
    return made


def by_transformers(config: dict, folder=None, **options) -> tuple[list[list[int]], list[str]]:
    """Tokens and texts of `model.generate` alone, row by row, as transformers' documentation has it."""
    path = folder or config["model"]["path"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(path, dtype=torch.float32).eval()
    if "source_lang" in config["data"]:
        tokenizer.src_lang = config["data"]["source_lang"]
        code = tokenizer.convert_tokens_to_ids(config["data"]["target_lang"])
        # as transformers documents it: mBART starts with the code, the others are forced to it
        first = "decoder_start_token_id" if type(tokenizer).__name__ == "MBartTokenizer" else "forced_bos_token_id"
        options[first] = code
    tokens = []
    for row in pairs.rows()[:11]:
        encoded = tokenizer(row["en"], return_tensors="pt")
        tokens.append(model.generate(**encoded, do_sample=False, **options)[0].tolist())
    return tokens, tokenizer.batch_decode(tokens, skip_special_tokens=True)


def trimmed(rows: list[list[int]], pad: int) -> list[list[int]]:
    """Without the padding behind; the first token may be one, too."""
    found = []
    for row in rows:
        row = list(row)
        while len(row) > 1 and row[-1] == pad:
            row.pop()
        found.append(row)
    return found


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", FAMILIES)
def test_generation_is_that_of_transformers(pair_config, tmp_path, kind, beams):
    """Token for token: greedy and beam search, rows padded in batches by length against rows alone."""
    made = scored(pair_config, kind, tmp_path, num_beams=beams, max_new_tokens=12)
    made["batch"]["micro_tokens"] = 120 * beams
    job = jobs.job_of(made, evals=True)
    assert job.record["generation"]["max_new_tokens"] == 12
    kept, plain = [], job.model.generate
    job.model.generate = lambda **given: kept.append(plain(**given)) or kept[-1]
    metrics, ids = measure(job, job.evals["eval"])
    assert 2 <= len(kept) <= 11 and sum(map(len, kept)) == 11
    found = [metrics.written[list(ids).index(i)].tolist() for i in range(11)]
    expected, texts = by_transformers(made, num_beams=beams, max_new_tokens=12)
    pad = job.task.tokenizer.pad_token_id
    assert trimmed(found, pad) == trimmed(expected, pad)
    assert [metrics.texts[list(ids).index(i)] for i in range(11)] == texts
    assert [metrics.references[list(ids).index(i)] for i in range(11)] == [row["zh"] for row in pairs.rows()[:11]]


@pytest.mark.parametrize("kind", ["t5", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("marian", "mbart"))])
def test_generation_on_two_ranks_is_that_of_one(pair_config, tmp_path, kind):
    """ZeRO 0 to 3, greedy and beams: ranks keep in step though they end at different lengths and one is without rows
    (transformers#20130, DeepSpeed#8262); the same metrics as one process."""
    paths, expected = [], {}
    for beams in (1, 2):
        made = scored(pair_config, kind, tmp_path, num_beams=beams, max_new_tokens=12)
        made["data"]["cache"] = str(tmp_path / "prepared")
        made["batch"]["micro_tokens"] = 40 * beams  # single rows: the last of eleven has no neighbor
        job = jobs.job_of(made, evals=True)
        metrics, _ = measure(job, job.evals["eval"])
        expected[beams] = metrics.finish([metrics.state()]), by_transformers(made, num_beams=beams, max_new_tokens=12)
        for zero in range(4):
            made["parallel"] = {"zero": zero}
            paths.append(launch.write_config(tmp_path / f"b{beams}z{zero}.yaml", copy.deepcopy(made)))
    launch.ranks(2, [RUNS, "generated", tmp_path, *paths])
    for path in paths:
        numbers, (tokens, _) = expected[int(path.stem[1])]
        found = json.loads(path.with_suffix(".json").read_text())
        pad = transformers.AutoTokenizer.from_pretrained(made["model"]["path"]).pad_token_id
        assert trimmed(found["tokens"], pad) == trimmed(tokens, pad), path.stem
        assert found["metrics"] == pytest.approx(numbers, rel=1e-5), path.stem
        assert "tok:zh" in found["record"]["signatures"]["bleu"]


def test_scores_are_those_of_sacrebleu_and_rouge_score():
    sacrebleu = pytest.importorskip("sacrebleu")
    rng = np.random.default_rng(0)
    words = ["the", "a", "cat", "dog", "sleeps", "drinks", "water", "today", ",", ".", "3.5", "U.S."]
    references = [" ".join(rng.choice(words, rng.integers(3, 20))) for _ in range(40)]
    texts = [" ".join(w for w in r.split() if rng.random() > 0.3) or "a" for r in references]
    scores = Scores(GenerationEvaluation(metrics=["bleu", "chrf", "rouge", "exact_match"]))
    halves = [scores.columns(texts[a:b], references[a:b]) for a, b in ((0, 13), (13, 13), (13, 40))]  # as of ranks
    found = scores.finish({name: np.concatenate([half[name] for half in halves]) for name in halves[0]})
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(texts, [references]).score, rel=1e-9)
    assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(texts, [references]).score, rel=1e-9)
    assert found["exact_match"] == np.mean([t == r for t, r in zip(texts, references, strict=True)])
    assert scores.signatures["bleu"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    rouge_score = pytest.importorskip("rouge_score.rouge_scorer")
    scorer = rouge_score.RougeScorer(["rouge1", "rouge2", "rougeL"])
    for text, reference in zip(texts, references, strict=True):
        theirs = scorer.score(reference, text)
        assert rouge(text, reference) == pytest.approx([theirs[n].fmeasure for n in ("rouge1", "rouge2", "rougeL")])


def test_rouge_of_scripts_without_spaces():
    """rouge-score drops every letter that is not ASCII: any two Chinese texts would be 0."""
    assert rouge("猫今天睡觉", "猫睡觉") == pytest.approx((2 * 3 / 8, 2 * 1 / 6, 2 * 3 / 8))
    assert rouge("القطة تنام", "القطة تشرب") == pytest.approx((0.5, 0.0, 0.5))
    assert rouge("", "a") == rouge("a", "") == rouge("", "") == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    "text, number",
    [
        ("#### 1,234", 1234),
        ("so 3 and 4.50.", 4.5),
        ("a\n#### -7\n", -7),
        ("$12", 12),
        ("none", None),
        ("3 #### x", None),
    ],
)
def test_answers(text, number):
    assert answer(text) == number


@pytest.mark.parametrize("target, tokenize", [("de", "13a"), ("zh", "zh"), ("ja", "char"), ("ar", "13a")])
def test_scripts_are_scored_as_they_are_written(pair_config, tmp_path, target, tokenize):
    """A perfect output is 100 in every script, by text as a reader sees it; the way words are cut is chosen by the
    targets and is in the signature."""
    sacrebleu = pytest.importorskip("sacrebleu")
    made = scored(pair_config, "t5", tmp_path)
    made["data"]["target"] = target
    job = jobs.job_of(made, evals=True)
    assert job.learned == {"bleu_tokenize": tokenize}
    assert f"tok:{tokenize}|" in job.record["signatures"]["bleu"]
    tokenizer, split = job.task.tokenizer, job.evals["eval"]
    batch = jobs.collate(job.task, split, range(11))
    assert batch.references == [row[target] for row in pairs.rows()[:11]]
    written = tokenizer.batch_decode([row.tolist() for row in (split.data["target"][i] for i in range(11))], True)
    metrics = job.task.new_metrics(job.measured, job.learned)
    writes = _Writes(job.model, [job.task.tokenizer.pad_token_id], job.task)
    metrics.update(writes, batch)
    assert len(list(metrics.complete(writes, lambda n: n))) == 1
    found = metrics.finish([metrics.state()])
    assert written == batch.references and metrics.texts == batch.references
    assert found["bleu"] == pytest.approx(100) and found["chrf"] == pytest.approx(100) and found["exact_match"] == 1
    worse = [text[:-2] + text[-1] for text in written]
    theirs = sacrebleu.corpus_bleu(worse, [batch.references], tokenize=tokenize).score
    scores = job.task.scores(job.learned)
    assert scores.finish(scores.columns(worse, batch.references))["bleu"] == pytest.approx(theirs)


class _Writes(Forward):
    """Generates the target of each source."""

    def __init__(self, model, start, task):
        super().__init__(model, model)
        self.start, encoder, rows = start, task.encoder(None), pairs.rows()
        targets = encoder.target_ids([row[task.config.data.target] for row in rows])
        self.known = dict(zip(map(tuple, encoder.source_ids([row["en"] for row in rows])), targets, strict=True))

    def generate(self, inputs, dummy=False, **options):
        lengths = inputs["attention_mask"].sum(1).tolist()
        sources = [tuple(row[:n]) for row, n in zip(inputs["input_ids"].tolist(), lengths, strict=True)]
        rows = [self.start + self.known[source] for source in sources]
        width = max(map(len, rows))
        return torch.tensor([row + [self.start[0]] * (width - len(row)) for row in rows])


def test_trap_the_default_length_of_twenty(pair_config, tmp_path):
    """A model that does not say how long a text may become is not stopped at 20 tokens, and says so when exported."""
    made = scored(pair_config, "t5", tmp_path)
    job = jobs.job_of(made)
    config = job.model.generation_config
    assert config.max_new_tokens == 40 and config.max_length is None
    inputs = jobs.batch_of(job, range(4)).inputs
    found = Forward(job.model, job.model).generate(inputs, eos_token_id=None)
    assert found.shape[1] == 41
    config.max_new_tokens, config.max_length = None, 33  # a length of its own stays
    settle(job.model, {}, 40)
    assert (config.max_new_tokens, config.max_length) == (None, 33)
    settle(job.model, {"max_new_tokens": 9}, 40)
    assert (config.max_new_tokens, config.max_length) == (9, None)


@pytest.mark.parametrize(
    "evaluation, part",
    [
        ({"generation": {"num_beam": 2}}, r"'num_beam' is no key of transformers' GenerationConfig(?s:.*)num_beams"),
        ({"generation": {"num_beams": "x"}}, "evaluation.generation: "),
        ({"generation": {"num_beams": 0}}, "`num_beams` must be at least 1"),
        ({"generation": {"max_new_tokens": "5"}}, "evaluation.generation: '<=' not supported"),
        ({"generation": {"max_new_tokens": -3}}, "`max_new_tokens` must be greater than 0"),
        ({"generation": {"early_stopping": True, "num_beams": 1}}, "invalid: - `early_stopping`: `num_beams` is"),
        ({"generation": {"prompt_lookup_num_tokens": 3}}, "cannot generate by it: .*batch_size = 1"),
        ({"generation": {"do_sample": True}}, "evaluations do not sample"),
        ({"generation": {"num_return_sequences": 2}}, "takes one text for each row"),
        ({"metrics": ["bleu", "bleu"]}, "names one twice"),
        ({"metrics": ["blue"]}, "evaluation.metrics"),
        ({"bleu_tokenize": "klingon"}, r"sacrebleu knows no 'klingon'(?s:.*)It knows: .*13a"),
    ],
)
def test_bad_settings(pair_config, tmp_path, evaluation, part):
    made = scored(pair_config, "t5", tmp_path)
    made["evaluation"] |= evaluation
    with pytest.raises(UserError, match=part):
        jobs.job_of(made)


def test_texts_end_where_the_decoder_has_positions(pair_config, tmp_path):
    """As many tokens as it has positions, and one more is refused before training, and in a prediction; a length of
    the model's own beyond them is not kept."""
    for generation in ({"max_new_tokens": 65}, {"max_length": 66}):
        with pytest.raises(UserError, match="texts of 65 tokens are beyond the limit of 64 positions"):
            jobs.job_of(scored(pair_config, "bart", tmp_path, **generation))
    for generation in ({"max_new_tokens": 64}, {"max_length": 65}):
        job = jobs.job_of(scored(pair_config, "bart", tmp_path, **generation))
        inputs = jobs.batch_of(job, range(4)).inputs
        assert Forward(job.model, job.model).generate(inputs, eos_token_id=None).shape == (4, 65)
    job.model.generation_config.max_new_tokens, job.model.generation_config.max_length = None, 200
    settle(job.model, {}, 40, 64)
    assert (job.model.generation_config.max_new_tokens, job.model.generation_config.max_length) == (40, None)
    with pytest.raises(UserError, match="max_new_tokens = 65 is beyond the limit of 64 positions"):
        predictor(job.config.model.path, {"max_new_tokens": 65}, "seq2seq")
    ready = predictor(job.config.model.path, {"max_new_tokens": 64}, "seq2seq")
    assert next(predict(ready, [("x", {"text": "a bird sleeps."})]))["generated"] is not None


def test_without_sacrebleu_the_extra_is_named(pair_config, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sacrebleu.metrics", None)
    made = scored(pair_config, "t5", tmp_path)
    with pytest.raises(UserError, match=r"bleu and chrf need sacrebleu(?s:.*)fastft\[seq2seq\]"):
        jobs.job_of(made, evals=True)
    made["evaluation"]["metrics"] = ["rouge"]
    jobs.job_of(made, evals=True)


@pytest.mark.parametrize(
    "kind", [*(pytest.param(kind, marks=pytest.mark.long) for kind in ("t5", "bart", "mbart")), "marian", "mbart50"]
)
def test_export_and_predict_are_one(pair_config, tmp_path, kind):
    """Trained, evaluated and exported: the folder, by transformers' classes alone, writes what `fastft predict` does,
    in batches of 1 and 32, and its generation config is what evaluations used; `best_by` takes a score."""
    made = scored(pair_config, kind, tmp_path, num_beams=2, max_new_tokens=15)
    made |= {"optim": {"lr": 1e-2}, "train": {"steps": 20, "log_every": 20, "eval_every": 10}}
    made["data"]["order"] = "permutation"  # of which so few steps learn to write more than nothing
    made["checkpoint"] = {"every": 10, "best_by": "eval.chrf"}
    launch.fastft("train", launch.write_config(tmp_path / "c.yaml", made))
    run = tmp_path / "run"
    end = track.read(run)[-1]
    evaluated = {r["step"]: r["chrf"] for r in track.read(run) if r["kind"] == "eval"}
    assert end["best"]["value"] == max(evaluated.values()) == evaluated[end["best"]["step"]]
    assert {"loss", "bleu", "chrf", "rougeL", "exact_match", "generated_tokens"} <= set(end["eval"]["eval"])
    saved = json.loads((run / "model" / "generation_config.json").read_text())
    assert saved["num_beams"] == 2 and saved["max_new_tokens"] == 15 and "decoder_start_token_id" in saved
    sources = [(f"row {i}", {"text": row["en"]}) for i, row in enumerate(pairs.rows())]
    for path in (run, run / "model"):  # with the run's configuration, and alone
        ready = predictor(str(path), {})
        every = {size: [p["generated"] for p in predict(ready, sources, size)] for size in (1, 32)}
        tokenizer = transformers.AutoTokenizer.from_pretrained(run / "model")
        model = transformers.AutoModelForSeq2SeqLM.from_pretrained(run / "model").eval()
        for size, texts in every.items():
            expected = []
            for start in range(0, 16, size):
                batch = [row["en"] for row in pairs.rows()[start : start + size]]
                encoded = tokenizer(batch, padding=True, return_tensors="pt", padding_side="right")
                expected += tokenizer.batch_decode(model.generate(**encoded), skip_special_tokens=True)
            assert texts == expected, (path, size)
        assert every[1] == every[32] and len(set(every[1])) > 1
    longer = predictor(str(run), {"max_new_tokens": 3, "num_beams": 1, "max_length": 4})
    cut = next(predict(longer, sources))
    assert cut["truncated"] is True and len(tokenizer(cut["generated"])["input_ids"]) <= 6


@pytest.mark.parametrize("export", ["adapter", "merged"])
def test_an_adapter_generates_as_it_was_evaluated(pair_config, tmp_path, export):
    """LoRA: the folder of the adapter, and that of the merged model, have the generation config of evaluations."""
    made = scored(pair_config, "bart", tmp_path, num_beams=2, max_new_tokens=9)
    made["model"]["lora"] = {"r": 4, "export": export}
    made |= {"optim": {"lr": 2e-2}, "train": {"steps": 6}}
    launch.fastft("train", launch.write_config(tmp_path / "c.yaml", made))
    folder = tmp_path / "run" / "model"
    assert (folder / "adapter_config.json").is_file() is (export == "adapter")
    saved = json.loads((folder / "generation_config.json").read_text())
    assert saved["num_beams"] == 2 and saved["max_new_tokens"] == 9
    ready = predictor(str(folder), {})
    assert ready.model.generation_config.num_beams == 2
    texts = [p["generated"] for p in predict(ready, [("x", {"text": row["en"]}) for row in pairs.rows()[:11]])]
    launch.fastft("eval", tmp_path / "run", "--json", "--out", tmp_path / "judged.jsonl")
    judged = [json.loads(line) for line in (tmp_path / "judged.jsonl").read_text().splitlines()]
    assert [row["generated"] for row in judged] == texts


def test_prefixes_are_exported(pair_config, tmp_path):
    """The folder alone knows what stands before its sources."""
    made = pair_config("t5", source_prefix="the dog: ")
    made["train"] = {"steps": 1}
    launch.fastft("train", launch.write_config(tmp_path / "c.yaml", made))
    ready = predictor(str(tmp_path / "run" / "model"), {})
    assert ready.task.prefix == "the dog: "
    text = next(predict(ready, [("x", {"text": "a bird sleeps."})]))["generated"]
    model, tokenizer = ready.model, ready.task.tokenizer
    (plain,) = tokenizer.batch_decode(
        model.generate(**tokenizer(["the dog: a bird sleeps."], return_tensors="pt")), skip_special_tokens=True
    )
    assert text == plain


def test_eval_of_a_run_is_that_of_training(pair_config, tmp_path):
    """`fastft eval` gives the metrics that training ended with, and each row's texts."""
    made = scored(pair_config, "bart", tmp_path, max_new_tokens=10)
    made["train"] = {"steps": 2}
    launch.fastft("train", launch.write_config(tmp_path / "c.yaml", made))
    run = tmp_path / "run"
    _, output = launch.fastft("eval", run, "--json", "--out", tmp_path / "judged.jsonl")
    found = json.loads(output.strip().splitlines()[-1])["eval"]
    assert {name: found[name] for name in ("loss", "chrf")} == pytest.approx(
        {name: track.read(run)[-1]["eval"]["eval"][name] for name in ("loss", "chrf")}, rel=1e-5
    )
    assert set(json.loads(output.strip().splitlines()[-1])["eval"]["intervals"]) >= {"loss", "bleu", "chrf", "rougeL"}
    rows = [json.loads(line) for line in (tmp_path / "judged.jsonl").read_text().splitlines()]
    worst = [json.loads(line) for line in (run / "errors" / "eval.jsonl").read_text().splitlines()]
    assert [row["chrf"] for row in worst] == sorted(row["chrf"] for row in rows) and worst[0]["gold"]
    assert [(row["text"], row["gold"]) for row in rows] == [(row["en"], row["zh"]) for row in pairs.rows()[:11]]
    assert all({"generated", "chrf", "loss"} <= set(row) for row in rows)


def test_the_commands_of_the_page(pair_models, tmp_path, monkeypatch):
    """docs/tasks/seq2seq.md: its configuration, and every command of it, on a small model."""
    page = (launch.ROOT / "docs" / "tasks" / "seq2seq.md").read_text()
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load(page.partition("```yaml\n")[2].partition("```")[0])
    config["model"]["path"] = str(pair_models("t5"))
    config |= {"train": {"steps": 2}, "run": {"dir": "runs/my", "offline": True, "device": "cpu", "threads": 1}}
    config["evaluation"] = {"generation": {"max_new_tokens": 5}}
    launch.write_config(tmp_path / "my.yaml", config)
    for name in ("train", "dev"):
        lines = ["en\tzh", *(f"{row['en']}\t{row['zh']}" for row in pairs.rows())]
        (tmp_path / f"{name}.tsv").write_text("".join(f"{line}\n" for line in lines))
    commands = page.partition("```bash\n")[2].partition("```")[0].strip().splitlines()
    assert len(commands) == 5
    for command in commands:
        name, *arguments = shlex.split(command)
        assert name == "fastft"
        launch.fastft(*arguments)
    found = {name: (tmp_path / name).read_text().splitlines() for name in ("judged.jsonl", "translated.jsonl")}
    assert all(len(lines) == 16 for lines in found.values())
