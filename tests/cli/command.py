"""A command line in this process."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest


class Result(NamedTuple):
    code: int
    stdout: str
    stderr: str

    @property
    def summary(self) -> dict[str, object]:
        return json.loads(self.stdout.splitlines()[-1])


def run_command(main: Callable[[], None], name: str, arguments: tuple[object, ...], monkeypatch, capfd) -> Result:
    """What the command `name` says and how it exits."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        main()
    return Result(exit_.value.code or 0, *capfd.readouterr())
