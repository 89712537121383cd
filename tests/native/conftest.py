"""libjql as `make native` builds it, and bundles for it."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from jql_engine.bundle import MANIFEST, Bundle, describe_file
from tests.conftest import export, write_head
from tests.native.binding import NativeEngine, library_path, load

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
# AddressSanitizer ends a process that loads OpenVINO: native/check.sh leaves it out.
HAS_OPENVINO = "JQL_WITHOUT_OPENVINO" not in os.environ
VARIANTS = ("cpu-fp32", "standard-fp32", *(["openvino-fp32"] if HAS_OPENVINO else []))
needs_openvino = pytest.mark.skipif(not HAS_OPENVINO, reason="JQL_WITHOUT_OPENVINO is set")


@pytest.fixture(scope="session")
def library() -> ctypes.CDLL:
    if not library_path().exists():
        pytest.skip(f"{library_path()} is missing: `make native` builds it")
    return load()


@pytest.fixture(scope="session")
def xlmr(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The demo's encoder with two heads, whose tokenizer is in XLM-R's layout, normalization included."""
    root = tmp_path_factory.mktemp("native")
    encoder = EXAMPLES / "demo" / "encoder"
    hidden_size = json.loads((encoder / "config.json").read_text())["hidden_size"]
    heads = {name: write_head(root / f"{name}.ckpt", hidden_size, seed=i) for i, name in enumerate(("edu", "prose"))}
    return export(encoder, heads, root / "bundle", VARIANTS)


@pytest.fixture(scope="session")
def native(library: ctypes.CDLL, xlmr: Bundle) -> Iterator[NativeEngine]:
    with NativeEngine(xlmr.path, library) as engine:
        yield engine


def copy_of(bundle: Bundle, folder: Path) -> Path:
    """A copy of a bundle in which files may be replaced; they share their content until then."""
    return Path(shutil.copytree(bundle.path, folder, copy_function=os.link))


def replace_file(bundle: Path, name: str, content: bytes, *, listed: bool = True) -> None:
    """Another content of a file, which the manifest lists if `listed`."""
    (bundle / name).unlink()
    (bundle / name).write_bytes(content)
    if listed and name != MANIFEST:
        manifest = json.loads((bundle / MANIFEST).read_text())
        manifest["files"][name] = describe_file(bundle / name)
        replace_file(bundle, MANIFEST, json.dumps(manifest).encode())
