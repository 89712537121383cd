"""What is fuzzed: of each kind of file a writer of damaged ones, and a reader that knows what is right."""

from __future__ import annotations

import importlib
import random
from pathlib import Path
from typing import Protocol, cast

MODULES = {
    "parquet": "parquet", "jsonl": "jsonl", "bundle": "bundle", "tokenizer": "tokenizer", "head": "checkpoints",
    "encoder": "checkpoints",
}  # fmt: skip


class Kind(Protocol):
    """One kind of file."""

    may_crash: bool  # its library is known to end the process; the job survives that elsewhere

    def write(self, rng: random.Random, folder: Path) -> Path:
        """A damaged file in `folder`."""
        ...

    def read(self, file: Path) -> None:
        """Read it as a job does: EngineError, or the right content; AssertionError where it is another."""
        ...


def load(name: str, bases: Path) -> Kind:
    """The kind `name`, whose undamaged files are in `bases`, or are made and put there."""
    module = importlib.import_module(f"tests.fuzzing.{MODULES[name]}")
    return cast("Kind", getattr(module, f"{name.capitalize()}Kind")(bases))
