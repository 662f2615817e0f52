"""What a prepared corpus holds (shards, documents, lengths), and the packed sequences of a run's step."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fastft.cli.options import JsonOpt, OverridesArg
from fastft.errors import UserError, did_you_mean
from fastft.streams import results_only

TEXT, PIECES, BAR = 2000, 200, 40  # characters and tokens of a document, and columns of a bar, on the terminal


def run(
    target: Annotated[Path, typer.Argument(help="Folder of a corpus; for --batch a run folder or configuration file.")],
    overrides: OverridesArg = None,
    shard: Annotated[int | None, typer.Option(help="Show a shard, counted from 0, and its first documents.")] = None,
    document: Annotated[
        str | None, typer.Option(help="Show a document: its id (32 hexadecimal digits), or source:file:row.")
    ] = None,
    lengths: Annotated[bool, typer.Option("--lengths", help="How long documents are, in tokens.")] = False,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Show the sequences of a step of a run, counted from 1.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Where the corpus's tokenizer is now; default: where it was.")
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """What a prepared corpus holds (shards, documents, lengths), and the packed sequences of a run's step."""
    asked = [name for name, given in _given(shard, document, lengths, batch).items() if given]
    if len(asked) > 1:
        raise UserError(f"fastft inspect: {' and '.join(asked)}: one at a time.")
    with results_only():
        if batch is not None:
            from fastft.evaluate.batch import batch as sequences

            found: Any = sequences(target, overrides or [], batch)
            shown = _show_batch
        else:
            found, shown = _of_corpus(target, overrides, asked, shard, document, tokenizer)
    if as_json:
        print(json.dumps(found))
    else:
        shown(found)


def _given(shard: int | None, document: str | None, lengths: bool, batch: int | None) -> dict[str, bool]:
    return {
        "--shard": shard is not None,
        "--document": document is not None,
        "--lengths": lengths,
        "--batch": batch is not None,
    }


def _of_corpus(
    target: Path,
    overrides: list[str] | None,
    asked: list[str],
    shard: int | None,
    document: str | None,
    tokenizer: str | None,
) -> tuple[Any, Any]:
    """What was asked for, and what shows it."""
    from fastft.corpus import inspect, told
    from fastft.corpus.shards import MANIFEST, Corpus

    if not (target / MANIFEST).is_file():
        if target.is_file() or (target / "config.yaml").is_file():
            raise UserError(f"{target}: is a run or its configuration.", "Say which step is shown: --batch 1.")
        if not target.exists() and target.parent.is_dir():
            near = [path.parent.name for path in target.parent.glob(f"*/{MANIFEST}")]
            raise UserError(f"{target}: is not there.", did_you_mean(target.name, near) or "Make it: fastft prepare.")
        raise UserError(f"{target}: is no corpus that is complete (no {MANIFEST}).", "Make it: fastft prepare.")
    if overrides:
        raise UserError(f"fastft inspect: {overrides[0]}: a corpus has no settings any more.")
    corpus = Corpus(target)
    if asked == ["--lengths"]:
        return inspect.lengths(corpus), _show_lengths
    if document is not None:
        return inspect.documents(corpus, inspect.tokenizer_of(corpus, tokenizer), document), _show_documents
    if shard is not None:
        return inspect.shard(corpus, inspect.tokenizer_of(corpus, tokenizer), shard), _show_shard
    return told.summary(corpus), lambda found: told.show(corpus)


def _show_documents(found: list[dict]) -> None:
    for entry in found:
        print(f"{entry['where']}\nid {entry['id']}, shard {entry['shard']}, document {entry['document']} of it")
        print(f"{len(entry['tokens']):,} tokens, {len(entry['text']):,} characters")
        print(f"\n{_cut(entry['text'], TEXT)}\n")
        named = zip(entry["tokens"][:PIECES], entry["pieces"], strict=False)
        more = f" ... ({len(entry['tokens']) - PIECES:,} more: --json)" if len(entry["tokens"]) > PIECES else ""
        print("tokens: " + " ".join(f"{token}:{piece}" for token, piece in named) + more)


def _show_shard(found: dict) -> None:
    print(f"shard {found['shard']} of source {found['source']} ({found['licence'] or 'no licence said'})")
    print(f"{found['documents']:,} documents, {found['tokens']:,} tokens, {found['characters']:,} characters")
    print(f"{found['folder']}: " + ", ".join(f"{name} {size:,} bytes" for name, size in found["files"].items()))
    _show_lengths(found["lengths"])
    for entry in found["first"]:
        print(f"{entry['id']}  {entry['where']}  {len(entry['tokens']):,} tokens  {_line(entry['text'])}")


def _show_lengths(found: dict) -> None:
    print(
        f"{found['documents']:,} documents, {found['tokens']:,} tokens: {found['shortest']:,} to {found['longest']:,}, "
        f"mean {found['mean']:,.1f}; " + ", ".join(f"{float(q):.0%} {n:,}" for q, n in found["quantiles"].items())
    )
    most = max(entry["documents"] for entry in found["histogram"])
    width = len(f"{found['longest']:,}") + 1
    for entry in found["histogram"]:
        bar = "#" * -(-BAR * entry["documents"] // most)
        print(f"{entry['from']:>{width},} to {entry['to']:>{width},}  {entry['documents']:>12,}  {bar}")


def _show_batch(found: list[dict]) -> None:
    for entry in found:
        print(
            f"sample {entry['sample']}: {len(entry['documents'])} documents, {len(entry['tokens']):,} tokens, "
            f"{len(entry['targets']):,} targets, {entry['padding']:,} padding"
        )
        for part in entry["documents"]:
            within = [at for at in entry["targets"] if part["start"] <= at < part["stop"]]
            print(f"  {part['start']} to {part['stop'] - 1}  {part['where']}")
            print(f"    targets {_ranges(within)}  {_line(part['text'])}")


def _ranges(positions: list[int]) -> str:
    """Positions as runs: 1-4, 9."""
    runs: list[list[int]] = []
    for at in positions:
        if runs and at == runs[-1][1] + 1:
            runs[-1][1] = at
        else:
            runs.append([at, at])
    return ", ".join(f"{a}-{b}" if a < b else str(a) for a, b in runs) or "none"


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]} ... ({len(text) - most:,} characters more: --json)"


def _line(text: str) -> str:
    return repr(text[:80])[1:-1] + (" ..." if len(text) > 80 else "")
