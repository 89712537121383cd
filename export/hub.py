"""Repositories on the hub: what is fetched of them, from which commit, and the proof that it arrived whole.

Files are fetched with huggingface_hub, whose cache, credentials and environment variables hold (HF_HUB_CACHE, HF_TOKEN,
HF_ENDPOINT, HF_HUB_OFFLINE). Nothing that could run is among them: no .py file, and heads are read as tensors alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

from jql_engine.bundle import sha256_of
from jql_engine.errors import CheckpointError, HeadError
from jql_export.defaults import EDU_HEADS, EDU_REPOSITORY
from jql_export.readouts.base import Readout
from jql_export.readouts.head_file import read_head

# What a snapshot from the hub needs; other formats of the same weights would only be downloaded for nothing.
HUB_PATTERNS = ["*.json", "*/config.json", "model*.safetensors", "pytorch_model.bin"]

SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An encoder on disk and where it came from."""

    directory: Path
    id: str
    revision: str | None  # the commit, where it came from the hub


def find_checkpoint(encoder: str, revision: str | None = None) -> Checkpoint:
    """A local directory as it is, or the snapshot of a hub id; `id@revision` goes before `revision`.

    Raises CheckpointError.
    """
    if not _is_directory(encoder) and "@" in encoder:
        encoder, _, revision = encoder.partition("@")
    if _is_directory(encoder):
        if revision is not None:
            raise CheckpointError(f"--revision {revision} is for a hub id; {encoder} is a directory here")
        return Checkpoint(Path(encoder), Path(encoder).resolve().name, None)
    try:
        directory = fetch(encoder, revision, HUB_PATTERNS)
    except CheckpointError as error:
        raise CheckpointError(
            f"{encoder} is neither a directory here nor a model that the hub gave: {error}"
        ) from error
    return Checkpoint(directory, encoder, directory.name)


def _is_directory(place: str) -> bool:
    """Whether `place` is a directory, and one that may be read; raises CheckpointError where only the first is so."""
    try:
        if not Path(place).is_dir():
            return False
        allowed = os.access(place, os.R_OK | os.X_OK)
    except PermissionError:  # of a folder above it
        allowed = False
    except OSError:  # too long for a file's name
        return False
    if not allowed:
        raise CheckpointError(f"{place} may not be read by this user; ask for its permissions, or copy it")
    return True


def edu_heads(revision: str | None = None) -> list[Readout]:
    """The heads of EDU_REPOSITORY, all from one commit; raises HeadError or CheckpointError."""
    directory = fetch(EDU_REPOSITORY, revision, list(EDU_HEADS.values()))
    heads = []
    for name, file in EDU_HEADS.items():
        if not (directory / file).is_file():
            raise HeadError(f"{EDU_REPOSITORY} has no file {file} at {directory.name}; choose another --heads-revision")
        heads.append(read_head(name, directory / file, f"{EDU_REPOSITORY}/{file}", directory.name))
    return heads


def fetch(repository: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The folder, named after the commit, with the files of `repository` that match `patterns`.

    `revision`: a commit, tag or branch, by default the head of main. Where the hub cannot be reached, the commit that
    the cache knows under that name. Raises CheckpointError: no such repository or revision, an interrupted download, a
    file that is not the one the hub describes.
    """
    try:
        directory = Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # of the hub, its HTTP client, its transfer library and the disk: they share no class
        raise CheckpointError(_explanation(repository, revision, error)) from error
    for file in sorted(directory.rglob("*")):
        name = file.relative_to(directory).as_posix()
        if file.is_file() and any(fnmatchcase(name, pattern) for pattern in patterns):
            _verify(repository, name, file)
    return directory


def _verify(repository: str, name: str, file: Path) -> None:
    """Compare a large file with its SHA-256, under which the cache keeps it: the client compares sizes only.

    Small files have git's hash instead, and a file system without links keeps no hash at all.
    """
    expected = file.readlink().name if file.is_symlink() else ""
    if not SHA256.fullmatch(expected) or (found := sha256_of(file)) == expected:
        return
    file.resolve().unlink()
    file.unlink()
    raise CheckpointError(
        f"{repository}: {name} arrived damaged: SHA-256 {found[:12]}..., the hub says {expected[:12]}...; it was "
        "removed from the cache: start again to fetch it once more"
    )


def _explanation(repository: str, revision: str | None, error: Exception) -> str:
    """One line that names the repository."""
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{constants.ENDPOINT} has no repository {repository}, or none that this login may read; check the name, "
            "or set HF_TOKEN"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{repository} has no revision {revision}"
    if isinstance(error, LocalEntryNotFoundError):
        cause = " ".join(str(error.__cause__ or "no answer").split())
        why = (
            "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached ({cause})"
        )
        at = f" at revision {revision}" if revision else ""
        return f"{why}, and the cache {constants.HF_HUB_CACHE} does not hold all of {repository}{at}"
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"{repository}: {reason}; start again to fetch what is missing"
