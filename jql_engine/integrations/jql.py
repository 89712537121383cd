"""The JQL annotation pipeline's own building blocks: an embedder and regression heads, to be called directly.

The embedder gives torch tensors where torch is installed and NumPy arrays where it is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jql_engine.engine import Engine
from jql_engine.errors import HeadError
from jql_engine.integrations.export_cache import exported


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
    """relu(x layer1.weight^T + layer1.bias) layer2.weight^T + layer2.bias, from a Lightning checkpoint; needs torch.

    Where torch is not installed, a bundle has its heads in it: Engine(bundle).score applies them.
    """

    def __init__(self, tensors: Sequence[Any]) -> None:
        """`tensors`: torch tensors [K, D], [K], [1, K] and [1]."""
        self._tensors = tensors

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, map_location: Any = None) -> RegressionHead:
        """Read tensors and nothing else of a checkpoint; raises HeadError where it holds no head of this shape."""
        torch = _torch()
        if torch is None:
            raise HeadError(
                f"{checkpoint_path}: a checkpoint is read with torch, which is not installed; install it, or export "
                "the heads into a bundle and use Engine(bundle).score"
            )
        from jql_export.readouts.head_file import read_head

        layers = [layer.linear for layer in read_head("checkpoint", Path(checkpoint_path)).layers]
        arrays = [array for layer in layers for array in (layer.weight, layer.bias)]
        return cls([torch.from_numpy(array).to(map_location or "cpu") for array in arrays])

    def to(self, *args: Any, **kwargs: Any) -> RegressionHead:
        """On another device or of another type: torch.Tensor.to's arguments."""
        return RegressionHead([tensor.to(*args, **kwargs) for tensor in self._tensors])

    def eval(self) -> RegressionHead:
        """Itself: there is nothing here that training would do otherwise."""
        return self

    def __call__(self, embeddings: Any) -> Any:
        """Scores [n, 1] of `embeddings` [n, D]."""
        w1, b1, w2, b2 = self._tensors
        return (embeddings @ w1.T + b1).clamp(min=0) @ w2.T + b2


def _torch() -> Any:
    """The module, or None where it is not installed."""
    try:
        import torch
    except ImportError:
        return None
    return torch
