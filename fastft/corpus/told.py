"""What is said of a corpus: as JSON, and as tables for people."""

from __future__ import annotations

from typing import Any

from fastft.corpus.shards import Corpus

NUMBERS = ("in", "kept", "changed", "dropped")


def summary(corpus: Corpus) -> dict[str, Any]:
    """``folder``, ``manifest`` (its hash), ``totals``, ``rules`` with their numbers, ``sources``, ``encoder``."""
    manifest = corpus.manifest
    numbers = ("name", "licence", "documents", "tokens", "characters")
    return {
        "folder": str(corpus.folder),
        "manifest": corpus.digest,
        "shards": len(corpus.shards),
        "totals": manifest["totals"],
        "encoder": {name: manifest["tokens"][name] for name in ("encoder", "because")},
        "rules": {
            name: {n: rule[n] for n in (*NUMBERS, "reasons", "found") if n in rule}
            for name, rule in manifest["rules"].items()
        },
        "sources": [{name: source[name] for name in numbers} for source in manifest["sources"]],
        "removed": len(manifest.get("removed", [])),
        "not_found": manifest.get("not_found", []),
        "not_read_to_their_end": _files(manifest, "not_read_to_its_end"),
        "without_a_row": _files(manifest, "holds_no_row"),
    }


def _files(manifest: dict[str, Any], what: str) -> list[str]:
    return [file["file"] for source in manifest["sources"] for file in source["files"] if what in file]


def show(corpus: Corpus) -> None:
    """The same on the terminal."""
    from rich.markup import escape

    from fastft import terminal

    found, out = summary(corpus), terminal.console()
    rows = []
    for name, rule in found["rules"].items():
        most = sorted({**rule["reasons"], **rule.get("found", {})}.items(), key=lambda reason: -reason[1])[:3]
        why = ", ".join(f"{reason} {count:,}" for reason, count in most)
        rows.append([escape(name), *(f"{rule[number]:,}" for number in NUMBERS), escape(why)])
    terminal.print_table(out, ("rule", *NUMBERS, "why"), rows, text=("why",))
    rows = [
        [escape(s["name"]), escape(s["licence"] or "-"), f"{s['documents']:,}", f"{s['tokens']:,}"]
        for s in found["sources"]
    ]
    terminal.print_table(out, ("source", "licence", "documents", "tokens"), rows, text=("licence",))
    totals, encoder = found["totals"], found["encoder"]
    lines = [
        f"{totals['documents']:,} documents, {totals['tokens']:,} tokens in {found['shards']} shards, tokenized by "
        f"{encoder['encoder']} ({encoder['because']}).",
        f"{found['folder']}: manifest {found['manifest']}",
    ]
    lines += [f"warning: {file}: not read to its end" for file in found["not_read_to_their_end"]]
    if empty := found["without_a_row"]:
        lines.append(f"warning: {len(empty):,} files hold no row: {', '.join(empty[:5])}")
    if removed := found["removed"]:
        lines.append(f"{removed:,} documents were removed by their ids.")
    if missed := found["not_found"]:
        lines.append(f"warning: {len(missed):,} ids of remove are of no document: {', '.join(missed[:3])}")
    for line in lines:
        out.print(line, highlight=False, markup=False)
