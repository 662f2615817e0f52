"""What `manifest.json` says of a corpus."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any

from fastft.corpus.shards import FORMAT, Shard, as_json
from fastft.corpus.work import Count, libraries

if TYPE_CHECKING:
    from fastft.corpus.build import Build

SUMS = ("documents", "tokens", "characters")


def summed(shards: list[Shard]) -> dict[str, int]:
    """``SUMS`` over some shards."""
    return {name: sum(getattr(shard, name) for shard in shards) for name in SUMS}


def totals(build: Build) -> dict[str, Count]:
    """What every rule did, of all sources, in the order in which they are applied."""
    found: dict[str, Count] = {}
    for group in build.counts:
        for name, count in group.items():
            found.setdefault(name, Count()).add(count)
    return {name: found[name] for name in _order(build) if name in found}


def left_out(build: Build) -> str:
    """Of which rule how many, and why."""
    said = []
    for name, count in totals(build).items():
        if count.dropped:
            most = sorted(count.reasons.items(), key=lambda reason: (-reason[1], reason[0]))[:5]
            reasons = ", ".join(f"{reason} {number:,}" for reason, number in most)
            said.append(f"{name}: {count.dropped:,} of {count.rows:,} ({reasons})")
    return f"Left out were: {'; '.join(said)}." if said else "There is none in the files."


def _order(build: Build) -> list[str]:
    return ["reading", *(name for name, _, _ in build.rules), "tokens", "duplicates"]


def manifest_of(build: Build) -> dict[str, Any]:
    """As JSON, but for its digest."""
    from fastft import __version__

    facts = build.facts
    rules = {name: {**numbers(c), "samples": c.samples} for name, c in totals(build).items()}
    for name, kind, settings in build.rules:
        files = [{"file": f.where, "sha256": build.found[f.where]["sha256"]} for of, f in build.beside if of == name]
        if files and name in rules:
            rules[name] |= {"files": files, **kind(settings).told()}
    if "duplicates" in rules:
        rules["duplicates"] |= build.duplicates.told()
    return {
        "format": FORMAT,
        "key": build.key,
        "made_by": {"fastft": __version__, "python": platform.python_version(), **libraries(build.fast)},
        "settings": build.config.model_dump(mode="json", exclude={"output", "workers", "executor"}),
        "totals": summed(build.shards),
        "tokens": {
            "dtype": facts.dtype,
            "before": facts.before,
            "after": facts.after,
            "vocabulary": facts.vocabulary,
            "tokenizer": facts.key,
            "path": build.config.tokenizer,
            "encoder": "gigatoken" if build.fast else "tokenizers",
            "because": build.why,
        },
        "rules": rules,
        "sources": [_source(build, number) for number in range(len(build.files))],
        "shards": as_json(build.shards),
        **build.without_removal(),
        **build.removal.told(),
    }


def _source(build: Build, number: int) -> dict[str, Any]:
    source, counts = build.config.sources[number], build.counts[number]
    of = [shard for shard in build.shards if shard.source == number]
    files = [{"file": f.where, "sha256": build.found[f.where]["sha256"]} for f in build.files[number]]
    for entry, size in zip(files, build.sizes[number], strict=True):
        entry["bytes"] = size
        if why := build.broken[number].get(entry["file"]):
            entry["not_read_to_its_end"] = why
        if entry["file"] in build.empty:
            entry["holds_no_row"] = True
    return {
        "name": source.name,
        "licence": source.licence,
        **summed(of),
        "rules": {n: numbers(counts[n]) for n in _order(build) if n in counts},
        "files": files,
        "places": build.names[number],
    }


def numbers(count: Count) -> dict[str, Any]:
    """What a rule did."""
    kept = count.rows - count.dropped
    sums = {"in": count.rows, "kept": kept, "changed": count.changed, "dropped": count.dropped}
    found = {"found": dict(sorted(count.found.items()))} if count.found else {}
    return {**sums, "reasons": dict(sorted(count.reasons.items())), **found}
