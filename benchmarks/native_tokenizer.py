"""How fast is libjql's tokenizer on one core, beside tokie, `tokenizers` and SentencePiece, and does its memory grow?

Method. The process is bound to one core. Every round each library, opened anew so that it remembers no word, encodes
the corpus document by document, whole and without truncation; libjql through ctypes, on a copy of the bundle whose
max_tokens are no limit. The libraries take turns; the median round counts. libjql's tokens hold each document's <s> and
</s>. The number of documents whose ids differ from those of `tokenizers` is counted once.

    memory      resident memory before and after `--words` million different words of random letters, libjql and tokie,
                each in a process of its own

    python -m benchmarks.native_tokenizer --bundle BUNDLE --corpus CORPUS.parquet --name NAME

The last line of stdout is the path of the JSON it wrote, benchmarks/results/NAME.json.
"""

from __future__ import annotations

import base64
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import string
import tempfile
import time
from collections.abc import Callable, Sequence
from ctypes import byref, c_int32, c_size_t
from functools import partial
from pathlib import Path
from typing import Annotated

import pyarrow.parquet as pq
import tokie
import typer
from tokenizers import Tokenizer

from benchmarks.table import Row, write_result
from jql_engine.bundle import MANIFEST, TOKENIZER
from tests.native.binding import NativeEngine

LIMIT = 1 << 24  # ids of one document
WORDS_PER_TEXT = 2000

Encode = Callable[[str], list[int]]
Count = Callable[[str], int]  # the number of ids, which no list of Python is made for


def main(
    bundle: Annotated[Path, typer.Option()],
    corpus: Annotated[Path, typer.Option(help="Parquet with a column `text`.")],
    name: Annotated[str, typer.Option(help="Of the result file.")],
    rounds: Annotated[int, typer.Option()] = 3,
    words: Annotated[float, typer.Option(help="Million different words.")] = 10.0,
) -> None:
    """Measure and write benchmarks/results/NAME.json."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    texts = pq.read_table(corpus)["text"].to_pylist()
    n_bytes = sum(len(text.encode()) for text in texts)
    with tempfile.TemporaryDirectory() as folder:
        unlimited = without_limit(bundle, Path(folder, "bundle"))
        openers = {
            "libjql": partial(open_native, unlimited),
            "tokie": partial(open_tokie, bundle / TOKENIZER),
            "tokenizers": partial(open_tokenizers, bundle / TOKENIZER),
            "sentencepiece": partial(open_sentencepiece, bundle / TOKENIZER),
        }
        wrong = differing(openers, texts)
        rows = {label: Row("tokenizer", label, "", len(texts), 0) for label in openers}
        for _ in range(rounds):
            for label, row in rows.items():
                row.tokens, seconds = encode_all(openers[label]()[1], texts)
                row.seconds.append(round(seconds, 3))
        memory = {label: growth(openers[label], words) for label in ("libjql", "tokie")}
    for label, row in rows.items():
        row.finish()
        print(f"{label:14} {n_bytes / min(row.seconds) / 1e6:7.1f} MB/s at best, {wrong[label]} documents differ")
    print(f"memory in MiB before and after {words} million words: {memory}")
    settings = {"bytes": n_bytes, "differing_documents": wrong, "million_words": words, "memory_mib": memory}
    print(write_result(name, list(rows.values()), settings | {"corpus": corpus.name}))


def without_limit(bundle: Path, folder: Path) -> Path:
    """The same bundle, with room for documents of any length."""
    folder.mkdir()
    for file in bundle.iterdir():
        if file.name != MANIFEST:
            (folder / file.name).symlink_to(file.resolve())
    manifest = json.loads((bundle / MANIFEST).read_text()) | {"max_tokens": LIMIT}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def open_native(bundle: Path) -> tuple[Encode, Count]:
    """Our own, through its C API."""
    engine = NativeEngine(bundle, certify=0, verify=0)
    ids, n_ids, truncated = (c_int32 * LIMIT)(), c_size_t(), c_int32()

    def count(text: str) -> int:
        content = text.encode()
        engine.call("jql_tokenize", engine._engine, content, len(content), ids, LIMIT, byref(n_ids), byref(truncated))
        return n_ids.value

    def encode(text: str) -> list[int]:
        return ids[1 : count(text) - 1]

    return encode, count


def open_tokie(file: Path) -> tuple[Encode, Count]:
    """The fast tokenizer of the Python engine."""
    tokenizer = tokie.Tokenizer.from_json(str(file))

    def ids(text: str):  # noqa: ANN202, a NumPy array
        return tokenizer.encode_batch_flat([text], add_special_tokens=False)[0]

    return lambda text: ids(text).tolist(), lambda text: len(ids(text))


def open_tokenizers(file: Path) -> tuple[Encode, Count]:
    """`tokenizers`, the oracle."""
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def encoding(text: str):  # noqa: ANN202
        return tokenizer.encode_batch_fast([text], add_special_tokens=False)[0]

    return lambda text: encoding(text).ids, lambda text: len(encoding(text))


def open_sentencepiece(file: Path) -> tuple[Encode, Count]:
    """SentencePiece, with a model of the same pieces, scores and normalization."""
    from sentencepiece import SentencePieceProcessor
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    fields, proto = json.loads(file.read_text()), ModelProto()
    kinds = dict.fromkeys(("<s>", "<pad>", "</s>", "<mask>"), ModelProto.SentencePiece.CONTROL)
    kinds["<unk>"] = ModelProto.SentencePiece.UNKNOWN
    for piece, score in fields["model"]["vocab"]:
        proto.pieces.add(piece=piece, score=score, type=kinds.get(piece, ModelProto.SentencePiece.NORMAL))
    spec = proto.trainer_spec
    spec.unk_id, spec.bos_id, spec.eos_id, spec.pad_id = 3, 0, 2, 1
    proto.normalizer_spec.precompiled_charsmap = base64.b64decode(fields["normalizer"]["precompiled_charsmap"])
    processor = SentencePieceProcessor(model_proto=proto.SerializeToString())
    return processor.encode, lambda text: len(processor.encode(text))


def differing(openers: dict[str, Callable[[], tuple[Encode, Count]]], texts: Sequence[str]) -> dict[str, int]:
    """Of each library the documents whose ids are not those of `tokenizers`."""
    encoders = {label: opener()[0] for label, opener in openers.items()}
    wrong = dict.fromkeys(encoders, 0)
    for text in texts:
        expected = encoders["tokenizers"](text)
        for label, encode in encoders.items():
            wrong[label] += encode(text) != expected
    return wrong


def encode_all(count: Count, texts: Sequence[str]) -> tuple[int, float]:
    """Ids of all texts, and the seconds."""
    started = time.perf_counter()
    n_tokens = sum(map(count, texts))
    return n_tokens, time.perf_counter() - started


def growth(opener: Callable[[], tuple[Encode, Count]], million_words: float) -> list[int]:
    """Resident memory in MiB once a library is warm, and after so many million different words."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_grow, args=(theirs, opener, million_words))
    process.start()
    found: list[int] = ours.recv()
    process.join()
    return found


def _grow(
    pipe: multiprocessing.connection.Connection, opener: Callable[[], tuple[Encode, Count]], million: float
) -> None:
    count, source = opener()[1], random.Random(1)
    warm = int(million * 1e6 / WORDS_PER_TEXT) // 10
    found = []
    for i in range(11 * warm):
        if i == warm:
            found.append(_resident_mib())
        count(" ".join("".join(source.choices(string.ascii_lowercase, k=8)) for _ in range(WORDS_PER_TEXT)))
    pipe.send([*found, _resident_mib()])


def _resident_mib() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20


if __name__ == "__main__":
    typer.run(main)
