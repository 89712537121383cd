"""The graphs of a bundle: what they are made of, and each one written once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from jql_engine.bundle import Manifest
from jql_engine.errors import BundleError, DeviceError
from jql_engine.sessions.openvino import unavailable_reason
from jql_export.families.base import EncoderSpec, EncoderWeights, number, read_config
from jql_export.families.read import FAMILIES, read_encoder
from jql_export.graph.encoder import write_graph
from jql_export.onnx_encoder import VARIANT as FOREIGN
from jql_export.onnx_encoder import ForeignEncoder, Shape, read_foreign, read_shape, write_foreign
from jql_export.readouts.base import Readout
from jql_export.variants import VARIANTS

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Encoder:
    """What graphs are made of, and which."""

    shape: EncoderSpec | Shape
    weights: EncoderWeights | None  # None: an architecture of which there is a foreign graph only
    foreign: ForeignEncoder | None
    vocab_size: int  # rows of the words' table
    variants: tuple[str, ...]
    unused_tensors: tuple[str, ...] = ()  # of the checkpoint

    @property
    def has_token_types(self) -> bool:
        """Whether it adds something for a token's type; an unknown architecture may."""
        return self.weights is None or self.weights.token_type is not None


def read_sources(
    directory: Path, variants: Sequence[str], encoder_onnx: Path | None, report: Report, taken: Collection[str] = ()
) -> Encoder:
    """The encoder in `directory`, and the ONNX file of the same; raises CheckpointError.

    `taken`: names of tensors that readouts have taken.
    """
    _check_variants(variants)
    known = read_config(directory).get("model_type") in FAMILIES
    weights = read_encoder(directory) if variants or known else None
    unused = tuple(name for name in (weights.unused_tensors if weights else ()) if name not in taken)
    if weights is not None:
        for name in unused:
            report(f"unused tensor: {name}")
        if weights.adapter:
            report(f"LoRA adapter {weights.adapter} is merged into the weights")
    shape = read_shape(directory) if weights is None else weights.spec
    n_rows = number(directory, read_config(directory), "vocab_size") if weights is None else len(weights.word)
    if encoder_onnx is None:
        return Encoder(shape, weights, None, n_rows, tuple(variants), unused)
    foreign = read_foreign(encoder_onnx, shape.hidden_size)
    if foreign.is_pooled:
        report(f"pooling of {FOREIGN}: that of {encoder_onnx}, which gives {foreign.output} alone")
    return Encoder(shape, weights, foreign, n_rows, (*variants, FOREIGN), unused)


def _check_variants(variants: Sequence[str]) -> None:
    """Raise an EngineError for a variant that cannot be made or certified here."""
    if "cuda-fp16" in variants and "cuda-fp32" not in variants:
        raise BundleError(
            "variant cuda-fp16 needs cuda-fp32 beside it, for documents that overflow fp16; add --variant cuda-fp32"
        )
    for name in variants:
        if VARIANTS[name].provider == "openvino" and (reason := unavailable_reason(VARIANTS[name].precision)):
            raise DeviceError(f"variant {name} cannot be certified here: {reason}")


def write_graphs(folder: Path, draft: Manifest, encoder: Encoder, readouts: Sequence[Readout], report: Report) -> None:
    """Write every graph that the variants of `draft` name into `folder`."""
    pooling = draft.pooling
    for name, variant in draft.variants.items():
        file = folder / variant.graph
        if file.exists():
            continue
        report(f"writing graph {name}")
        if name == FOREIGN:
            assert encoder.foreign is not None
            write_foreign(file, encoder.foreign, readouts, pooling, encoder.shape.hidden_size)
            continue
        assert encoder.weights is not None
        write_graph(file, encoder.weights, readouts, pooling, VARIANTS[name].dialect())
