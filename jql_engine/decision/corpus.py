"""Whether score files are of the corpus files that they are joined to, by name and position."""

from __future__ import annotations

from jql_engine.errors import InputError
from jql_engine.files.inputs import InputFile, identity
from jql_engine.files.settings import stored_settings


def check_scored(file: InputFile, scores: InputFile, assume_unchanged: bool) -> None:
    """Raise InputError where `scores` are not those of `file` as it is now.

    Rows and size must agree. The version, a time or a tag, need not where `assume_unchanged`: a copy has another one.
    """
    source, found = file.source, scores.source.location
    if identity(source.location) == identity(found):  # scores that stand beside all columns
        return
    settings = stored_settings(found)
    if file.n_rows != scores.n_rows:
        limited = settings.get("limit") is not None
        advice = "score it without --limit" if limited else "give the corpus that was scored, or score it again"
        raise InputError(
            f"{source.location} has {file.n_rows:,} rows and its scores {found} {scores.n_rows:,}; {advice}"
        )
    if settings.get("source_bytes", source.size) != source.size:
        raise InputError(
            f"{source.location} has {source.size:,} bytes and had {settings['source_bytes']:,} when {found} was "
            "written; give the corpus that was scored, or score it again"
        )
    if not assume_unchanged and settings.get("source_version", source.version) != source.version:
        raise InputError(
            f"{source.location} was changed or copied since {found} was written (its time or tag is another); score it "
            "again, or give --assume-unchanged if its rows are the same"
        )
