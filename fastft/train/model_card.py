"""The README.md of an exported model: what it is, what it learned from, how, and what was measured."""

from __future__ import annotations

from pathlib import Path

import yaml

from fastft.assemble import Job
from fastft.versions import versions


def write(folder: Path, job: Job, results: dict) -> None:
    """Hugging Face's format: a YAML header, then Markdown.

    ``results``: ``step``, ``eval`` (metrics by set), ``exported_step``, ``stopped``; those that are known.
    """
    config = job.config
    base = config.model.path
    adapter = any(edit.wrote(folder) for edit in job.edits)
    header = {"library_name": "peft" if adapter else "transformers", "tags": ["fastft", config.task]}
    if not Path(base).exists():
        header["base_model"] = base
    lines = [
        "---",
        yaml.safe_dump(header, sort_keys=False).strip(),
        "---",
        "",
        f"# {config.task} model trained with fastft",
        "",
    ]
    lines += [
        f"Started from `{base}`." if config.model.init == "pretrained" else f"Trained from scratch (`{base}`'s shape).",
        "",
    ]
    if step := results.get("exported_step", results.get("step")):
        lines += [f"Weights after step {step:,}.", ""]
    lines += [line for edit in job.edits if (said := edit.remark(folder)) for line in (said, "")]
    lines += _data(job) + _metrics(results.get("eval", {}))
    shown = {
        name: section.model_dump(mode="json", exclude_defaults=True)
        for name in ("model", "data", "batch", "optim", "loss", "train", "parallel")
        if (section := getattr(config, name)) is not None
    }
    settings = yaml.safe_dump({k: v for k, v in shown.items() if v}, sort_keys=False).strip()
    lines += ["## Settings", "", "Those that are not fastft's defaults.", "", "```yaml", settings, "```", ""]
    lines += ["## Versions", "", ", ".join(f"{name} {version}" for name, version in versions().items()) + "."]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _data(job: Job) -> list[str]:
    splits = [s for s in (job.train, *job.evals.values()) if s is not None]
    if not splits:
        return []
    rows = [
        f"| {s.name.removeprefix('eval-')} | {s.data.meta['counts']['rows']:,} | {len(s):,} | {s.totals['tokens']:,} |"
        for s in splits
    ]
    return ["## Data", "", "| set | rows read | sequences | tokens |", "|---|---|---|---|", *rows, ""]


def _metrics(results: dict) -> list[str]:
    if not results:
        return []
    rows = [
        f"| {name} | {metric} | {value:.4g} |" for name, found in results.items() for metric, value in found.items()
    ]
    return ["## Metrics", "", "| set | metric | value |", "|---|---|---|", *rows, ""]
