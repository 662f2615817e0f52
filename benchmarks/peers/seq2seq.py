"""Translation by Hugging Face Seq2SeqTrainer.

    python benchmarks/peers/seq2seq.py SPEC.json

As trainer.py: the last line printed is a JSON object of ``metrics`` (``loss`` per target token, ``bleu``, ``chrf`` of
greedy outputs, by sacrebleu), ``samples_per_second`` and ``versions``.
"""

import json
import sys
import time
from importlib import metadata

import sacrebleu
import torch
import transformers


def main():
    with open(sys.argv[1]) as f:
        spec = json.load(f)
    settings, columns = spec["settings"], spec["columns"]
    transformers.set_seed(spec["seed"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(spec["model"])
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(spec["model"], dtype="float32")
    limit = settings["max_length"]

    def encoded(path):
        with open(path) as f:
            rows = [json.loads(line) for line in f]
        pairs = [(row[columns["source"]], row[columns["target"]]) for row in rows]
        return pairs, [dict(tokenizer(a, text_target=b, truncation=True, max_length=limit)) for a, b in pairs]

    (_, train), (pairs, dev) = (encoded(spec[part]) for part in ("train", "dev"))
    ends = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            ends.append(time.time())

    all_steps = -(-len(train) // settings["batch"]) * settings["epochs"]
    arguments = transformers.Seq2SeqTrainingArguments(
        output_dir=spec["folder"],
        per_device_train_batch_size=settings["batch"],
        num_train_epochs=settings["epochs"],
        learning_rate=settings["lr"],
        lr_scheduler_type=settings["schedule"],
        warmup_steps=round(settings["warmup"] * all_steps),
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
    collator = transformers.DataCollatorForSeq2Seq(tokenizer, model=model)
    trainer = transformers.Seq2SeqTrainer(
        model=model, args=arguments, train_dataset=train, data_collator=collator, callbacks=[Clock()]
    )
    trainer.train()
    model.eval()
    total, count, texts = 0.0, 0, []
    order = sorted(range(len(dev)), key=lambda i: len(dev[i]["input_ids"]))
    with torch.no_grad():
        for start in range(0, len(dev), 64):
            batch = collator([dev[i] for i in order[start : start + 64]]).to(model.device)
            targets = int((batch["labels"] != -100).sum())
            total += float(model(**batch).loss) * targets
            count += targets
            given = {name: batch[name] for name in ("input_ids", "attention_mask")}
            out = model.generate(**given, max_new_tokens=settings["new_tokens"], do_sample=False)
            texts += tokenizer.batch_decode(out, skip_special_tokens=True)
    references = [[pairs[i][1] for i in order]]
    metrics = {
        "loss": total / count,
        "bleu": sacrebleu.corpus_bleu(texts, references, tokenize="zh").score,
        "chrf": sacrebleu.corpus_chrf(texts, references).score,
    }
    samples = (len(ends) - 1) * settings["batch"]
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "accelerate")}
    found = {"metrics": metrics, "samples_per_second": samples / (ends[-1] - ends[0])}
    print(json.dumps({**found, "versions": versions}))


if __name__ == "__main__":
    main()
