"""Operators of the CUDA graphs in plain NumPy, for onnx.reference.ReferenceEvaluator.

Each computes in fp32 and rounds to the type of its input where the CUDA kernels of ONNX Runtime 1.31 do, as their
machine code says: at the output, and at what a comment names. What a graph needs besides is onnx's own.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from onnx.reference.op_run import OpRun
from scipy.special import erf


class _Contrib(OpRun):
    op_domain = "com.microsoft"


class Gelu(_Contrib):
    def _run(self, x, **settings):  # OpRun gives it the attributes of ONNX's operator of this name
        return (gelu(x.astype(np.float32)).astype(x.dtype),)


class BiasGelu(_Contrib):
    """All of it in the type of x, but for erf itself."""

    def _run(self, x, bias):
        half, root = np.array([0.5, 0.5**0.5], x.dtype)
        total = x + bias
        weight = 1 + erf((total * root).astype(np.float32)).astype(x.dtype)
        return (((total * half) * weight).astype(x.dtype),)


class BiasSplitGelu(_Contrib):
    """left * gelu(right) of the halves of x [1, T, 2 F] + bias [2 F]."""

    WIDTHS = (1280, 2560, 3072, 5120, 6144)

    def _run(self, x, bias):
        assert x.ndim == 3 and bias.shape == x.shape[2:], (x.shape, bias.shape)
        assert x.shape[2] // 2 in self.WIDTHS, "no kernel of this width"
        total = x + bias  # rounded
        left, right = np.split(total.astype(np.float32), 2, axis=-1)
        return ((left * gelu(right)).astype(x.dtype),)


class SkipLayerNormalization(_Contrib):
    """LayerNorm(x + skip + bias)."""

    def _run(self, x, skip, gamma, beta, bias=None, epsilon=None):
        assert x.shape == skip.shape, (x.shape, skip.shape)
        total = ((x if bias is None else x + bias) + skip).astype(np.float32)  # rounded after each sum
        centered = total - total.mean(-1, keepdims=True)
        scaled = centered / np.sqrt(np.square(centered).mean(-1, keepdims=True) + np.float32(epsilon))
        return ((scaled * gamma + beta).astype(x.dtype),)


class RotaryEmbedding(_Contrib):
    """Each head of x [B, L, D] turned by the angle of its position; position_ids int64 [B, L].

    Turned together are its halves, or, `interleaved`, its neighbors.
    """

    def _run(self, x, position_ids, cos, sin, num_heads=None, is_packed_batching=0, interleaved=0, **settings):
        assert x.ndim == 3 and position_ids.shape == x.shape[:2], (x.shape, position_ids.shape)
        assert is_packed_batching or x.shape[1] <= len(cos), "more tokens than positions"
        heads = x.reshape(*x.shape[:2], num_heads, *((-1, 2) if interleaved else (2, x.shape[2] // num_heads // 2)))
        left, right = np.moveaxis(heads, -1 if interleaved else -2, 0)
        c, s = (cache[position_ids][:, :, None] for cache in (cos, sin))
        # The product with the sine is rounded, the other goes into the sum as it is.
        turned = np.stack([_times(left, c) - right * s, _times(right, c) + left * s], axis=-1 if interleaved else -2)
        return (turned.reshape(x.shape).astype(x.dtype),)


class PackedMultiHeadAttention(_Contrib):
    """Attention inside of each document of q, k, v [T, D]; document i is rows cu_seqlens[i] to cu_seqlens[i + 1]."""

    def _run(self, q, k, v, bias, token_offset, cu_seqlens, num_heads=None, **settings):
        assert bias is None and q.ndim == 2 and q.shape == k.shape == v.shape, (q.shape, k.shape, v.shape)
        assert token_offset.dtype == cu_seqlens.dtype == np.int32
        assert len(cu_seqlens) == len(token_offset) + 1 and cu_seqlens[-1] == len(q) <= token_offset.size
        spans = pairwise(cu_seqlens)
        contexts = [attention(q[i:j], k[i:j], v[i:j], num_heads) for i, j in spans]
        return (np.concatenate(contexts).astype(q.dtype),)


class RestorePadding(_Contrib):
    """Rows [T, D] where token_offset [B, S] says that they lie in a rectangle [B, S, D]; zeros besides."""

    def _run(self, x, token_offset):
        rectangle = np.zeros((token_offset.size, x.shape[1]), x.dtype)
        rectangle[token_offset.reshape(-1)[: len(x)]] = x
        return (rectangle.reshape(*token_offset.shape, -1),)


class Attention(OpRun):
    """ONNX's of opset 24: q [B, L, D] attend to the first lengths[b] of k, v [B, S, D].

    Or to all of them with `bias` [B, 1, L, S] added to the scores. ONNX's own sums the softmax in the type of q, and in
    bf16 a sum over some hundred keys stands still.
    """

    op_domain = ""

    def _run(self, q, k, v, bias=None, past_key=None, past_value=None, lengths=None, **settings):
        heads = settings["q_num_heads"]
        assert past_key is past_value is None and settings["kv_num_heads"] == heads
        assert (bias is None) != (lengths is None)
        if bias is None:
            contexts = [attention(q[i], k[i, :n], v[i, :n], heads) for i, n in enumerate(lengths)]
        else:
            assert bias.dtype == q.dtype and bias.shape == (len(q), 1, q.shape[1], k.shape[1]), bias.shape
            contexts = [attention(*one, heads, row[0]) for *one, row in zip(q, k, v, bias, strict=True)]
        return (np.stack(contexts).astype(q.dtype),)


class MatMul(OpRun):
    """ONNX's, summed in fp32 as cuBLAS does, and with its speed here."""

    op_domain = ""

    def _run(self, a, b):
        return ((a.astype(np.float32) @ b.astype(np.float32)).astype(a.dtype),)


class Gemm(OpRun):
    """The same with a bias, which the sum takes before it is rounded."""

    op_domain = ""

    def _run(self, a, b, c, alpha=None, beta=None, transA=None, transB=None):  # noqa: N803
        assert alpha == beta == 1 and not transA
        total = a.astype(np.float32) @ (b.T if transB else b).astype(np.float32) + c.astype(np.float32)
        return (total.astype(a.dtype),)


OPERATORS = [
    Gelu,
    BiasGelu,
    BiasSplitGelu,
    SkipLayerNormalization,
    RotaryEmbedding,
    PackedMultiHeadAttention,
    RestorePadding,
    Attention,
    MatMul,
    Gemm,
]


def _times(a, b):
    return a.astype(np.float32) * b.astype(np.float32)


def gelu(x):
    """X * Phi(x), with erf."""
    return x * 0.5 * (1 + erf(x / np.float32(np.sqrt(2))))


def attention(q, k, v, n_heads, bias=0):
    """softmax(q k^T / sqrt(head size) + bias) v of one document, [L, D]; k and v may be of more or fewer tokens.

    As FlashAttention computes it: scores and sums in fp32, the weights rounded to the type of q before they meet v.
    """
    dtype = q.dtype
    q, k, v = (x.astype(np.float32).reshape(len(x), n_heads, -1).swapaxes(0, 1) for x in (q, k, v))
    scores = q @ k.swapaxes(1, 2) / np.float32(np.sqrt(q.shape[2])) + np.asarray(bias, np.float32)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    context = weights.astype(dtype).astype(np.float32) @ v / weights.sum(-1, keepdims=True)
    return context.swapaxes(0, 1).reshape(context.shape[1], -1)
