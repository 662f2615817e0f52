"""Steps of Hugging Face Trainer: on packed rows of tokens (a decoder), or on padded rows with a label (an encoder).

    python benchmarks/peers/steps.py SPEC.json

The last line printed is a JSON object: ``seconds`` of the steps after the warm-up, ``peak_gib``, ``start_s`` until the
first step ended, ``losses`` (of every ten steps), ``versions``.
"""

import json
import sys
import time
from importlib import metadata

BEGUN = time.perf_counter()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402


def decoder(spec, config):
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, spec["dtype"]))

    def collate(features):
        ids = torch.from_numpy(np.stack([f["input_ids"] for f in features]).astype(np.int64))
        return {"input_ids": ids, "labels": ids.clone()}

    return model, [{"input_ids": row, "labels": row} for row in np.load(spec["rows"])], collate


def encoder(spec, config):
    config.num_labels = spec["labels"]
    model = transformers.AutoModelForSequenceClassification.from_config(config, dtype=getattr(torch, spec["dtype"]))
    with open(spec["rows"]) as file:
        rows = [json.loads(line) for line in file]
    tokenizer = transformers.AutoTokenizer.from_pretrained(spec["model"])
    return model, rows, transformers.DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8)


def main():
    with open(sys.argv[1]) as f:
        spec = json.load(f)
    cuda = torch.cuda.is_available()
    wait = torch.cuda.synchronize if cuda else lambda: None
    with torch.device("cuda" if cuda else "cpu"):
        torch.manual_seed(0)
        config = transformers.AutoConfig.from_pretrained(spec["model"])
        model, rows, collate = {"decoder": decoder, "encoder": encoder}[spec["kind"]](spec, config)
    times = {}

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step in (1, spec["warmup"], spec["warmup"] + spec["steps"]):
                wait()
                times[state.global_step] = time.perf_counter()

    arguments = transformers.TrainingArguments(
        output_dir=spec["folder"],
        per_device_train_batch_size=spec["sequences"],
        max_steps=spec["warmup"] + spec["steps"],
        bf16=spec["dtype"] != "bfloat16",
        optim="adamw_torch_fused",
        use_liger_kernel=spec["liger"],
        train_sampling_strategy="group_by_length" if spec.get("group_by_length") else "random",
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        dataloader_num_workers=2,
        disable_tqdm=True,
        use_cpu=not cuda,
    )
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=[Clock()]
    )
    trainer.train()
    losses = [r["loss"] for r in trainer.state.log_history if "loss" in r]
    found = {
        "seconds": times[spec["warmup"] + spec["steps"]] - times[spec["warmup"]],
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0,
        "start_s": times[1] - BEGUN,
        "losses": losses,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "versions": {n: metadata.version(n) for n in ("torch", "transformers", "accelerate")},
    }
    if spec["liger"]:
        found["versions"]["liger-kernel"] = metadata.version("liger-kernel")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
