"""One fine-tuning by Hugging Face Trainer, in plain transformers code: what benchmarks/tasks.py compares fastft with.

    python benchmarks/peers/trainer.py SPEC.json

The spec is tasks.py's (``spec``): model, files of rows, settings. Prints, as the last line, a JSON object: ``metrics``
on the dev rows, ``samples_per_second`` between the end of the first step and the end of the last, ``versions``. Needs
torch, transformers, accelerate, and seqeval for token classification; nothing of fastft.
"""

import json
import sys
import time
from importlib import metadata

import numpy as np
import transformers


def rows_of(path):
    with open(path) as f:
        return [json.loads(line) for line in f]


def token_classification(spec, tokenizer):
    """Training set, dev set, model, collator, and what makes metrics of the dev set's logits.

    The usual recipe: a word's first token has the target, long sentences are cut. The scores are of whole sentences, as
    fastft's are: a word that was cut away counts as predicted O.
    """
    from seqeval.metrics import f1_score, precision_score, recall_score

    train, dev = rows_of(spec["train"]), rows_of(spec["dev"])
    found = {tag for row in train for tag in row["tags"]}
    names = sorted(found, key=lambda tag: (tag != "O", tag))
    index = {tag: i for i, tag in enumerate(names)}

    def encode(row):
        encoded = tokenizer(
            row["tokens"], is_split_into_words=True, truncation=True, max_length=spec["settings"]["max_length"]
        )
        words = encoded.word_ids()
        first = [word is not None and word != before for before, word in zip([None, *words], words, strict=False)]
        labels = [index[row["tags"][w]] if f else -100 for w, f in zip(words, first, strict=True)]
        return {**encoded, "labels": labels}, [(i, w) for i, (w, f) in enumerate(zip(words, first, strict=True)) if f]

    encoded = [encode(row) for row in dev]

    def metrics(logits):
        predicted = []
        for row, (_, places), scores in zip(dev, encoded, logits, strict=True):
            tags = ["O"] * len(row["tags"])
            for position, word in places:
                tags[word] = names[int(scores[position].argmax())]
            predicted.append(tags)
        truth = [row["tags"] for row in dev]
        scored = {"f1": f1_score, "precision": precision_score, "recall": recall_score}
        return {name: float(score(truth, predicted)) for name, score in scored.items()}

    model = transformers.AutoModelForTokenClassification.from_pretrained(
        spec["model"], num_labels=len(names), id2label=dict(enumerate(names)), label2id=index, dtype="float32"
    )
    collator = transformers.DataCollatorForTokenClassification(tokenizer)
    return [encode(row)[0] for row in train], [features for features, _ in encoded], model, collator, metrics


def regression(spec, tokenizer):
    """The same for one number of a text or a pair: the mean squared error that num_labels=1 stands for."""
    columns = spec["columns"]

    def encode(row):
        texts = [row[columns[name]] for name in ("text", "text_pair") if name in columns]
        encoded = tokenizer(*texts, truncation=True, max_length=spec["settings"]["max_length"])
        return {**encoded, "labels": float(row[columns["target"]])}

    train, dev = ([encode(row) for row in rows_of(spec[part])] for part in ("train", "dev"))

    def metrics(logits):
        from scipy.stats import pearsonr, spearmanr

        predicted, values = np.array(logits).reshape(-1), [row["labels"] for row in dev]
        return {"pearson": float(pearsonr(predicted, values)[0]), "spearman": float(spearmanr(predicted, values)[0])}

    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        spec["model"], num_labels=1, dtype="float32"
    )
    return train, dev, model, transformers.DataCollatorWithPadding(tokenizer), metrics


TASKS = {"token_classification": token_classification, "regression": regression}


def arguments(spec):
    settings = spec["settings"]
    steps = -(-spec["train_rows"] // settings["batch"]) * settings["epochs"]
    return transformers.TrainingArguments(
        output_dir=spec["folder"],
        per_device_train_batch_size=settings["batch"],
        per_device_eval_batch_size=32,
        num_train_epochs=settings["epochs"],
        learning_rate=settings["lr"],
        lr_scheduler_type=settings["schedule"],
        warmup_steps=round(settings["warmup"] * steps),
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=spec["seed"],
        train_sampling_strategy="group_by_length" if spec["group_by_length"] else "random",
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        use_cpu=spec["device"] == "cpu",
        disable_tqdm=True,
    )


def main():
    with open(sys.argv[1]) as f:
        spec = json.load(f)
    transformers.set_seed(spec["seed"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(spec["model"])
    train, dev, model, collator, metrics = TASKS[spec["task"]](spec, tokenizer)
    ends = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            ends.append(time.time())

    trainer = transformers.Trainer(
        model=model,
        args=arguments(spec),
        train_dataset=train,
        processing_class=tokenizer,
        data_collator=collator,
        callbacks=[Clock()],
    )
    trainer.train()
    trainer.args.train_sampling_strategy = "random"  # predict would go by length too, in another order than the rows'
    logits = trainer.predict(dev).predictions
    samples = (len(ends) - 1) / len(ends) * len(train) * spec["settings"]["epochs"]
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "accelerate")}
    print(
        json.dumps(
            {"metrics": metrics(logits), "samples_per_second": samples / (ends[-1] - ends[0]), "versions": versions}
        )
    )


if __name__ == "__main__":
    main()
