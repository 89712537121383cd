"""Checkpoint and heads -> a certified bundle, written aside and renamed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

from jql_engine import probe_texts
from jql_engine.bundle import (
    FIRST_WINDOW,
    FORMAT,
    MANIFEST,
    PROBES,
    READOUTS,
    TOKENIZER,
    Bundle,
    EncoderInfo,
    EngineKey,
    Manifest,
    Pooling,
    TokenizerInfo,
    Variant,
    WindowsInfo,
    describe_file,
    describe_files,
    sha256_of,
)
from jql_engine.errors import BundleError, CheckpointError
from jql_engine.sessions.base import ON_GPU
from jql_engine.sessions.certify import SCALED, Tolerance, certify, write_probes
from jql_engine.sessions.open import open_variant
from jql_engine.template import Template
from jql_engine.tokenizer import Tokenizer, prove_fast
from jql_export import probes
from jql_export.families.base import first_difference
from jql_export.families.read import read_encoder
from jql_export.graphs import Encoder, read_sources, write_graphs
from jql_export.hub import Checkpoint
from jql_export.onnx_encoder import VARIANT as FOREIGN
from jql_export.onnx_encoder import explained
from jql_export.place import check_place, written_aside
from jql_export.readouts.base import Readout, check_readouts, write_readouts
from jql_export.reference import Reference
from jql_export.settings import KNOWN_POOLING, check_texts, max_tokens_of, pooling_of
from jql_export.tokenizer import check_ids, difference_to_auto, tokenizer_of, write_tokenizer
from jql_export.tokenizer_settings import check_token_types, check_tokenizer
from jql_export.tolerances import tolerance_of
from jql_export.variants import VARIANTS


def export_bundle(
    checkpoint: Checkpoint,
    readouts: Sequence[Readout],
    out: Path,
    pooling: str | None = None,
    max_tokens: int | None = None,
    variants: Sequence[str] = ("cpu-fp32",),
    overwrite: bool = False,
    report: Callable[[str], None] = lambda _: None,
    encoder_onnx: Path | None = None,
    build: Callable[[Bundle], Mapping[str, EngineKey]] = lambda _: {},
    template: Template | None = None,
    windows: WindowsInfo = FIRST_WINDOW,
) -> Bundle:
    """Fuse encoder and heads into one graph per variant, prove each against PyTorch, and write the bundle `out`.

    No `readouts`: a bundle that only embeds. `encoder_onnx`: an ONNX file of the same encoder, for the further variant
    foreign-fp32. `build` writes engines into the
    bundle and returns what they are, for the manifest. `template`: how documents are put together from several columns;
    `windows`: those of long documents that are scored by default. `report` is told what happens, one sentence a step.
    Raises an EngineError and leaves no bundle where anything is wrong: CheckpointError, HeadError, TokenizerError,
    ParityError, or BundleError where `out` exists.
    """
    if unknown := sorted(set(variants) - set(VARIANTS)):
        raise BundleError(f"variant {unknown[0]!r} is unknown; known are {', '.join(VARIANTS)}")
    check_place(out, overwrite)
    # A head that does not say how it pools reads the embedding, of which a classifier beside it knows nothing.
    own = readouts[0].pooling if all(readout.pooling for readout in readouts) and readouts else None
    known = KNOWN_POOLING.get(checkpoint.id) or own
    chosen_pooling = pooling_of(checkpoint.directory, pooling, report, known)
    for directory in (checkpoint.directory, *_others(checkpoint.directory, readouts)):
        check_texts(directory)
    taken = _taken(checkpoint.directory, readouts)
    encoder = read_sources(checkpoint.directory, variants, encoder_onnx, report, taken)
    _check_shared(checkpoint.directory, encoder, readouts, report)
    limit = max_tokens_of(checkpoint.directory, encoder.shape.max_positions, max_tokens)
    if max_tokens is None:
        _check_limits(checkpoint.directory, limit, encoder.shape.max_positions, readouts)
    check_readouts(readouts, encoder.shape.hidden_size)
    with written_aside(out, overwrite, report) as folder:
        (folder / "graphs").mkdir()
        write_readouts(folder / READOUTS, readouts)
        tokenizer = _write_tokenizer(folder, checkpoint, encoder, readouts, report)
        if limit <= (around := len(tokenizer.prefix) + len(tokenizer.suffix)):
            raise CheckpointError(
                f"{limit} tokens, by --max-tokens or {checkpoint.directory}, leave no room for text between {around} "
                "special tokens"
            )
        draft = _manifest(checkpoint, encoder, readouts, pooling=chosen_pooling, max_tokens=limit, tokenizer=tokenizer)
        draft = _with_documents(draft, template, windows)
        write_graphs(folder, draft, encoder, readouts, report)
        certified = _certify(Bundle(folder, draft, ""), checkpoint, readouts, encoder_onnx=encoder_onnx, report=report)
        files = describe_files(folder)
        engines = dict(build(Bundle(folder, replace(draft, variants=certified, files=files), "")))
        files |= {name: describe_file(folder / name) for name in engines}
        final = replace(draft, variants=certified, files=files, engines=engines)
        (folder / MANIFEST).write_text(final.to_json(), encoding="utf-8")
    return Bundle.open(out)


def _check_shared(
    directory: Path, encoder: Encoder, readouts: Sequence[Readout], report: Callable[[str], None]
) -> None:
    """Raise CheckpointError where a classifier was trained on another encoder than that of `directory`, or other ids.

    Files of the same tokenizer may ask for other ids beside it, as truncation_side does.
    """
    for other, name in _others(directory, readouts).items():
        weights = None if encoder.weights is None else read_encoder(other)
        found = None if encoder.weights is None or weights is None else first_difference(encoder.weights, weights)
        if weights is None or found is not None:
            what = "that is known by its ONNX file alone" if weights is None else f"{found} differs"
            raise CheckpointError(
                f"classifier {name}: the encoder in {other} is not that in {directory}: {what}; classifiers share a "
                "bundle where they share an encoder, so export one for each"
            )
        if tokenizer_of(directory) != tokenizer_of(other):
            raise CheckpointError(
                f"classifier {name}: {other} has no {TOKENIZER} that equals that of {directory}; export one for each"
            )
        check_tokenizer(other)
        for tensor in sorted(set(weights.unused_tensors) - _taken(other, readouts)):
            report(f"unused tensor of classifier {name}: {tensor}")


def _taken(directory: Path, readouts: Sequence[Readout]) -> set[str]:
    """Names of the tensors in `directory` that classifiers read."""
    return {name for readout in readouts if readout.checkpoint == directory for name in readout.tensors}


def _others(directory: Path, readouts: Sequence[Readout]) -> dict[Path, str]:
    """Checkpoints of classifiers besides `directory`, each with the name of one that is read from there."""
    return {r.checkpoint: r.name for r in readouts if r.checkpoint is not None and r.checkpoint != directory}


def _check_limits(directory: Path, limit: int, max_positions: int, readouts: Sequence[Readout]) -> None:
    """Raise CheckpointError where classifiers that share a pass read documents of different length."""
    for other in _others(directory, readouts):
        if (found := max_tokens_of(other, max_positions, None)) != limit:
            raise CheckpointError(
                f"{directory} reads {limit} tokens of a document, {other} {found}; say which it is: --max-tokens"
            )


def _write_tokenizer(
    folder: Path,
    checkpoint: Checkpoint,
    encoder: Encoder,
    readouts: Sequence[Readout],
    report: Callable[[str], None],
) -> TokenizerInfo:
    file = folder / TOKENIZER
    texts = probe_texts.texts()
    plain = write_tokenizer(checkpoint.directory, file, encoder.shape.pad_id)
    check_ids(checkpoint.directory, plain, encoder.vocab_size)
    if encoder.has_token_types:
        check_token_types(checkpoint.directory, texts)
    info = prove_fast(file, plain, texts)
    if info.fast:
        report(f"tokenizer: {info.fast}, which gives the ids of `tokenizers` on all {len(texts)} probe texts")
    else:
        report("tokenizer: `tokenizers`; for this vocabulary tokie, which is faster, is not proven to be identical")
    for directory in (checkpoint.directory, *_others(checkpoint.directory, readouts)):
        if difference := difference_to_auto(directory, file, texts):
            report(f"tokenizer: {difference}")
    return info


def _certify(
    draft: Bundle,
    checkpoint: Checkpoint,
    readouts: Sequence[Readout],
    *,
    encoder_onnx: Path | None,
    report: Callable[[str], None],
) -> dict[str, Variant]:
    tokens = probes.token_batch(Tokenizer.of(draft))
    report(f"computing {len(tokens.rows)} probe documents, {len(tokens.ids):,} tokens, with PyTorch")
    expected = Reference(checkpoint.directory, readouts, draft.manifest.pooling).run(tokens)
    write_probes(draft.path / PROBES, tokens, expected)
    certified = dict(draft.manifest.variants)
    for name, variant in draft.manifest.variants.items():
        if variant.provider in ON_GPU:
            report(f"{name} is written; every GPU that opens it certifies it first, with {PROBES}")
            continue
        with explained(encoder_onnx) if encoder_onnx and name == FOREIGN else nullcontext():
            figures = certify(open_variant(draft, name), tokens, expected, Tolerance(**variant.tolerance))
        report(f"{name} is certified: {_summary(figures, variant.tolerance)}")
        certified[name] = replace(variant, parity=figures)
    return certified


def _summary(figures: Mapping[str, float], tolerance: Mapping[str, float]) -> str:
    kind = "score" if "max_abs_score" in figures else "embedding"
    found, allowed = figures[f"max_abs_{kind}"], tolerance[kind]
    allows = f"allowed are {allowed:.0e}{SCALED if found > allowed else ''}"
    return f"{kind}s of {figures['documents']} documents within {found:.1e} of PyTorch, {allows}"


def _manifest(
    checkpoint: Checkpoint,
    encoder: Encoder,
    readouts: Sequence[Readout],
    *,
    pooling: Pooling,
    max_tokens: int,
    tokenizer: TokenizerInfo,
) -> Manifest:
    """The manifest without parity figures and files."""
    shape, directory = encoder.shape, checkpoint.directory
    source = [file for file in sorted(directory.iterdir()) if file.suffix in (".safetensors", ".bin", ".json")]
    info = EncoderInfo(
        id=checkpoint.id,
        revision=checkpoint.revision,
        architecture=shape.architecture,
        layers=shape.n_layers,
        hidden_size=shape.hidden_size,
        files={file.name: sha256_of(file) for file in source},
        unused_tensors=list(encoder.unused_tensors),
    )
    return Manifest(
        format=FORMAT,
        encoder=info,
        readouts=[readout.info(pooling) for readout in readouts],
        pooling=pooling,
        max_tokens=max_tokens,
        tokenizer=tokenizer,
        variants={name: _variant(name) for name in encoder.variants},
        files={},
        created_with={name: version(name) for name in ("jql-engine", "torch", "transformers", "onnx", "tokenizers")},
    )


def _with_documents(manifest: Manifest, template: Template | None, windows: WindowsInfo) -> Manifest:
    """`manifest` with how documents are read, and what a reader must know for that."""
    known = {"template": template is not None, "windows": windows.take != "first"}
    requires = [feature for feature, is_needed in known.items() if is_needed]
    source = None if template is None else template.source
    return replace(manifest, template=source, windows=windows, requires=requires)


def _variant(name: str) -> Variant:
    kind = VARIANTS["standard-fp32" if name == FOREIGN else name]  # the same inputs, and for no runtime in particular
    tolerance = asdict(tolerance_of(kind.precision, kind.provider))
    graph = f"{name}.onnx" if name == FOREIGN else kind.graph
    return Variant(
        graph=f"graphs/{graph}",
        layout=kind.layout,
        precision=kind.precision,
        provider=kind.provider,
        tolerance=tolerance,
        parity={},
    )
