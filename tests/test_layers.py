"""Imports point down only, stages do not know each other, and the runtime never loads what only export needs."""

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
RUNTIME = [name for name in FILES if not name.startswith("integrations/")]
EXPORT_ONLY = {"torch", "transformers", "jql_export"}

# From the bottom to the top; a part may import what is below it.
LAYERS = [
    {"errors", "printing"},
    {"cache", "data", "storage", "interrupt", "dictionaries", "fields", "rust"},
    {"names", "listing"},
    {"bundle", "truncation", "pipeline", "dataset", "probe_texts", "tokenizer_libraries"},
    {"gpu", "profiles"},
    {"tensorrt"},
    {"engine_files"},
    {"batching"},
    {"tokens", "sessions", "formats", "progress", "ranks"},
    {"execution", "reading"},
    {"parity"},
    {"engine"},
    {"parts", "apart", "distinct"},
    {"output"},
    {"check", "claim", "frozen"},
    {"plan"},
    {"run", "worker"},
    {"pool", "rescore", "estimate"},
    {"launch"},
    {"cli", "integrations", "__init__"},
]
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}


def imported(name: str, *, everywhere: bool = True) -> Iterator[str]:
    """Full names of the modules that a file imports, in functions too or at import time only."""
    tree = ast.parse(FILES[name].read_text())
    package = ["jql_engine", *name.split("/")[:-1]]
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ([f"{module}.{alias.name}" for alias in node.names] if module == "jql_engine" else [module])


def part_of(name: str) -> str:
    return name.split("/")[0].removesuffix(".py")


def test_every_file_is_part_of_a_layer():
    assert {part_of(name) for name in FILES} <= LEVEL.keys()


@pytest.mark.parametrize("name", RUNTIME)
def test_the_runtime_imports_nothing_that_only_export_needs(name):
    assert not {module.split(".")[0] for module in imported(name)} & EXPORT_ONLY


def test_an_integration_imports_nothing_that_only_export_needs_outside_of_functions():
    for name in FILES.keys() - set(RUNTIME):
        assert not {module.split(".")[0] for module in imported(name, everywhere=False)} & EXPORT_ONLY, name


@pytest.mark.parametrize("name", FILES)
def test_imports_point_down(name):
    part = part_of(name)
    for module in imported(name):
        root, *path = module.split(".")
        if root != "jql_engine" or (path and path[0] == part):
            continue
        target = path[0] if path and path[0] in LEVEL else "__init__"
        assert LEVEL[target] < LEVEL[part], f"{name} imports {module}"


def test_importing_the_package_loads_nothing_heavy():
    heavy = sorted(EXPORT_ONLY | {"onnx", "onnxruntime", "rich", "typer", "lightning"})
    code = f"import sys, jql_engine; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
