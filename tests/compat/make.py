"""Makes runs.tar.gz beside this file: what fastft 0.1.0 (commit 2dda5fb) wrote, for test_compat.py.

Run with that version's checkout on PYTHONPATH.

Six runs of 20 steps (two tasks at ZeRO 0, 1 and 3; the sharded ones on two ranks), each with the checkpoint of step
10, config.yaml, the prepared data and all losses; the two models and the texts that they learn from. No dropout, so
that nothing hangs on the random numbers.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import torch
import transformers
import yaml

HERE = Path(__file__).parent
STAGES = {0: (1, "fp32"), 1: (2, "bf16"), 3: (2, "fp32")}  # ZeRO stage -> ranks, dtype


def main(work: Path) -> None:
    texts = _texts(work)
    _models(work, texts)
    for task in ("causal_lm", "classification"):
        for stage, (ranks, dtype) in STAGES.items():
            _run(work, task, stage, ranks, dtype)
    for scrap in work.glob("*.yaml"):
        scrap.unlink()
    versions = {name: __import__(name).__version__ for name in ("torch", "transformers", "deepspeed", "tokenizers")}
    (work / "versions.json").write_text(json.dumps(versions))
    with tarfile.open(HERE / "runs.tar.gz", "w:gz", compresslevel=9) as tar:
        tar.add(work, arcname="compat")


def _texts(work: Path) -> list[str]:
    from pydoc_data.topics import topics

    work.mkdir(parents=True)
    texts = [text[:300] for _, text in sorted(topics.items())][:60]
    with open(work / "texts.jsonl", "w") as f:
        f.writelines(json.dumps({"text": text, "label": "abc"[i % 3]}) + "\n" for i, text in enumerate(texts))
    return texts


def _models(work: Path, texts: list[str]) -> None:
    from tokenizers import ByteLevelBPETokenizer

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=264, special_tokens=["<eos>", "<pad>"], show_progress=False)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<eos>", pad_token="<pad>"
    )
    torch.manual_seed(0)
    shape = {
        "vocab_size": 264,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": tokenizer.pad_token_id,
    }
    llama = transformers.LlamaConfig(
        **shape, num_key_value_heads=2, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=True
    )
    bert = transformers.BertConfig(**shape, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    for name, model in (
        ("causal_lm", transformers.LlamaForCausalLM(llama)),
        ("classification", transformers.BertModel(bert)),
    ):
        model.save_pretrained(work / f"{name}-model")
        tokenizer.save_pretrained(work / f"{name}-model")


def _run(work: Path, task: str, stage: int, ranks: int, dtype: str) -> None:
    run = work / f"{task}-zero{stage}"
    config = {
        "task": task,
        "model": {"path": str(work / f"{task}-model"), "dtype": dtype},
        "data": {
            "train": str(work / "texts.jsonl"),
            "eval": str(work / "texts.jsonl"),
            "max_length": 64,
            "overlength": "split" if task == "causal_lm" else "truncate",
        },
        "batch": {"size": 6},
        "optim": {"lr": 3e-3, "warmup": 2, "weight_decay": 0.1},
        "train": {"steps": 20, "log_every": 1, "eval_every": 10},
        "parallel": {"zero": stage},
        "checkpoint": {"every": 10, "keep": 9, "best_by": "eval.loss"},
        "run": {"dir": str(run), "offline": True, "device": "cpu", "threads": 1},
    }
    file = work / f"{run.name}.yaml"
    file.write_text(yaml.safe_dump(config))
    subprocess.run(
        [sys.executable, "-m", "fastft", "launch", "--nproc", str(ranks), "train", str(file)],
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = {
        "losses": [r["loss"] for r in lines if r["kind"] == "train"],
        "eval": [r["loss"] for r in lines if r["kind"] == "eval"],
    }
    (run / "losses.json").write_text(json.dumps(kept))
    head = [line for line in (run / "metrics.jsonl").read_text().splitlines() if json.loads(line).get("step", 0) <= 10]
    (run / "metrics.jsonl").write_text("\n".join(head) + "\n")
    for name in ("logs", "model", "checkpoints/step-20", ".lock"):
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for name in ("LATEST", "BEST"):  # as they were at step 10
        path = run / "checkpoints" / name
        path.write_text(json.dumps({**json.loads(path.read_text()), "step": 10}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
