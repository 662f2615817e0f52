"""`fastft config init`: a commented configuration of a task to start from."""

from __future__ import annotations

from fastft.config.keys import Key, keys
from fastft.config.reference import is_for
from fastft.rooms import TASKS

TEMPLATE = """\
# A configuration of fastft. Put in your model and data, then:
#   fastft validate my.yaml           reads everything, trains nothing
#   fastft train my.yaml              any value can be changed: fastft train my.yaml optim.lr=5e-5
#   fastft config explain optim.lr    what a key means; `fastft config explain` lists the sections
# For an editor that completes and checks it: fastft config schema > fastft.schema.json, and as the first line
#   # yaml-language-server: $schema=fastft.schema.json
version: 1
task: {task}
model:
  path: path/to/model               # a folder written by save_pretrained, or a hub id
  # dtype: bf16                     # fp32 is the default
  # lora: {{r: 16}}                   # trains adapters instead of all weights
data:
  train: train.jsonl                # a file, a list of files, or a folder: {formats}
  eval: {{dev: dev.jsonl}}            # sets by name; leave it out where there is none
  max_length: 128                   # tokens; at most the model's limit
  truncation: error                 # what becomes of longer rows: {truncation}
{own}batch:
  size: 32                          # sequences per optimizer step, over all ranks; cut as memory allows
optim:
  lr: 2.0e-5
  schedule: linear                  # {schedule}
  warmup: 0.1                       # a fraction of all steps; a whole number counts steps
  # weight_decay: 0.01
train:
  epochs: 3                         # or steps: 1000
  eval_every: epoch                 # or 200 (steps), 30m; leave it out to evaluate at the end only
# parallel: {{zero: 2}}               # many ranks: fastft launch --nproc 8 train my.yaml
checkpoint:
  every: epoch                      # or 500 (steps), 30m; leave it out to save at the end and on Ctrl-C only
run:
  dir: runs/my                      # checkpoints, metrics.jsonl, model/
  # trackers: tensorboard           # or mlflow, wandb
"""


def example(task: str, formats: str) -> str:
    """A whole configuration as YAML with comments. Raises UserError for an unknown task.

    ``formats``: names of the data formats, for a comment.
    """
    TASKS.get(task)
    known = {key.path: key for key in keys() if is_for(key, task)}
    own = [key for key in known.values() if key.section == "data" and key.used]
    return TEMPLATE.format(
        task=task,
        formats=formats,
        own="".join(map(_line, own)),
        **{name: ", ".join(known[path].choices) for name, path in COMMENTS.items()},
    )


COMMENTS = {"truncation": "data.truncation", "schedule": "optim.schedule"}


def _line(key: Key) -> str:
    """A key of the task at its default: as it is where it names a column, for data have other names; else commented."""
    active = key.description.startswith("Column") and key.default != "null" and key.default != "[]"
    default = '","' if key.default == "," else key.default
    said = f"{'' if active else '# '}{key.name}: {default}"
    values = f" ({', '.join(key.choices)})" if key.choices else ""
    return f"  {said:<33} # {key.description}{values}\n"
