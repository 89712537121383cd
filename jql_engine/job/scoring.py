"""A scoring job before it runs: its settings, its columns, and the files that are left to score."""

from __future__ import annotations

from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pyarrow as pa

from jql_engine.bundle import Bundle
from jql_engine.data import embedding_type, score_schema
from jql_engine.errors import BundleError, InputError, UnreadableError
from jql_engine.files.formats import open_file
from jql_engine.files.inputs import Columns, InputFile, SourceFile, find_files
from jql_engine.files.location import Location, locate
from jql_engine.files.output import OutputFile
from jql_engine.files.parts import Settings
from jql_engine.files.settings import is_finished, settings_of
from jql_engine.job.apart import Child
from jql_engine.job.check import check_names
from jql_engine.job.claim import Claim
from jql_engine.job.plan import Job, Work, look_into, plan
from jql_engine.job.ranks import share
from jql_engine.job.unfinished import Unfinished

LIBRARIES = ("jql-engine", "tokenizers")
COMPUTE = {  # by the provider of the variant
    "openvino": ("openvino",),
    "tensorrt": ("tensorrt", "tensorrt-rtx-cu13-libs", "onnxruntime-gpu"),
}


def prepare(job: Job, bundle: Bundle, variant: str, chunk_bytes: int) -> Work:
    """Find and check all inputs and the output folder, and claim it, before anything is computed.

    Raises InputError, OutputError, and BundleError where the bundle has nothing to compute for this job.
    """
    _check_bundle(job, bundle)
    settings, scores = _settings(job, bundle, variant, chunk_bytes), _score_schema(job, bundle)
    out = locate(job.out)

    def output_of(file: InputFile) -> OutputFile:
        check_names(file, scores, job.output)
        return OutputFile(out, file, scores, job.output, settings)

    look = partial(_describe_unfinished, job.columns(bundle), None if job.overwrite or job.limit else settings, out)
    return plan(job, Claim(out, {**settings, "limit": job.limit}), look, output_of, chunk_bytes)


def _check_bundle(job: Job, bundle: Bundle) -> None:
    """Raise BundleError or InputError where the bundle has nothing to compute for this job."""
    if not bundle.heads and job.embeddings is None:
        raise BundleError(f"{bundle.path} has no heads, only embeddings; give --embeddings fp16 or fp32 to keep those")
    if job.embeddings is not None and (take := bundle.manifest.windows.take) != "first":
        raise InputError(
            f"--embeddings keeps one vector a document, not those of --windows {take}: give --windows first"
        )


def open_inputs(job: Job, bundle: Bundle) -> tuple[list[InputFile], list[Unfinished]]:
    """The files of `job` that can be read, and those that cannot; raises InputError, BundleError."""
    _check_bundle(job, bundle)
    listed = find_files(job.inputs)
    look = partial(_describe_unfinished, job.columns(bundle), None, None)
    with Child() as child:
        seen = look_into(job, child, listed.files if job.limit else share(listed.files, job.rank), look)
    return seen.files, [*(Unfinished(one.file, one.reason) for one in listed.refused), *seen.unreadable]


def _describe_unfinished(
    columns: Columns, settings: Settings | None, out: Location | None, source: SourceFile
) -> InputFile | UnreadableError | None:
    """What is in a file; None where its scores, with `settings`, are finished."""
    if settings and out and is_finished(source.relative.below(out), settings_of(settings, source)):
        return None
    try:
        return open_file(source, columns)
    except UnreadableError as error:
        return error


def _score_schema(job: Job, bundle: Bundle) -> pa.Schema:
    dtype = job.embedding_dtype
    kept = None if dtype is None else embedding_type(bundle.manifest.encoder.hidden_size, dtype)
    return score_schema(bundle.heads, kept, bundle.manifest.windows.take != "first")


def _settings(job: Job, bundle: Bundle, variant: str, chunk_bytes: int) -> dict[str, Any]:
    """What decides about the scores; written into every output."""
    compute = COMPUTE.get(bundle.manifest.variants[variant].provider, ("onnxruntime", "onnxruntime-gpu"))
    return {
        "bundle": bundle.hash,
        "encoder": bundle.encoder_hash,
        "variant": variant,
        "precision": bundle.manifest.variants[variant].precision,
        "heads": list(bundle.heads),
        "tokenizer": bundle.manifest.tokenizer.fast or "tokenizers",
        "output": job.output,
        "embeddings": job.embeddings,
        "text_column": job.text_column,
        "id_column": job.id_column,
        "group_column": job.group_column,
        **_windows(bundle),
        "chunk_rows": job.chunk_rows,
        "chunk_bytes": chunk_bytes,
        **{name: found for name in (*LIBRARIES, *compute) if (found := _version(name))},
    }


def _windows(bundle: Bundle) -> dict[str, str | None]:
    windows = bundle.manifest.windows
    return {"windows": windows.take, "aggregate": None if windows.take == "first" else windows.aggregate}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
