from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest

from jql_engine.batching import plan_batches
from jql_engine.data import Batch, BatchOutput, Budget, TokenBatch
from jql_engine.errors import CacheError, DeviceError, InputError
from jql_engine.sessions import certify as parity
from jql_engine.sessions.base import EngineOptions, run_in_order
from jql_engine.sessions.gpu import Buffer, Gpu
from jql_engine.sessions.tensorrt.build import load_library
from jql_engine.sessions.tensorrt.profiles import Profile
from jql_engine.sessions.tensorrt.session import TensorRTSession, _Kernels, _view, full_batch, run_in_parts
from jql_engine.tokenizer import Tokenizer
from jql_export import probes
from jql_export.readouts.head_file import read_head
from jql_export.reference import Reference
from jql_export.tolerances import TOLERANCES
from tests.tensorrt_models import DEMO, VARIANT, export_demo

BUDGET = Budget(64, "padded", (8, 32))


def no_gpu():
    """Why there is none; empty where there is one."""
    try:
        Gpu(0).close()
    except DeviceError as error:
        return str(error)
    return ""


on_gpu = pytest.mark.skipif(bool(no_gpu()), reason=no_gpu())
without_gpu = pytest.mark.skipif(not no_gpu(), reason="there is a GPU")


def batch_of(lengths, budget):
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = np.arange(offsets[-1], dtype=np.int32)
    tokens = TokenBatch(np.arange(len(lengths)), ids, offsets, np.zeros(len(lengths), np.bool_))
    return list(plan_batches(tokens, budget))


def shapes_run(batch):
    """What run_in_parts executes for a batch, and what it returns; a document's score is its first id."""
    shapes = []

    def run(part: Batch):
        shapes.append((len(part.rows), part.row_length))
        first = part.rectangle(-1)[0][:, :1].astype(np.float32)
        return BatchOutput(first, np.repeat(first, 3, 1))

    return shapes, run_in_parts(batch, BUDGET, run)


def test_a_batch_planned_for_the_buckets_is_one_part():
    for batch in batch_of([3, 8, 9, 30, 2, 1, 32], BUDGET):
        assert shapes_run(batch)[0] == [(len(batch.rows), batch.row_length)]


def test_a_batch_of_any_other_shape_is_padded_to_its_bucket_and_cut_in_order():
    (batch,) = batch_of([9, 9, 10, 11, 12], Budget(1000, "padded"))
    shapes, output = shapes_run(batch)
    assert shapes == [(2, 32), (2, 32), (1, 32)]
    np.testing.assert_array_equal(output.scores[:, 0], batch.ids[batch.offsets[:-1]])
    assert output.embeddings.shape == (5, 3)


def test_a_document_longer_than_every_profile_raises_before_anything_runs():
    (batch,) = batch_of([33], Budget(1000, "padded"))
    with pytest.raises(InputError, match="has 33 tokens, the longest that this session was opened for has 32"):
        run_in_parts(batch, BUDGET, lambda _: pytest.fail("it ran"))


def test_the_batch_that_warms_a_profile_up_is_its_largest_and_has_tokens():
    ids, mask = full_batch(Profile(32, 4), 1)
    assert ids.shape == mask.shape == (4, 32) and ids.dtype == mask.dtype == np.int64
    assert mask.sum(1).tolist() == [1] * 4


def test_a_view_of_a_buffer_is_its_first_bytes():
    buffer = Buffer(np.zeros(64, np.uint8), 0)
    _view(buffer, np.float32, (2, 3))[:] = 1
    assert buffer.host[:24].view(np.float32).tolist() == [1] * 6 and not buffer.host[24:].any()
    assert _view(buffer, np.float32, (3, 0)).shape == (3, 0), "scores of a bundle without heads"


@without_gpu
def test_without_a_gpu_the_session_says_what_cuda_said(bundle):
    with pytest.raises(DeviceError, match=r"device cuda:0: cudaGetDeviceCount failed: .*\(CUDA error \d+\)"):
        TensorRTSession(bundle, "standard-fp32")


def test_without_cuda_python_the_session_says_what_to_install(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(DeviceError, match=r"a GPU needs cuda-python, .*pip install 'cuda-python"):
        TensorRTSession(bundle, "standard-fp32")


class Compiled:
    """The part of an engine of TensorRT for RTX that keeps compiled kernels; a real one needs a GPU."""

    def __init__(self):
        self.loaded = []

    def create_runtime_config(self):
        return self

    create_runtime_cache = create_runtime_config

    def deserialize(self, content):
        self.loaded.append(content)

    def serialize(self):
        return b"compiled"


def test_compiled_kernels_are_kept_for_the_next_start(tmp_path):
    file, lines, later = tmp_path / "cache" / "a.kernels", [], Compiled()
    _Kernels(file, Compiled(), None).save(lines.append)
    _Kernels(file, later, None)
    assert later.loaded == [b"compiled"] and not lines


def test_compiled_kernels_that_others_can_have_written_are_not_loaded(tmp_path):
    file, engine = tmp_path / "a.kernels", Compiled()
    file.write_bytes(b"planted")
    file.chmod(0o666)
    with pytest.raises(CacheError, match=r"a.kernels belongs to user \d+ and has mode 0666"):
        _Kernels(file, engine, None)
    assert not engine.loaded


def test_kernels_that_cannot_be_kept_are_compiled_at_each_start(tmp_path):
    lines = []
    kernels = _Kernels(tmp_path / "cache" / "a.kernels", Compiled(), None)
    (tmp_path / "cache").touch()
    kernels.save(lines.append)
    assert len(lines) == 1 and lines[0].startswith("the next start compiles the kernels of this engine again: ")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    bundle = export_demo(tmp_path_factory.mktemp("demo") / "bundle")
    heads = [read_head(name, DEMO / "heads" / f"{name}.ckpt") for name in ("education", "prose")]
    tokens = probes.token_batch(Tokenizer.of(bundle))
    return bundle, tokens, Reference(DEMO / "encoder", heads, bundle.manifest.pooling).run(tokens)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("library", ["tensorrt", "tensorrt-rtx"])
def test_the_engine_gives_the_oracles_scores(demo, tmp_path, library):
    bundle, tokens, expected = demo
    try:
        load_library(library)
    except DeviceError as error:
        pytest.skip(str(error))
    options = EngineOptions(folder=tmp_path, library=library, batch_tokens=4096)
    parity.certify(TensorRTSession(bundle, VARIANT, 0, options, print), tokens, expected, TOLERANCES["fp16"])
    (engine,) = tmp_path.glob("*.engine")
    built_at = engine.stat().st_mtime_ns
    session = TensorRTSession(bundle, VARIANT, 0, replace(options, build=False))
    run_in_order(session, tokens, Budget(700, "padded"))  # batches of shapes that no profile has
    assert [file.stat().st_mtime_ns for file in tmp_path.glob("*.engine")] == [built_at]
