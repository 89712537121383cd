"""Random damage: of bytes, of JSON trees, of parquet's Thrift structs."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

INTEGERS = [0, 1, -1, 2, 127, 128, 255, 2**15, 2**31 - 1, 2**31, -(2**31), 2**32, 2**53, 2**62, 2**63 - 1, -(2**63)]
TEXTS = [
    "",
    "x",
    "..",
    "../x",
    "/tmp/x",
    "a/../b",
    "a//b",
    "a\0b",
    "\ud800",
    "\udcff",
    "é月🌙",
    "x" * 5_000,
    "nan",
    "1",
]
ODD: list[Any] = [
    None, True, False, *INTEGERS, 2**64, 10**30, 10**400, 0.5, -1.5, 1e308, float("nan"), float("inf"), *TEXTS,
    [], {}, [None], [[]], {"": None}, ["x"], [1, 2], {"a": {"b": []}},
]  # fmt: skip


def damage(rng: random.Random, content: bytes, start: int = 0, stop: int | None = None) -> bytes:
    """`content` with a few bytes between `start` and `stop` changed, lost, doubled or moved."""
    stop = len(content) if stop is None else stop
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        content, grown = _damage_once(rng, content, start, max(start, stop))
        stop += grown
    return content


def _damage_once(rng: random.Random, content: bytes, start: int, stop: int) -> tuple[bytes, int]:
    place, length = rng.randint(start, max(start, stop - 1)), rng.choice([1, 1, 2, 4, 8, 64])
    part = content[place : min(stop, place + length)]
    kind = rng.randrange(8)
    if kind < 3:
        new = bytes(byte ^ 1 << rng.randrange(8) for byte in part)
    elif kind == 3:
        new = rng.randbytes(len(part))
    elif kind == 4:
        new = rng.choice([b"\0", b"\xff", b"\x7f", b"\x80", b"\n", b"{", b'"']) * len(part)
    elif kind == 5:
        new = b""
    elif kind == 6:
        new = part * 2
    else:
        other = rng.randint(start, max(start, stop - 1))
        new = content[other : min(stop, other + length)]
    return content[:place] + new + content[place + len(part) :], len(new) - len(part)


def cut(rng: random.Random, content: bytes) -> bytes:
    """A prefix, or all without a stretch in the middle."""
    first, second = sorted(rng.randint(0, len(content)) for _ in range(2))
    return content[:first] if rng.random() < 0.7 else content[:first] + content[second:]


def damage_json(rng: random.Random, value: Any) -> str:
    """JSON of `value` with a few nodes replaced, removed, renamed, added or given twice."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        value = _damage_node(rng, value)
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    if rng.random() < 0.05:
        text = text.replace(":", ": " + "[" * rng.choice([5, 500, 100_000]), 1)
    if rng.random() < 0.05 and isinstance(value, dict) and value:  # a key given twice
        text = text[:-1] + f", {json.dumps(rng.choice(list(value)))}: {json.dumps(rng.choice(ODD))}}}"
    return text


def _damage_node(rng: random.Random, value: Any) -> Any:
    nodes = list(_nodes(value))
    if len(nodes) == 1 or rng.random() < 0.01:
        return _odd(rng)
    # Every depth as likely as any other: most nodes are a vocabulary or a list of files.
    depth = rng.choice(sorted({node[0] for node in nodes[1:]}))
    _, parent, key = rng.choice([node for node in nodes if node[0] == depth])
    kind = rng.randrange(8)
    if kind < 3:
        parent[key] = _odd(rng)
    elif kind == 3:
        del parent[key]
    elif kind == 4:
        parent[key] = _similar(rng, parent[key])
    elif kind == 5:
        _, other, place = rng.choice(nodes[1:])
        parent[key] = copy.deepcopy(other[place]) if place in other or isinstance(other, list) else None
    elif isinstance(parent, dict):
        parent[rng.choice([*TEXTS, *map(str, parent)])] = copy.deepcopy(parent[key]) if kind == 6 else parent.pop(key)
    else:
        parent.insert(key, copy.deepcopy(parent[key]) if kind == 6 else _odd(rng))
    return value


def _odd(rng: random.Random) -> Any:
    """A copy, since damage after this one may change it."""
    return copy.deepcopy(rng.choice(ODD))


def _nodes(value: Any, depth: int = 0) -> Iterator[tuple[int, Any, Any]]:
    """(depth, container, key) of every node, the root first."""
    if not depth:
        yield 0, None, None
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield depth + 1, value, key
        yield from _nodes(value[key], depth + 1)


def _similar(rng: random.Random, value: Any) -> Any:
    """Of the same type, or nearly."""
    if isinstance(value, bool) or value is None:
        return rng.choice([not value, int(bool(value))])
    if isinstance(value, int):
        return rng.choice(
            [value + 1, value - 1, -value, value * 2, value + 0.5 if abs(value) < 2**64 else 0.5, str(value)]
        )
    if isinstance(value, float):
        return rng.choice([-value, value * 1e3, value + 1e-7, str(value)])
    if isinstance(value, str):
        return rng.choice([value + "x", value[:-1], value.upper(), [value], f"../{value}", value + "/", value + "\0"])
    if isinstance(value, list):
        return rng.choice([value * 2, value[:-1], [value], value[::-1], dict(enumerate(map(str, value)))])
    return rng.choice([list(value), list(map(list, value.items())), {"x": value}, dict(list(value.items())[:-1])])


# Thrift's compact protocol (https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md), as far
# as parquet uses it. A struct is a list of [field number, type, value], a list [type, values].
TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, STRUCT = 1, 2, 3, 4, 5, 6, 7, 8, 9, 12


def damage_thrift(rng: random.Random, content: bytes) -> tuple[bytes, int]:
    """The struct at the beginning of `content` with a few values changed, and how many bytes it took before."""
    struct, stop = read_struct(content, 0)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        leaves = list(_leaves(STRUCT, struct))
        change = rng.choice(leaves)
        change(rng)
    return write_struct(struct), stop


def read_struct(content: bytes, at: int) -> tuple[list[list[Any]], int]:
    """A struct and where it ends."""
    fields, number = [], 0
    while (head := content[at]) != 0:
        at += 1
        if head >> 4:
            number += head >> 4
        else:
            number, at = _read_integer(content, at)
        value, at = _read(head & 15, content, at)
        fields.append([number, head & 15, value])
    return fields, at + 1


def _read(kind: int, content: bytes, at: int) -> tuple[Any, int]:
    if kind in (TRUE, FALSE):
        return kind == TRUE, at
    if kind == BYTE:
        return content[at], at + 1
    if kind in (I16, I32, I64):
        return _read_integer(content, at)
    if kind == DOUBLE:
        return content[at : at + 8], at + 8
    if kind == BINARY:
        length, at = _read_varint(content, at)
        return content[at : at + length], at + length
    if kind == STRUCT:
        return read_struct(content, at)
    assert kind == LIST, kind
    length, inner = content[at] >> 4, content[at] & 15
    at += 1
    if length == 15:
        length, at = _read_varint(content, at)
    values = []
    for _ in range(length):
        value, at = (content[at], at + 1) if inner in (TRUE, FALSE) else _read(inner, content, at)
        values.append(value)
    return [inner, values], at


def _read_varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (content[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if content[at - 1] < 128:
            return value, at


def _read_integer(content: bytes, at: int) -> tuple[int, int]:
    value, at = _read_varint(content, at)
    return value >> 1 ^ -(value & 1), at


def write_struct(fields: list[list[Any]]) -> bytes:
    """The inverse of `read_struct`."""
    out, before = b"", 0
    for number, kind, value in fields:
        if kind in (TRUE, FALSE):
            kind = TRUE if value else FALSE
        step = number - before
        out += bytes([step << 4 | kind]) if 0 < step < 16 else bytes([kind]) + _integer(number)
        out += b"" if kind in (TRUE, FALSE) else _write(kind, value)
        before = number
    return out + b"\0"


def _write(kind: int, value: Any) -> bytes:
    if kind == BYTE:
        return bytes([value & 255])
    if kind in (I16, I32, I64):
        return _integer(value)
    if kind == DOUBLE:
        return bytes(value)
    if kind == BINARY:
        return _varint(len(value)) + bytes(value)
    if kind == STRUCT:
        return write_struct(value)
    inner, values = value
    head = bytes([len(values) << 4 | inner]) if len(values) < 15 else bytes([240 | inner]) + _varint(len(values))
    return head + b"".join(bytes([v]) if inner in (TRUE, FALSE) else _write(inner, v) for v in values)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _integer(value: int) -> bytes:
    return _varint((value << 1 ^ value >> 63) & (1 << 64) - 1)


def _leaves(kind: int, value: Any) -> Iterator[Callable[[random.Random], object]]:
    """A function for each value of a struct or list that changes it."""
    if kind == STRUCT:
        for i, field in enumerate(value):
            yield lambda _, i=i: value.pop(i)
            yield lambda rng, field=field: field.__setitem__(2, _other(rng, field[1], field[2]))
            yield from _leaves(field[1], field[2])
    elif kind == LIST:
        inner, values = value
        yield lambda rng: values.__setitem__(slice(None), rng.choice([values[:-1], values * 2, [], values[::-1]]))
        for i, one in enumerate(values):
            yield lambda rng, i=i: values.__setitem__(i, _other(rng, inner, values[i]))
            yield from _leaves(inner, one)


def _other(rng: random.Random, kind: int, value: Any) -> Any:
    if kind in (TRUE, FALSE):
        return not value
    if kind in (BYTE, I16, I32, I64):
        return rng.choice(
            [rng.choice(INTEGERS), value + 1, value - 1, -value, value * 2, value ^ 1 << rng.randrange(20)]
        )
    if kind in (DOUBLE, BINARY):
        new = rng.choice([b"", b"text", b"id", b"t\xe9xt", rng.randbytes(8), bytes(value)[::-1], bytes(value) * 2])
        return new if kind == BINARY else (new + b"\0" * 8)[:8]
    return value
