"""Damaged JSON Lines, read as a job does and compared with Python's own reading, line by line."""

from __future__ import annotations

import codecs
import gzip
import json
import random
import zlib
from itertools import islice
from pathlib import Path
from typing import Any

import zstandard

from jql_engine.files.chunks import split
from tests.fuzzing.mutate import ODD, cut, damage, damage_json
from tests.fuzzing.parquet import CHUNK_BYTES, CHUNK_ROWS, opened, rows_of

PACK = {".jsonl": bytes, ".jsonl.gz": lambda raw: gzip.compress(raw, 1, mtime=0), ".jsonl.zst": zstandard.compress}
ENDS = [*[b"\n", b"\r\n", b"\n\n", b" \n"] * 4, b"\r", b"\0\n", b"\x1e\n"]
STARTS = [*[b"", b"\xef\xbb\xbf", b"\n\n", b" "] * 5, b"\xff\xfe", b"\0", b"[", b"null\n"]
LINES = [
    b"null", b"[]", b'""', b"1", b"{}", b"{", b"}", b"nan", b'{"text": NaN}', b'{"text": Infinity, "id": -Infinity}',
    b'{"text": "a", "text": "b"}', b'{"text": "\\ud800"}', b'{"text": "\\ud83d\\ude00"}', b'{"text": "\xff"}',
    b'{"text": "a\0b"}', b'{"text": "a\nb"}', b'{"text": "a\tb"}', b'{"text": "\\u0000"}', b'{"id": 1e400}',
    b'{"id": 123456789012345678901234567890}', b'{"id": ' + b"9" * 5000 + b"}", b'{"id": 1.0000000000000000001}',
    b'{"text": ' + b"[" * 1000 + b"]" * 1000 + b"}", b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"x": ' + b'{"x": ' * 500 + b"1" + b"}" * 500 + b"}", b'{"text": "' + b"x" * 300_000 + b'"}',
    b'{"text": "2024-01-01"}', b'{"text": "x"} {"text": "y"}', b"{'text': 'x'}", b'{"text": "x",}', b'{"text" "x"}',
    b'{"\\ud800": 1, "text": "x"}', b'{"text": "x", "": 1}', b'{"": 1}', b'{"id": {"a": [1, {"b": null}]}}',
    b'{"te\\u0078t": "x"}', b'{"text": "x"} // no comment', b'{"text": "\\x41"}', b"\xef\xbb\xbf{}", b"\x0c{}",
    b"\xc2\xa0{}",
]  # fmt: skip


class JsonlKind:
    """Plain, gzip and Zstandard."""

    may_crash = False

    def __init__(self, bases: Path) -> None:
        pass

    def write(self, rng: random.Random, folder: Path) -> Path:
        """Damage in the documents, in the lines, or in what they are packed in."""
        suffix = rng.choice(list(PACK))
        content = self._lines(rng)
        kind = rng.randrange(4)
        content = damage(rng, content) if kind == 0 else content
        content = PACK[suffix](content)
        if kind == 1 or (kind == 0 and suffix != ".jsonl"):
            content = rng.choice([damage, cut])(rng, content)
        if rng.random() < 0.05:
            content += rng.choice([b"\0", b"x", content, b"\x1f\x8b", b"\0" * 100])
        for old in folder.glob("case.jsonl*"):
            old.unlink()
        file = folder / f"case{suffix}"
        file.write_bytes(content)
        return file

    def _lines(self, rng: random.Random) -> bytes:
        ids = rng.choice(
            [range(1_000), "abcdefgh", [1.5, 2, -3.25], [2**63, 1], [True], [None], [None, 1], [{"a": 1}, None]]
        )
        lines = []
        for i in range(rng.choice([0, 1, 3, 30])):
            document: dict[str, Any] = {
                "text": f"text {i} süß 🌙" * rng.randrange(4),
                "id": ids[i % len(ids)],
                "x": [i, {}],
            }
            lines.append(json.dumps(document, ensure_ascii=rng.random() < 0.5).encode())
        for _ in range(rng.choice([0, 0, 1, 2])):
            odd = rng.choice(LINES) if rng.random() < 0.6 else _odd_document(rng)
            lines.insert(rng.randint(0, len(lines)), odd)
        end = rng.choice(ENDS)
        return rng.choice(STARTS) + end.join(lines) + rng.choice([b"", end])

    def read(self, file: Path) -> None:
        """Texts and ids as Python's json reads them."""
        found = opened(file)
        chunks = list(split([found], CHUNK_ROWS, CHUNK_BYTES))
        in_a_row = rows_of(found, [chunks])
        # Each one opens the file again, and there may be as many as documents.
        alone = rows_of(found, [[chunk] for chunk in islice(chunks, 5)])
        try:
            documents = [json.loads(line.decode("utf-8-sig", "surrogateescape")) for line in _documents(file)]
        except RecursionError:  # pyarrow passes over what is deep and not asked for
            return
        assert in_a_row[0] == [_text(document.get("text")) for document in documents], "other texts than Python's"
        assert alone[0] == in_a_row[0][: len(alone[0])], "other texts where a chunk is read alone"
        if found.columns.id:
            ids = [_value(document.get("id")) for document in documents]
            assert [_value(value) for value in in_a_row[1]] == ids, "other ids than Python's"


def _odd_document(rng: random.Random) -> bytes:
    document = {"text": "odd", "id": 7, "x": {"y": [1, "z", None]}}
    text = damage_json(
        rng, document if rng.random() < 0.7 else {**document, rng.choice(["text", "id"]): rng.choice(ODD)}
    )
    return text.encode("utf-8", "surrogatepass")


def _documents(file: Path) -> list[bytes]:
    content = file.read_bytes()
    if file.suffix == ".gz" and content:
        content = _gunzipped(content)
    elif file.suffix == ".zst" and content:
        content = zstandard.ZstdDecompressor().stream_reader(content, read_across_frames=True).read()
    return [line for line in content.split(b"\n") if line.removeprefix(codecs.BOM_UTF8).strip()]


def _gunzipped(content: bytes) -> bytes:
    parts = []
    while content:
        stream = zlib.decompressobj(31)
        parts.append(stream.decompress(content))
        assert stream.eof, "Python finds the stream incomplete"
        content = stream.unused_data
    return b"".join(parts)


def _text(value: Any) -> str | None:
    try:
        return value if value is None else value.encode("utf-8", "surrogateescape").decode()
    except UnicodeError:
        return None


def _value(value: Any) -> Any:
    """What is the same id: numbers as floats, texts as bytes, objects by what is in them."""
    if isinstance(value, int | float):
        return f"{float(value):.15g}"
    if isinstance(value, str):
        return value.encode(
            "utf-8", "surrogatepass" if any("\ud800" <= c < "\udc80" for c in value) else "surrogateescape"
        )
    if isinstance(value, dict):
        return {key: _value(item) for key, item in value.items() if item is not None}
    return [_value(item) for item in value] if isinstance(value, list) else value
