"""Checkpoint and heads -> a certified bundle, written aside and renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
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
from jql_engine.errors import BundleError, CheckpointError
from jql_engine.sessions.cpu import CpuSession
from jql_engine.tokens import Tokenizer
from jql_export import parity, probes
from jql_export.checkpoint import HUB_PATTERNS, EncoderWeights, read_encoder
from jql_export.graph import VARIANTS, Pooling, write_graph
from jql_export.heads import HeadWeights, StackedHeads, check_heads, stack
from jql_export.reference import Reference
from jql_export.settings import max_tokens_of, pooling_of
from jql_export.tokenizer import prove_fast, write_tokenizer
from jql_export.tolerances import TOLERANCES


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An encoder on disk and where it came from."""

    directory: Path
    id: str
    revision: str | None


def find_checkpoint(encoder: str, revision: str | None = None) -> Checkpoint:
    """A local directory as it is, or the snapshot of a hub id; raises CheckpointError."""
    if Path(encoder).is_dir():
        return Checkpoint(Path(encoder), Path(encoder).resolve().name, None)
    try:
        directory = Path(snapshot_download(encoder, revision=revision, allow_patterns=HUB_PATTERNS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{encoder} is neither a directory here nor a model that the hub gave: {str(error).splitlines()[0]}"
        ) from error
    return Checkpoint(directory, encoder, directory.name)


def export_bundle(
    checkpoint: Checkpoint,
    heads: Sequence[HeadWeights],
    out: Path,
    pooling: str | None = None,
    max_tokens: int | None = None,
    variants: Sequence[str] = ("cpu-fp32",),
    overwrite: bool = False,
    report: Callable[[str], None] = lambda _: None,
) -> Bundle:
    """Fuse encoder and heads into one graph per variant, prove each against PyTorch, and write the bundle `out`.

    `report` is told what happens, one sentence a step. Raises an EngineError and leaves no bundle where anything is
    wrong: CheckpointError, HeadError, TokenizerError, ParityError, or BundleError where `out` exists.
    """
    if unknown := sorted(set(variants) - set(VARIANTS)):
        raise BundleError(f"variant {unknown[0]!r} is unknown; known are {', '.join(VARIANTS)}")
    chosen_pooling = pooling_of(checkpoint.directory, pooling, report)
    weights = read_encoder(checkpoint.directory)
    limit = max_tokens_of(checkpoint.directory, weights.spec.max_positions, max_tokens)
    check_heads(heads, weights.spec.hidden_size)
    for name in weights.unused_tensors:
        report(f"unused tensor: {name}")
    if weights.adapter:
        report(f"LoRA adapter {weights.adapter} is merged into the weights")
    with _written_aside(out, overwrite) as folder:
        (folder / "graphs").mkdir()
        stacked = stack(heads)
        _write_heads(folder, stacked)
        tokenizer = _write_tokenizer(folder, checkpoint, weights, report)
        draft = _manifest(checkpoint, weights, heads, chosen_pooling, limit, tokenizer, variants)
        for name in variants:
            report(f"writing graph {name}")
            write_graph(folder / "graphs" / f"{name}.onnx", weights, stacked, chosen_pooling, VARIANTS[name].dialect())
        certified = _certify(Bundle(folder, draft, ""), checkpoint, heads, chosen_pooling, report)
        final = replace(draft, variants=certified, files=describe_files(folder))
        (folder / MANIFEST).write_text(final.to_json(), encoding="utf-8")
    return Bundle.open(out)


def _write_heads(folder: Path, heads: StackedHeads) -> None:
    tensors = {
        "hidden.weight": heads.hidden_weight,
        "hidden.bias": heads.hidden_bias,
        "output.weight": heads.output_weight,
        "output.bias": heads.output_bias,
    }
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, folder / "heads.safetensors")


def _write_tokenizer(
    folder: Path, checkpoint: Checkpoint, weights: EncoderWeights, report: Callable[[str], None]
) -> TokenizerInfo:
    file = folder / "tokenizer.json"
    info = write_tokenizer(checkpoint.directory, file, weights.spec.pad_id)
    texts = probes.texts()
    info = prove_fast(file, info, texts)
    if info.fast:
        report(f"tokenizer: {info.fast} gives the oracle's ids on all {len(texts)} probe texts")
    else:
        report("tokenizer: no fast tokenizer gives the oracle's ids on this vocabulary; the run will use `tokenizers`")
    return info


def _certify(
    draft: Bundle, checkpoint: Checkpoint, heads: Sequence[HeadWeights], pooling: Pooling, report: Callable[[str], None]
) -> dict[str, Variant]:
    tokens = probes.token_batch(Tokenizer.of(draft))
    report(f"computing {len(tokens.rows)} probe documents, {len(tokens.ids):,} tokens, with PyTorch")
    expected = Reference(checkpoint.directory, heads, pooling).run(tokens)
    certified = {}
    for name, variant in draft.manifest.variants.items():
        figures = parity.certify(CpuSession(draft, name), tokens, expected, TOLERANCES[variant.precision])
        report(f"parity of {name}: " + ", ".join(f"{key} {value}" for key, value in figures.items()))
        certified[name] = replace(variant, parity=figures)
    return certified


def _manifest(
    checkpoint: Checkpoint,
    weights: EncoderWeights,
    heads: Sequence[HeadWeights],
    pooling: Pooling,
    max_tokens: int,
    tokenizer: TokenizerInfo,
    variants: Sequence[str],
) -> Manifest:
    """The manifest without parity figures and files."""
    spec, directory = weights.spec, checkpoint.directory
    source = [file for file in sorted(directory.iterdir()) if file.suffix in (".safetensors", ".bin", ".json")]
    encoder = EncoderInfo(
        checkpoint.id,
        checkpoint.revision,
        spec.architecture,
        spec.n_layers,
        spec.hidden_size,
        files={file.name: sha256_of(file) for file in source},
        unused_tensors=list(weights.unused_tensors),
    )
    return Manifest(
        FORMAT,
        encoder,
        [HeadInfo(head.name, head.hidden_size, head.sha256) for head in heads],
        pooling,
        max_tokens,
        tokenizer,
        {name: _variant(name) for name in variants},
        files={},
        created_with={name: version(name) for name in ("jql-engine", "torch", "transformers", "onnx", "tokenizers")},
    )


def _variant(name: str) -> Variant:
    kind = VARIANTS[name]
    tolerance = asdict(TOLERANCES[kind.precision])
    return Variant(f"graphs/{name}.onnx", kind.layout, kind.precision, kind.provider, tolerance, parity={})


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
