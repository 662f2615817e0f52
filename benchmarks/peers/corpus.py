"""datatrove's own blocks from JSON lines to files of tokens, by its local executor.

    python benchmarks/peers/corpus.py SPEC.json

The last line printed is a JSON object: ``seconds``, ``documents`` read and kept, ``tokens``, ``blocks`` (seconds of
each, of all tasks together), ``versions``.
"""

import json
import sys
import time
from importlib import metadata

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter, LambdaFilter
from datatrove.pipeline.formatters import FTFYFormatter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
from datatrove.utils.word_tokenizers import WordTokenizer


class Words(WordTokenizer):
    """By white space."""

    def word_tokenize(self, text):
        return text.split()

    def sent_tokenize(self, text):
        raise NotImplementedError

    span_tokenize = sent_tokenize


def main():
    with open(sys.argv[1]) as f:
        spec = json.load(f)
    least, language = spec["least"], {"language": Words()} if spec["split"] else {}
    steps = [
        JsonlReader(spec["texts"]),
        FTFYFormatter(normalization="NFC"),
        LambdaFilter(lambda document: len(document.text) >= least),
        GopherRepetitionFilter(**language),
        GopherQualityFilter(**language),
        DocumentTokenizer(
            spec["output"], tokenizer_name_or_path=spec["tokenizer"], eos_token=spec["end"], shuffle_documents=False
        ),
    ]
    executor = LocalPipelineExecutor(steps, tasks=2, workers=2, logging_dir=spec["logs"])
    start = time.perf_counter()
    found = executor.run().stats
    seconds = time.perf_counter() - start
    print(
        json.dumps(
            {
                "seconds": seconds,
                "documents": [found[0].stats["documents"].total, found[-2].stats["forwarded"].total],
                "tokens": found[-1].stats["tokens"].total,
                "blocks": {type(step).__name__: one.time_stats.total for step, one in zip(steps, found, strict=True)},
                "versions": {name: metadata.version(name) for name in ("datatrove", "spacy", "tokenizers", "ftfy")},
            }
        )
    )


if __name__ == "__main__":
    main()
