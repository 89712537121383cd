"""Damaged checkpoints: of heads, with a pickle inside a zip, and of encoders, JSON and safetensors."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from jql_export.families.base import EncoderWeights
from jql_export.families.read import read_encoder
from jql_export.readouts.head_file import read_head
from tests.fuzzing import bases
from tests.fuzzing.mutate import cut, damage, damage_json

CONVERSIONS = [
    lambda t: t.to(torch.float64), lambda t: t.to(torch.bfloat16), lambda t: t.to(torch.float16), lambda t: t > 0,
    lambda t: t.to(torch.int8), lambda t: t.to(torch.complex64), lambda t: t.to_sparse(), lambda t: t.to("meta"),
    lambda t: torch.nn.Parameter(t), lambda t: t[None], lambda t: t.reshape(-1), lambda t: t[:0], lambda t: t.T,
    lambda t: t * float("nan"), lambda t: t * float("inf"), lambda t: t.expand(3, *t.shape), lambda t: t.tolist(),
    lambda t: t.to(torch.float8_e4m3fn), lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    lambda t: [None for _ in t], lambda t: t[..., ::2], lambda t: t.clone().requires_grad_(), lambda t: t.sum(),
    lambda t: {"x": t}, lambda t: t.numpy(), lambda t: t * 1e30 * 1e30, lambda t: t.double() * 1e300,
]  # fmt: skip
KEYS = ["layer1.weight", "layer1.bias", "layer2.weight", "layer2.bias", "layer3.weight", "", 5, None, ("a", 1), b"x"]


class HeadKind:
    """A Lightning checkpoint."""

    may_crash = False

    def __init__(self, folder: Path) -> None:
        self.raw = bases.head(folder).read_bytes()
        self.checkpoint: dict[Any, Any] = torch.load(io.BytesIO(self.raw), weights_only=True)

    def write(self, rng: random.Random, folder: Path) -> Path:
        """Damage in a tensor or a key, in a member of the zip whose checksum is right, or anywhere."""
        kind = rng.randrange(4)
        if kind < 2:
            content = _saved(self._changed(rng), legacy=rng.random() < 0.2)
        elif kind == 2:
            content = _with_member(rng, self.raw)
        else:
            content = rng.choice([damage, cut])(rng, rng.choice([self.raw, _saved(self.checkpoint, legacy=True)]))
        file = folder / "case.ckpt"
        file.write_bytes(content)
        return file

    def _changed(self, rng: random.Random) -> Any:
        state: OrderedDict[Any, Any] = OrderedDict(self.checkpoint["state_dict"])
        for _ in range(rng.choice([1, 1, 2, 3])):
            key = rng.choice(list(state)) if state else "x"
            kind = rng.randrange(6)
            if kind < 3 and isinstance(state.get(key), torch.Tensor):
                try:
                    state[key] = rng.choice(CONVERSIONS)(state[key])
                except (RuntimeError, TypeError, NotImplementedError):
                    state[key] = rng.choice([None, 1, "x", [], {}])
            elif kind == 3:
                state[rng.choice(KEYS)] = state.pop(key, None)
            elif kind == 4:
                state.pop(key, None)
            else:
                state[rng.choice(KEYS)] = state.get(key)
        whole = {
            **self.checkpoint,
            "state_dict": rng.choice([state, state, state, dict(state), list(state.items()), None]),
        }
        return rng.choice([*[whole, state] * 4, [whole], None, 5, {"state_dict": whole}, set(KEYS[:5])])

    def read(self, file: Path) -> None:
        """The four tensors in fp32, as torch loads them; all finite, or there would be no scores."""
        head = read_head("edu", file)
        loaded: Any = torch.load(file, map_location="cpu", weights_only=True)
        state = loaded.get("state_dict", loaded)
        hidden, output = (layer.linear for layer in head.layers)
        found = (hidden.weight, hidden.bias, output.weight, output.bias)
        for key, array in zip(KEYS, found, strict=False):
            assert array.dtype == np.float32 and np.isfinite(array).all(), "not fp32, or not finite"
            np.testing.assert_array_equal(array, state[key].detach().to(torch.float32).numpy())
        assert hidden.weight.shape == (output.weight.shape[1], head.input_size) and head.input_size > 0, "empty"


def _saved(content: Any, legacy: bool = False) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=not legacy)
    return stream.getvalue()


def _with_member(rng: random.Random, raw: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(out, "w") as new:
        names = old.namelist()
        chosen = rng.choice([names[0], rng.choice(names)])
        for name in names:
            content = old.read(name)
            if name == chosen:
                content = rng.choice([damage, damage, cut])(rng, content)
            new.writestr(zipfile.ZipInfo(name), content)
    return out.getvalue()


class EncoderKind:
    """config.json and model.safetensors of two families."""

    may_crash = False

    def __init__(self, folder: Path) -> None:
        self.bases = [bases.encoder(folder, family) for family in bases.FAMILIES]

    def write(self, rng: random.Random, folder: Path) -> Path:
        """Damage in a field of the configuration, in the header of the weights, or anywhere."""
        base, copy = rng.choice(self.bases), folder / "case.encoder"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(base, copy, copy_function=os.link)
        name = rng.choice(["config.json", "config.json", "model.safetensors"])
        content = (base / name).read_bytes()
        if rng.random() < 0.2:
            content = rng.choice([damage, cut])(rng, content)
        elif name == "config.json":
            content = damage_json(rng, json.loads(content)).encode("utf-8", "surrogatepass")
        else:
            length = int.from_bytes(content[:8], "little")
            header = damage_json(rng, json.loads(content[8 : 8 + length])).encode("utf-8", "surrogatepass")
            content = len(header).to_bytes(8, "little") + header + content[8 + length :]
        (copy / name).unlink()
        (copy / name).write_bytes(content)
        return copy

    def read(self, file: Path) -> None:
        """The word embeddings as safetensors reads them, and everything in fp32."""
        weights = read_encoder(file)
        _check(weights)
        with safe_open(file / "model.safetensors", framework="pt") as stored:
            name = next(name for name in stored.keys() if name.endswith("word_embeddings.weight"))  # noqa: SIM118
            np.testing.assert_array_equal(weights.word, stored.get_tensor(name).to(torch.float32).numpy())


def _check(weights: EncoderWeights) -> None:
    spec = weights.spec
    assert len(weights.layers) == spec.n_layers > 0 and weights.word.shape[1] == spec.hidden_size, "shape"
    assert spec.head_size * spec.n_attention_heads == spec.hidden_size, "heads"
    assert spec.max_positions > 0 and 0 < spec.norm_epsilon < 1e38, "positions or epsilon"
    assert spec.inverse_frequencies is None or np.isfinite(spec.inverse_frequencies).all(), "frequencies"
    assert weights.word.dtype == np.float32 and 0 <= spec.pad_id < len(weights.word), "word embeddings"
