"""Are libjql's ids those of `tokenizers`? Millions of strings, which would take too long as a test.

    python -m tests.native.differences --bundle BUNDLE [--corpus CORPUS.parquet] [--strings 10000000] [--seed 1]

Compares whole documents of the corpus and prefixes of them, every code point alone, between letters, after U+00A0 and
before U+0301, and random and mutated strings. Prints every difference, and exits with 1 if there is one.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import pyarrow.parquet as pq
from tokenizers import Tokenizer

from jql_engine.probe_texts import SENTENCES
from tests.native.binding import NativeEngine
from tests.native.strings import Source, code_points

CHUNK = 20_000  # strings that are compared at a time


def expected_ids(
    oracle: Tokenizer, texts: Sequence[str], prefix: list[int], suffix: list[int], limit: int
) -> list[list[int]]:
    """The ids of `texts` by `tokenizers`, cut as a bundle's are."""
    room = limit - len(prefix) - len(suffix)
    found = oracle.encode_batch_fast(list(texts), add_special_tokens=False)
    return [[*prefix, *encoding.ids[:room], *suffix] for encoding in found]


def differences(engine: NativeEngine, oracle: Tokenizer, texts: Sequence[str]) -> list[str]:
    """The texts whose ids differ; special tokens are <s> and </s>, 0 and 2."""
    expected = expected_ids(oracle, texts, [0], [2], engine.max_tokens)
    return [text for text, ids in zip(texts, expected, strict=True) if engine.tokenize(text)[0] != ids]


def read_oracle(file: Path) -> Tokenizer:
    """`tokenizers`, which cuts and pads nothing."""
    oracle = Tokenizer.from_file(str(file))
    oracle.no_truncation()
    oracle.no_padding()
    return oracle


def chunks(strings: Iterable[str]) -> Iterator[list[str]]:
    """`strings`, some at a time."""
    iterator = iter(strings)
    while chunk := list(islice(iterator, CHUNK)):
        yield chunk


def prefixes(corpus: Sequence[str]) -> Iterator[str]:
    """Whole documents, and their beginnings."""
    for document in corpus:
        yield document
        yield from (document[: len(document) // part] for part in (2, 3, 7))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, help="parquet with a column `text`; by default sentences")
    parser.add_argument("--strings", type=int, default=10_000_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    corpus = pq.read_table(options.corpus)["text"].to_pylist() if options.corpus else list(SENTENCES)
    oracle = read_oracle(options.bundle / "tokenizer.json")
    source = Source(options.seed, corpus)
    n_random = -(-options.strings // CHUNK)
    kinds: dict[str, Iterable[list[str]]] = {
        "documents": chunks(prefixes(corpus)),
        "code points": chunks(code_points()),
        "random": (source.take(CHUNK) for _ in range(n_random)),
    }
    n_wrong = 0
    with NativeEngine(options.bundle, certify=0, verify=0) as engine:
        for kind, parts in kinds.items():
            n, started = 0, time.monotonic()
            for part in parts:
                wrong = differences(engine, oracle, part)
                n, n_wrong = n + len(part), n_wrong + len(wrong)
                for text in wrong:
                    print(f"{kind}: {text!r}: {engine.tokenize(text)[0]}", flush=True)
            print(
                f"{kind}: {n:,} strings in {time.monotonic() - started:.0f} s, {n_wrong} differences so far", flush=True
            )
    return min(1, n_wrong)


if __name__ == "__main__":
    sys.exit(main())
