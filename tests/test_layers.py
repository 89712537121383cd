"""The rules of docs/architecture.md: who may import whom, and what the runtime never loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import jql_engine

ROOT = Path(jql_engine.__file__).parent
FILES = {file.relative_to(ROOT).as_posix(): file for file in sorted(ROOT.rglob("*.py"))}
EXPORT_ONLY = {"torch", "transformers", "jql_export"}

# The folders that a folder may import from, besides itself; "" is the top level.
MAY_IMPORT = {
    "": {"sessions"},
    "sessions": {""},
    "files": {""},
    "job": {"", "sessions", "files"},
    "decision": {"", "files", "job"},
    "cli": {"", "sessions", "files", "job", "decision"},
    "integrations": {"", "sessions", "files", "job"},
}
# Of the top level only the engine opens sessions: all else there is what sessions are made of.
ABOVE_SESSIONS = {"engine", "__init__"}


def imported(name: str, *, everywhere: bool = True) -> Iterator[str]:
    """Full names of the modules that a file imports, in functions too or at import time only."""
    tree = ast.parse(FILES[name].read_text())
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{name}: a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def folder_of(name: str) -> str:
    return name.rpartition("/")[0].partition("/")[0]


def modules(name: str) -> Iterator[str]:
    """The files of the package that a file imports."""
    for module in imported(name):
        root, *path = module.split(".")
        for file in ("/".join(path) + ".py", "/".join([*path, "__init__.py"])):
            if root == "jql_engine" and path and file in FILES:
                yield file


@pytest.mark.parametrize("name", FILES)
def test_a_folder_imports_from_those_below_it(name):
    folder = folder_of(name)
    for module in modules(name):
        assert folder_of(module) in {folder} | MAY_IMPORT[folder], f"{name} imports {module}"


@pytest.mark.parametrize("name", [name for name in FILES if not folder_of(name)])
def test_what_sessions_are_made_of_opens_none(name):
    if name.removesuffix(".py") not in ABOVE_SESSIONS:
        above = {module for module in modules(name) if folder_of(module)}
        assert not above, f"{name} imports {above}"


def test_no_two_files_import_each_other():
    """At import time; a function may import what is above its file."""
    needs = {name: {m for m in modules_at_import(name) if m != name} for name in FILES}
    while ready := {name for name, needed in needs.items() if not needed & needs.keys()}:
        needs = {name: needed for name, needed in needs.items() if name not in ready}
    assert not needs, f"imports in a circle: {sorted(needs)}"


def modules_at_import(name: str) -> Iterator[str]:
    for module in imported(name, everywhere=False):
        file = "/".join(module.split(".")[1:]) + ".py"
        if module.startswith("jql_engine.") and file in FILES:
            yield file


@pytest.mark.parametrize("name", FILES)
def test_the_runtime_imports_nothing_that_only_export_needs(name):
    """Integrations may, inside functions."""
    found = {module.split(".")[0] for module in imported(name, everywhere=folder_of(name) != "integrations")}
    assert not found & EXPORT_ONLY


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith("/__init__.py")])
def test_a_folder_has_no_code_of_its_own(name):
    assert FILES[name].read_text() == ""


def test_importing_the_package_loads_nothing_heavy():
    heavy = sorted(EXPORT_ONLY | {"onnx", "onnxruntime", "rich", "typer", "lightning"})
    code = f"import sys, jql_engine; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
