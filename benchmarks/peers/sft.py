"""Conversations by TRL's SFTTrainer, in full or by LoRA through peft; the assistant's tokens alone are learned.

    python benchmarks/peers/sft.py SPEC.json

As trainer.py; SPEC has ``packing`` too: sequences filled by best fit, flattened, without activation checkpointing, or
a conversation a row and TRL's defaults. The last line printed is a JSON object of ``metrics`` (``loss`` per target
token of the dev rows), ``samples_per_second``, ``losses`` (of every step), ``targets`` (trained tokens of the epoch),
``peak_gb`` and ``versions``.
"""

import json
import os
import resource
import sys
import time
from importlib import metadata

import datasets
import torch
import transformers
import trl

# TRL asks for marks around what is learned: the text is that of the model's own template.
ANSWER = "{{ message['content'] + '<|im_end|>' }}"
MARKED = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}" + ANSWER + "{% endgeneration %}"
    "{% else %}" + ANSWER + "{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def rows_of(path):
    with open(path) as f:
        return [json.loads(line) for line in f]


class Clock(transformers.TrainerCallback):
    def __init__(self):
        self.ends, self.losses = [], []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.time())

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])


def main():
    with open(sys.argv[1]) as f:
        spec = json.load(f)
    settings, packing = spec["settings"], spec["packing"]
    transformers.set_seed(spec["seed"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(spec["model"])
    train = rows_of(spec["train"])
    texts = [(tokenizer.apply_chat_template(r["messages"], tokenize=False), r["messages"]) for r in train]
    tokenizer.chat_template = MARKED
    for text, messages in texts:
        assert tokenizer.apply_chat_template(messages, tokenize=False) == text, "the marks changed the text"
    batch = settings["batch"] if packing else settings["rows"]
    clock = Clock()
    best = {"packing": True, "packing_strategy": "bfd", "gradient_checkpointing": False, "optim": "adamw_torch_fused"}
    arguments = trl.SFTConfig(
        output_dir=spec["folder"],
        per_device_train_batch_size=batch,
        num_train_epochs=settings["epochs"],
        learning_rate=settings["lr"],
        lr_scheduler_type=settings["schedule"],
        warmup_steps=settings["warmup"],
        weight_decay=0.0,
        max_grad_norm=1.0,
        max_length=settings["max_length"],
        assistant_only_loss=True,
        seed=spec["seed"],
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=spec["device"] == "cpu",
        bf16=False,
        disable_tqdm=True,
        model_init_kwargs={"dtype": "float32"},
        **(best if packing else {}),
    )
    lora = settings.get("lora")
    if lora:
        from peft import LoraConfig

        lora = LoraConfig(r=lora, lora_alpha=2 * lora, target_modules="all-linear")
    trainer = trl.SFTTrainer(
        model=spec["model"],
        args=arguments,
        train_dataset=datasets.Dataset.from_list([{"messages": row["messages"]} for row in train]),
        processing_class=tokenizer,
        peft_config=lora or None,
        callbacks=[clock],
    )
    targets = sum(label != -100 for row in trainer.train_dataset for label in row["labels"])
    trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    model = trainer.model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows_of(spec["dev"]):
            encoded = tokenizer.apply_chat_template(
                row["messages"],
                return_dict=True,
                return_assistant_tokens_mask=True,
                truncation=True,
                max_length=settings["max_length"],
            )
            ids, learned = torch.tensor(encoded["input_ids"]), torch.tensor(encoded["assistant_masks"]).bool()[1:]
            logits = model(input_ids=ids[None].to(model.device)).logits[0, :-1].float().cpu()
            total += float(torch.nn.functional.cross_entropy(logits[learned], ids[1:][learned], reduction="sum"))
            count += int(learned.sum())
    steps = len(clock.ends)
    print(
        json.dumps(
            {
                "metrics": {"loss": total / count},
                "samples_per_second": (steps - 1)
                / steps
                * len(train)
                * settings["epochs"]
                / (clock.ends[-1] - clock.ends[0]),
                "losses": clock.losses[:steps],
                "targets": targets,
                "peak_gb": peak,
                "versions": {
                    name: metadata.version(name) for name in ("torch", "transformers", "accelerate", "peft", "trl")
                },
            }
        )
    )
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
