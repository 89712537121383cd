"""Attention to a window of tokens, in time and memory linear in the length.

The tokens of a batch count as one row of T, document after document, padding included. It is cut into n blocks of w
tokens, w being the largest distance at which a token is seen; each block attends to its own keys and those of the
blocks before and after it, 3 w in all, under a mask:

    keys     | block b-1 | block b | block b+1 |
    queries              | block b |              a query sees 2 w + 1 of the 3 w keys, those of its document

Never is there a mask of length x length, and short documents share a block. Blocks are gathered, and their contexts
gathered back, by indices that all layers share: one copy each, whatever the layout. The last block is filled up with
the last token, whose window holds the token itself, so that no row of a softmax is empty. Nothing here computes with
shapes but `together`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from jql_export.families.base import EncoderSpec
from jql_export.graph.writer import GraphWriter

TOKENS = "window.tokens"  # int64 [T] or [B, L], as activations are: the number of each token
QUERIES = "window.queries"  # int64 [n, w]: the tokens of each block
KEYS = "window.keys"  # int64 [n, 3 w]: those and their neighbors
MASK = "window.mask"  # bool [n, 1, w, 3 w]: which key each query sees
BIAS = "window.bias"  # the same as what is added to scores, in the type of the encoder
# The same in a view of the activations in which every head of every token is a row [T * heads, head size].
HEAD_TOKENS = "window.head_tokens"  # int64 [B, L, heads], rows of contexts [n, heads, w, head size]
HEAD_QUERIES = "window.head_queries"  # int64 [n, heads, w]
HEAD_KEYS = "window.head_keys"  # int64 [n, heads, 3 w]
BLOCKS, HEAD_BLOCKS = (QUERIES, KEYS, KEYS), (HEAD_QUERIES, HEAD_KEYS, HEAD_KEYS)


def number_rectangle(g: GraphWriter, attention_mask: str | None = None) -> str:
    """Number the tokens of input_ids [B, L] as TOKENS; return their documents' numbers, 0 for all padding."""
    one, last = g.weight("one", np.array(1, np.int64)), g.ints(-1)
    each = g.op("Cast", g.op("Equal", "input_ids", "input_ids"), to=TensorProto.INT64)
    row, column = g.op("CumSum", each, g.weight("zero", np.array(0, np.int64))), g.op("CumSum", each, one)
    before = g.op("Mul", g.op("Sub", row, one), g.op("Gather", column, last, axis=1))
    g.op("Sub", g.op("Add", before, column), one, output=TOKENS)
    return row if attention_mask is None else g.op("Mul", row, attention_mask)


def prepare_windows(g: GraphWriter, spec: EncoderSpec, documents: str, together: int | None = None) -> None:
    """Add QUERIES, KEYS and MASK; tokens see each other where their numbers in `documents` are the same.

    TOKENS must be there already, of the shape of `documents`. With `together` blocks come in groups of up to that many,
    and n stands for two axes: groups, and blocks of a group.
    """
    window, zero = _window(spec), g.weight("zero", np.array(0, np.int64))
    numbers, documents = g.op("Reshape", TOKENS, g.ints(-1)), g.op("Reshape", documents, g.ints(-1))
    last = g.op("Gather", numbers, g.ints(-1))
    starts = g.op("Slice", numbers, g.ints(0), g.ints(np.iinfo(np.int64).max), g.ints(0), g.ints(window))
    starts = g.op("Unsqueeze", starts if together is None else _grouped(g, starts, window, together), g.ints(-1))
    queries = g.op("Add", starts, g.weight("window.block", np.arange(window)))
    queries = g.op("Min", queries, last, output=QUERIES)
    beside = g.op("Add", starts, g.weight("window.blocks", np.arange(-window, 2 * window)))
    keys = g.op("Max", g.op("Min", beside, last), zero, output=KEYS)
    of_queries = g.op("Unsqueeze", g.op("Gather", documents, queries), g.ints(-1))
    of_keys = g.op("Unsqueeze", g.op("Gather", documents, keys), g.ints(-2))
    exists = g.op("Unsqueeze", g.op("Equal", beside, keys), g.ints(-2))
    near = g.op("And", exists, g.weight("window.near", _within(window, window)))
    g.op("Unsqueeze", g.op("And", g.op("Equal", of_queries, of_keys), near), g.ints(-3), output=MASK)


def prepare_heads(g: GraphWriter, spec: EncoderSpec) -> None:
    """Add HEAD_TOKENS, HEAD_QUERIES and HEAD_KEYS."""
    window, heads = _window(spec), spec.n_attention_heads
    count, width = (g.weight(f"window.{name}", np.array(n)) for name, n in (("heads", heads), ("width", window)))
    head = g.weight("window.head", np.arange(heads)[:, None])
    for name, output in ((QUERIES, HEAD_QUERIES), (KEYS, HEAD_KEYS)):
        g.op("Add", g.op("Mul", g.op("Unsqueeze", name, g.ints(-2)), count), head, output=output)
    block, place = g.op("Div", TOKENS, width), g.op("Mod", TOKENS, width)
    first = g.op("Add", g.op("Mul", block, g.weight("window.rows", np.array(heads * window))), place)
    g.op(
        "Add",
        g.op("Unsqueeze", first, g.ints(-1)),
        g.weight("window.starts", np.arange(heads) * window),
        output=HEAD_TOKENS,
    )


def rows(g: GraphWriter, x: str, width: int) -> str:
    """X as rows of `width` values, which the indices above count."""
    return g.op("Reshape", x, g.ints(-1, width))


def blocks_of(g: GraphWriter, qkv: Sequence[str], width: int, indices: Sequence[str] = BLOCKS) -> list[str]:
    """Queries [n, w, D] and keys and values [n, 3 w, D], with HEAD_BLOCKS [n, heads, w, d] and [n, heads, 3 w, d]."""
    return [g.op("Gather", rows(g, x, width), index) for x, index in zip(qkv, indices, strict=True)]


def joined(g: GraphWriter, contexts: str, spec: EncoderSpec) -> str:
    """Contexts as activations are of those of the blocks, [n, w, D]."""
    return g.op("Gather", rows(g, contexts, spec.hidden_size), TOKENS)


def joined_heads(g: GraphWriter, contexts: str, spec: EncoderSpec) -> str:
    """The same [B, L, D] of [n, heads, w, d]."""
    found = g.op("Gather", rows(g, contexts, spec.head_size), HEAD_TOKENS)
    return g.op("Reshape", found, g.ints(0, 0, spec.hidden_size))


def unseen_bias(g: GraphWriter) -> None:
    """Add BIAS: 0 for what is seen, for the rest what leaves nothing of any score."""
    unseen = np.array(-65504 if g.dtype == np.float16 else -1e30, np.float32)
    values = [g.parameter(f"window.{name}", v) for name, v in (("seen", np.zeros((), np.float32)), ("unseen", unseen))]
    g.op("Where", MASK, *values, output=BIAS)


def seen_by_first(g: GraphWriter, x: str, spec: EncoderSpec, axis: int = 1) -> str:
    """Of keys or values [B, L, D], or of a mask over them, what is in the window of a document's first token."""
    return g.op("Slice", x, g.ints(0), g.ints(_window(spec) + 1), g.ints(axis))


def _window(spec: EncoderSpec) -> int:
    assert spec.window is not None, "no layer of this encoder has a window"
    return spec.window


def _within(window: int, distance: int) -> NDArray[np.bool_]:
    """Which keys of three blocks are at most `distance` from each query of the middle one, [w, 3 w]."""
    query, key = np.arange(window)[:, None], np.arange(3 * window) - window
    near: NDArray[np.bool_] = np.abs(query - key) <= distance
    return near


def _grouped(g: GraphWriter, starts: str, window: int, together: int) -> str:
    """Starts of blocks [groups, blocks], as many in each group; there may be a few more blocks than in `starts`."""
    n = g.op("Shape", starts)
    groups = _divided(g, n, g.ints(together))
    size = _divided(g, n, groups)
    zero, one = g.weight("zero", np.array(0, np.int64)), g.weight("one", np.array(1, np.int64))
    numbers = g.op("Range", zero, g.op("Squeeze", g.op("Mul", groups, size)), one)
    found = g.op("Mul", numbers, g.weight("window.width", np.array(window)))
    return g.op("Reshape", found, g.op("Concat", groups, size, axis=0))


def _divided(g: GraphWriter, n: str, by: str) -> str:
    """N / by, rounded up."""
    one = g.weight("one", np.array(1, np.int64))
    return g.op("Div", g.op("Sub", g.op("Add", n, by), one), by)
