"""Language modeling by Hugging Face Trainer: LoRA of a decoder through peft, or masked language modeling of an encoder.

    python benchmarks/peers/language.py SPEC.json

As trainer.py: the last line printed is a JSON object of ``metrics`` (``loss``: per target token of the dev rows),
``samples_per_second`` and ``versions``.
"""

import json
import sys
import time
from importlib import metadata

import torch
import transformers


def rows_of(path):
    with open(path) as f:
        return [json.loads(line)["text"] for line in f]


def causal(spec, tokenizer):
    from peft import LoraConfig, get_peft_model

    model = transformers.AutoModelForCausalLM.from_pretrained(spec["model"], dtype=spec["settings"]["dtype"])
    lora = spec["settings"]["lora"]
    model = get_peft_model(model, LoraConfig(r=lora, lora_alpha=2 * lora, target_modules="all-linear"))
    return model, transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)


def masked(spec, tokenizer):
    model = transformers.AutoModelForMaskedLM.from_pretrained(spec["model"], dtype="float32")
    return model, transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)


def main():
    with open(sys.argv[1]) as f:
        spec = json.load(f)
    settings = spec["settings"]
    transformers.set_seed(spec["seed"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(spec["model"])
    if tokenizer.pad_token in (None, tokenizer.eos_token):  # the collator would leave out the end of every text
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    eos = tokenizer.eos_token if spec["task"] == "causal_lm" else ""
    train, dev = (
        [tokenizer(text + eos, truncation=True, max_length=settings["max_length"]) for text in rows_of(spec[part])]
        for part in ("train", "dev")
    )
    model, collator = (causal if spec["task"] == "causal_lm" else masked)(spec, tokenizer)
    ends = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            ends.append(time.time())

    steps = settings.get("steps", -1)
    all_steps = steps if steps > 0 else -(-len(train) // settings["batch"]) * settings["epochs"]
    arguments = transformers.TrainingArguments(
        output_dir=spec["folder"],
        per_device_train_batch_size=settings["batch"],
        max_steps=steps,
        num_train_epochs=settings["epochs"],
        learning_rate=settings["lr"],
        lr_scheduler_type=settings["schedule"],
        warmup_steps=round(settings["warmup"] * all_steps),
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=spec["seed"],
        train_sampling_strategy="group_by_length" if spec["group_by_length"] else "random",
        bf16=settings["dtype"] == "bfloat16",
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        use_cpu=spec["device"] == "cpu",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    features = [{"input_ids": row["input_ids"], "attention_mask": row["attention_mask"]} for row in train]
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=features, data_collator=collator, callbacks=[Clock()]
    )
    trainer.train()
    model.eval()
    transformers.set_seed(17)
    total, count = 0.0, 0
    with torch.no_grad():
        for row in dev:
            batch = collator([{"input_ids": row["input_ids"], "attention_mask": row["attention_mask"]}])
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()[0]
            labels = batch["labels"][0]
            if spec["task"] == "causal_lm":
                logits, labels = logits[:-1], labels[1:]
            used = labels != -100
            total += float(torch.nn.functional.cross_entropy(logits[used], labels[used], reduction="sum"))
            count += int(used.sum())
    tokens = sum(len(row["input_ids"]) for row in train) / len(train)
    samples = (len(ends) - 1) * settings["batch"]
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "accelerate", "peft")}
    found = {"metrics": {"loss": total / count}, "samples_per_second": samples / (ends[-1] - ends[0])}
    found["tokens_per_second"] = found["samples_per_second"] * tokens
    print(json.dumps({**found, "versions": versions}))


if __name__ == "__main__":
    main()
