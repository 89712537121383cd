"""Checkpoint and heads -> a certified bundle, written aside and renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from jql_engine.bundle import (
    FORMAT,
    MANIFEST,
    Bundle,
    EncoderInfo,
    HeadInfo,
    Manifest,
    TokenizerInfo,
    Variant,
    describe_files,
    sha256_of,
)
from jql_engine.errors import BundleError
from jql_engine.sessions.cpu import CpuSession
from jql_engine.tokens import Tokenizer
from jql_export import parity, probes
from jql_export.checkpoint import FAMILIES, EncoderSpec, EncoderWeights, read_config, read_encoder
from jql_export.dialects import VARIANTS
from jql_export.foreign import VARIANT as FOREIGN
from jql_export.foreign import ForeignEncoder, Shape, explained, read_foreign, read_shape, write_foreign
from jql_export.graph import Pooling, write_graph
from jql_export.heads import HeadWeights, StackedHeads, check_heads, stack
from jql_export.hub import Checkpoint
from jql_export.reference import Reference
from jql_export.settings import KNOWN_POOLING, max_tokens_of, pooling_of
from jql_export.tokenizer import prove_fast, write_tokenizer
from jql_export.tolerances import TOLERANCES


def export_bundle(
    checkpoint: Checkpoint,
    heads: Sequence[HeadWeights] | None,
    out: Path,
    pooling: str | None = None,
    max_tokens: int | None = None,
    variants: Sequence[str] = ("cpu-fp32",),
    overwrite: bool = False,
    report: Callable[[str], None] = lambda _: None,
    encoder_onnx: Path | None = None,
) -> Bundle:
    """Fuse encoder and heads into one graph per variant, prove each against PyTorch, and write the bundle `out`.

    `heads` None: a bundle that only embeds. `encoder_onnx`: an ONNX file of the same encoder, for the further variant
    foreign-fp32. `report` is told what happens, one sentence a step. Raises an EngineError and leaves no bundle where
    anything is wrong: CheckpointError, HeadError, TokenizerError, ParityError, or BundleError where `out` exists.
    """
    if unknown := sorted(set(variants) - set(VARIANTS)):
        raise BundleError(f"variant {unknown[0]!r} is unknown; known are {', '.join(VARIANTS)}")
    chosen_pooling = pooling_of(checkpoint.directory, pooling, report, KNOWN_POOLING.get(checkpoint.id))
    encoder = _read(checkpoint.directory, variants, encoder_onnx, report)
    limit = max_tokens_of(checkpoint.directory, encoder.shape.max_positions, max_tokens)
    if heads is not None:
        check_heads(heads, encoder.shape.hidden_size)
    heads = heads or ()
    with _written_aside(out, overwrite) as folder:
        (folder / "graphs").mkdir()
        stacked = stack(heads, encoder.shape.hidden_size)
        _write_heads(folder, stacked)
        tokenizer = _write_tokenizer(folder, checkpoint, encoder.shape.pad_id, report)
        draft = _manifest(checkpoint, encoder, heads, chosen_pooling, limit, tokenizer)
        for name in encoder.variants:
            report(f"writing graph {name}")
            _write_graph(folder / "graphs" / f"{name}.onnx", name, encoder, stacked, chosen_pooling)
        certified = _certify(Bundle(folder, draft, ""), checkpoint, heads, chosen_pooling, encoder_onnx, report)
        final = replace(draft, variants=certified, files=describe_files(folder))
        (folder / MANIFEST).write_text(final.to_json(), encoding="utf-8")
    return Bundle.open(out)


@dataclass(frozen=True, slots=True)
class _Encoder:
    """What graphs are made of, and which."""

    shape: EncoderSpec | Shape
    weights: EncoderWeights | None  # None: an architecture of which there is a foreign graph only
    foreign: ForeignEncoder | None
    variants: tuple[str, ...]


def _read(
    directory: Path, variants: Sequence[str], encoder_onnx: Path | None, report: Callable[[str], None]
) -> _Encoder:
    known = read_config(directory).get("model_type") in FAMILIES
    weights = read_encoder(directory) if variants or known else None
    if weights is not None:
        for name in weights.unused_tensors:
            report(f"unused tensor: {name}")
        if weights.adapter:
            report(f"LoRA adapter {weights.adapter} is merged into the weights")
    shape = read_shape(directory) if weights is None else weights.spec
    if encoder_onnx is None:
        return _Encoder(shape, weights, None, tuple(variants))
    foreign = read_foreign(encoder_onnx, shape.hidden_size)
    if foreign.is_pooled:
        report(f"pooling of {FOREIGN}: that of {encoder_onnx}, which gives {foreign.output} alone")
    return _Encoder(shape, weights, foreign, (*variants, FOREIGN))


def _write_graph(file: Path, name: str, encoder: _Encoder, heads: StackedHeads, pooling: Pooling) -> None:
    if name == FOREIGN:
        assert encoder.foreign is not None
        write_foreign(file, encoder.foreign, heads, pooling)
    else:
        assert encoder.weights is not None
        write_graph(file, encoder.weights, heads, pooling, VARIANTS[name].dialect())


def _write_heads(folder: Path, heads: StackedHeads) -> None:
    tensors = {
        "hidden.weight": heads.hidden_weight,
        "hidden.bias": heads.hidden_bias,
        "output.weight": heads.output_weight,
        "output.bias": heads.output_bias,
    }
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, folder / "heads.safetensors")


def _write_tokenizer(folder: Path, checkpoint: Checkpoint, pad_id: int, report: Callable[[str], None]) -> TokenizerInfo:
    file = folder / "tokenizer.json"
    info = write_tokenizer(checkpoint.directory, file, pad_id)
    texts = probes.texts()
    info = prove_fast(file, info, texts)
    if info.fast:
        report(f"tokenizer: {info.fast} gives the oracle's ids on all {len(texts)} probe texts")
    else:
        report("tokenizer: no fast tokenizer gives the oracle's ids on this vocabulary; the run will use `tokenizers`")
    return info


def _certify(
    draft: Bundle,
    checkpoint: Checkpoint,
    heads: Sequence[HeadWeights],
    pooling: Pooling,
    encoder_onnx: Path | None,
    report: Callable[[str], None],
) -> dict[str, Variant]:
    tokens = probes.token_batch(Tokenizer.of(draft))
    report(f"computing {len(tokens.rows)} probe documents, {len(tokens.ids):,} tokens, with PyTorch")
    expected = Reference(checkpoint.directory, heads, pooling).run(tokens)
    certified = {}
    for name, variant in draft.manifest.variants.items():
        with explained(encoder_onnx) if encoder_onnx and name == FOREIGN else nullcontext():
            figures = parity.certify(CpuSession(draft, name), tokens, expected, TOLERANCES[variant.precision])
        report(f"parity of {name}: " + ", ".join(f"{key} {value}" for key, value in figures.items()))
        certified[name] = replace(variant, parity=figures)
    return certified


def _manifest(
    checkpoint: Checkpoint,
    encoder: _Encoder,
    heads: Sequence[HeadWeights],
    pooling: Pooling,
    max_tokens: int,
    tokenizer: TokenizerInfo,
) -> Manifest:
    """The manifest without parity figures and files."""
    shape, directory = encoder.shape, checkpoint.directory
    source = [file for file in sorted(directory.iterdir()) if file.suffix in (".safetensors", ".bin", ".json")]
    info = EncoderInfo(
        checkpoint.id,
        checkpoint.revision,
        shape.architecture,
        shape.n_layers,
        shape.hidden_size,
        files={file.name: sha256_of(file) for file in source},
        unused_tensors=list(encoder.weights.unused_tensors) if encoder.weights else [],
    )
    return Manifest(
        FORMAT,
        info,
        [HeadInfo(head.name, head.hidden_size, head.sha256, head.source, head.revision) for head in heads],
        pooling,
        max_tokens,
        tokenizer,
        {name: _variant(name) for name in encoder.variants},
        files={},
        created_with={name: version(name) for name in ("jql-engine", "torch", "transformers", "onnx", "tokenizers")},
    )


def _variant(name: str) -> Variant:
    kind = VARIANTS["standard-fp32" if name == FOREIGN else name]  # the same inputs, and for no runtime in particular
    tolerance = asdict(TOLERANCES[kind.precision])
    graph = f"{name}.onnx" if name == FOREIGN else kind.graph
    return Variant(f"graphs/{graph}", kind.layout, kind.precision, kind.provider, tolerance, parity={})


@contextmanager
def _written_aside(out: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside `out` that takes its place once all went well."""
    if out.exists() and not (out.is_dir() and overwrite and ((out / MANIFEST).is_file() or not any(out.iterdir()))):
        what = (
            "a bundle; give --overwrite to replace it"
            if (out / MANIFEST).is_file()
            else "no bundle; choose another --out"
        )
        raise BundleError(f"{out} exists and is {what}")
    out = out.resolve()
    aside = out.with_name(f".{out.name}.{os.getpid()}.writing")
    replaced = out.with_name(f".{out.name}.{os.getpid()}.replaced")
    try:
        aside.mkdir(parents=True)
    except OSError as error:
        raise BundleError(f"{aside} cannot be created: {error.strerror}; choose another --out") from error
    try:
        yield aside
        if out.exists():
            out.rename(replaced)
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if replaced.exists() and not out.exists():
            replaced.rename(out)
        shutil.rmtree(replaced, ignore_errors=True)
