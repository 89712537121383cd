"""The JQL annotation pipeline's own building blocks: an embedder and regression heads, to be called directly.

Both give torch tensors where torch is installed and NumPy arrays where it is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jql_engine.engine import Engine
from jql_engine.integrations.checkpoints import read_tensors
from jql_engine.integrations.export_cache import exported

HEAD_TENSORS = ("layer1.weight", "layer1.bias", "layer2.weight", "layer2.bias")


def get_embedder_instance(
    model_id: str, device: Any = "auto", dtype: Any = None, bundle: str | Path | None = None
) -> Embedder:
    """An embedder of the hub id or directory `model_id`, exported once; or of a `bundle` as it is.

    `device`: as for Engine, or a torch.device. `dtype`: of the embeddings, a torch or NumPy type; fp32 without it. What
    is computed in is the bundle's precision, whatever `dtype` says.
    """
    wanted = str(device)
    place = wanted if wanted.startswith("cuda") else "cpu"
    return Embedder(Engine(bundle or exported(model_id, embed_only=True), wanted), dtype, place)


class Embedder:
    """Texts to L2-normalized embeddings."""

    def __init__(self, engine: Engine, dtype: Any = None, device: str = "cpu") -> None:
        """`dtype` and torch `device` of the embeddings."""
        self._engine, self._dtype, self._device = engine, dtype, device

    def embed(self, texts: Sequence[str]) -> Any:
        """Embeddings [n, D] of `texts`."""
        embeddings = self._engine.embed(texts)
        torch = _torch()
        if torch is None:
            return embeddings if self._dtype is None else embeddings.astype(self._dtype)
        tensor = torch.from_numpy(embeddings).to(self._device)
        return tensor if self._dtype is None else tensor.to(self._dtype)


class RegressionHead:
    """relu(x layer1.weight^T + layer1.bias) layer2.weight^T + layer2.bias, from a Lightning checkpoint."""

    def __init__(self, tensors: dict[str, Any]) -> None:
        """`tensors`: HEAD_TENSORS, [K, D], [K], [1, K] and [1]."""
        self._tensors = tensors

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, map_location: Any = None) -> RegressionHead:
        """Read tensors and nothing else of a checkpoint; raises HeadError where it holds no head of this shape."""
        tensors: dict[str, Any] = dict(read_tensors(Path(checkpoint_path), HEAD_TENSORS))
        torch = _torch()
        if torch is None:
            return cls(tensors)
        return cls({name: torch.from_numpy(value).to(map_location or "cpu") for name, value in tensors.items()})

    def to(self, *args: Any, **kwargs: Any) -> RegressionHead:
        """On another device or of another type: torch.Tensor.to's arguments, or a NumPy type."""
        move = "astype" if _torch() is None else "to"
        return RegressionHead({name: getattr(value, move)(*args, **kwargs) for name, value in self._tensors.items()})

    def eval(self) -> RegressionHead:
        """Itself: there is nothing here that training would do otherwise."""
        return self

    def __call__(self, embeddings: Any) -> Any:
        """Scores [n, 1] of `embeddings` [n, D]."""
        w1, b1, w2, b2 = (self._tensors[name] for name in HEAD_TENSORS)
        hidden = embeddings @ w1.T + b1
        hidden = np.maximum(hidden, 0) if isinstance(hidden, np.ndarray) else hidden.clamp(min=0)
        return hidden @ w2.T + b2


def _torch() -> Any:
    """The module, or None where it is not installed."""
    try:
        import torch
    except ImportError:
        return None
    return torch
