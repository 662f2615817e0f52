"""Steps of Hugging Face Trainer on given rows, one for each line of standard input.

    python benchmarks/peers/turns.py SPEC.json

SPEC: ``model`` (folder), ``dtype``, ``batches`` (npz: ids, labels, positions, each (steps, rows, length)),
``isolated``, ``folder``. After each step a line of JSON behind an @: ``wall``, ``cpu`` (seconds), ``loss``,
``peak_gb``; before the first one with ``versions``.
"""

import json
import os
import resource
import sys
import time
from importlib import metadata

import numpy as np
import torch
import transformers


def say(**values):
    print("@" + json.dumps(values), flush=True)


class Turns(transformers.TrainerCallback):
    """Waits for a line before a step, and says what it took after it."""

    def on_step_begin(self, args, state, control, **kwargs):
        if not sys.stdin.readline():
            os._exit(0)
        self.begun = time.perf_counter(), time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.took = time.perf_counter() - self.begun[0], time.process_time() - self.begun[1]

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            say(wall=self.took[0], cpu=self.took[1], loss=logs["loss"], peak_gb=peak)


class InOrder(transformers.Trainer):
    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def main():
    with open(sys.argv[1]) as f:
        spec = json.load(f)
    say(versions={name: metadata.version(name) for name in ("torch", "transformers", "accelerate")})
    model = transformers.AutoModelForCausalLM.from_pretrained(spec["model"], dtype=spec["dtype"])
    model.config.use_cache = False
    given = np.load(spec["batches"])
    rows = []
    for ids, labels, positions in zip(*(given[name].reshape(-1, given[name].shape[-1]) for name in given), strict=True):
        row = {"input_ids": ids, "labels": np.concatenate([[-100], labels[:-1]])}  # the model shifts them itself
        rows.append(row | ({"position_ids": positions} if spec["isolated"] else {}))
    arguments = transformers.TrainingArguments(
        output_dir=spec["folder"],
        per_device_train_batch_size=given["ids"].shape[1],
        max_steps=len(given["ids"]),
        optim="adamw_torch_fused",
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = InOrder(model=model, args=arguments, train_dataset=rows, callbacks=[Turns()])
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    trainer.train()


if __name__ == "__main__":
    main()
