"""Attention to a window of tokens, in time and memory linear in the length.

Queries are cut into blocks of w tokens, w being the largest distance at which a token is seen; each block attends to
its own keys and those of the blocks before and after it, 3 w in all, under a mask:

    keys     | block b-1 | block b | block b+1 |
    queries              | block b |              a query sees 2 w + 1 of the 3 w keys

Never is there a mask of length x length. A token always sees itself, so that no row of a softmax is empty, those of
padding included; what padding computes is seen by nobody.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from jql_export.families.base import EncoderSpec
from jql_export.graph.writer import GraphWriter

MASK = "window.mask"  # bool [B * n, 1, w, 3 w], of n blocks
LENGTH = "window.length"  # int64 [1]


def prepare_windows(g: GraphWriter, spec: EncoderSpec, attention_mask: str | None = None) -> None:
    """Add the mask that all layers with windows share; `attention_mask` int64 [B, L] where there is padding."""
    window = _window(spec)
    shape = g.op("Shape", "input_ids")
    g.op("Gather", shape, g.ints(1), output=LENGTH)
    valid = attention_mask or g.op("Expand", g.ints(1), shape)
    keys = _three_blocks(g, _padded(g, g.op("Unsqueeze", valid, g.ints(2)), window, around=True), window)
    keys = g.op("Cast", g.op("Reshape", keys, g.ints(-1, 1, 1, 3 * window)), to=TensorProto.BOOL)
    near = g.weight("window.near", _within(window, window))
    itself = g.weight("window.itself", _within(window, 0))
    g.op("Or", g.op("And", keys, near), itself, output=MASK)


def _within(window: int, distance: int) -> NDArray[np.bool_]:
    """Which keys of three blocks are at most `distance` from each query of the middle one, [1, 1, w, 3 w]."""
    query, key = np.arange(window)[:, None], np.arange(3 * window) - window
    near: NDArray[np.bool_] = np.abs(query - key) <= distance
    return near[None, None]


def blocks_of(g: GraphWriter, q: str, k: str, v: str, spec: EncoderSpec) -> tuple[str, str, str]:
    """Queries [B * n, heads, w, d] and keys and values [B * n, heads, 3 w, d] of q, k and v [B, L, heads * d]."""
    window, heads, d = _window(spec), spec.n_attention_heads, spec.head_size
    queries = g.op("Reshape", _padded(g, q, window, around=False), g.ints(-1, window, heads, d))
    found = [g.op("Transpose", queries, perm=[0, 2, 1, 3])]
    for x in (k, v):
        wide = _three_blocks(g, _padded(g, x, window, around=True), window)
        found.append(g.op("Transpose", g.op("Reshape", wide, g.ints(-1, 3 * window, heads, d)), perm=[0, 2, 1, 3]))
    return found[0], found[1], found[2]


def seen_by_first(g: GraphWriter, x: str, spec: EncoderSpec, axis: int = 1) -> str:
    """Of keys or values [B, L, D], or of a mask over them, what is in the window of a document's first token."""
    return g.op("Slice", x, g.ints(0), g.ints(_window(spec) + 1), g.ints(axis))


def joined(g: GraphWriter, context: str, spec: EncoderSpec) -> str:
    """Contexts [B, L, heads * d] of those of the blocks, [B * n, heads, w, d]."""
    rows = g.op("Transpose", context, perm=[0, 2, 1, 3])
    batch = g.op("Gather", g.op("Shape", "input_ids"), g.ints(0))
    shape = g.op("Concat", batch, g.ints(-1, spec.n_attention_heads * spec.head_size), axis=0)
    return g.op("Slice", g.op("Reshape", rows, shape), g.ints(0), LENGTH, g.ints(1))


def _window(spec: EncoderSpec) -> int:
    assert spec.window is not None, "no layer of this encoder has a window"
    return spec.window


def _padded(g: GraphWriter, x: str, window: int, around: bool) -> str:
    """X [B, L, D] with zeros behind it up to whole blocks, and `around` it a block before and one after as well."""
    remainder = g.op("Mod", g.op("Neg", LENGTH), g.ints(window))
    sides = (g.ints(window), g.op("Add", remainder, g.ints(window))) if around else (g.ints(0), remainder)
    pads = g.op("Concat", g.ints(0), sides[0], g.ints(0, 0), sides[1], g.ints(0), axis=0)
    return g.op("Pad", x, pads)


def _three_blocks(g: GraphWriter, x: str, window: int) -> str:
    """[B, n, 3 w, D] of x [B, (n + 2) w, D]: each block with the one before and the one after it."""
    shape = g.op("Concat", g.ints(0, -1, window), g.op("Gather", g.op("Shape", x), g.ints(2)), axis=0)
    blocks = g.op("Reshape", x, shape)
    end = np.iinfo(np.int64).max
    parts = [
        g.op("Slice", blocks, g.ints(start), g.ints(stop), g.ints(1)) for start, stop in ((0, -2), (1, -1), (2, end))
    ]
    return g.op("Concat", *parts, axis=2)
