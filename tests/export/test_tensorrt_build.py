"""Parsing and building for real: TensorRT for RTX does both without a GPU."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest

from jql_engine.data import Budget
from jql_engine.errors import BundleError, DeviceError
from jql_engine.sessions.tensorrt import build as tensorrt
from jql_engine.sessions.tensorrt.build import Library, build, deserialize, load_library
from jql_engine.sessions.tensorrt.profiles import BUCKETS, Interface, Profile, budget_for, profiles_of
from jql_export.families.read import read_encoder
from jql_export.graph.encoder import write_graph
from jql_export.readouts.head_file import read_head
from jql_export.variants import VARIANTS
from tests.conftest import FAMILIES
from tests.graphs import write_modernbert_base, write_snowflake
from tests.tensorrt_models import VARIANT, export_demo

pytest.importorskip("tensorrt_rtx_bindings", reason="tensorrt-rtx-cu13-bindings is not installed")
TINY = Budget(1024, "padded", (32, 64, 96))


@pytest.fixture(scope="module")
def library():
    return load_library("tensorrt-rtx")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return export_demo(tmp_path_factory.mktemp("demo") / "bundle")


@pytest.fixture(scope="module")
def snowflake(tmp_path_factory, demo):
    return write_snowflake(tmp_path_factory.mktemp("snowflake"), demo.manifest, [VARIANT])


@pytest.fixture
def network(library):
    """Parses a graph as the builder does."""
    return lambda file: tensorrt._Build(library, file, lambda _: None)


def built(library, file, budget, compute_capability="8.0"):
    lines = []
    return build(library, file, budget, compute_capability, b"", lines.append), lines


@pytest.mark.parametrize("compute_capability", ["8.0", "8.6"])
def test_snowflakes_shape_builds_with_a_profile_a_bucket_and_fused_attention(library, snowflake, compute_capability):
    budget = budget_for(snowflake, 16384)
    assert budget.buckets == BUCKETS
    engine, lines = built(library, snowflake.graph(VARIANT), budget, compute_capability)
    assert engine.fused, "the builder fails where it finds no fused kernel, unless it is told to go without"
    assert engine.engine.nbytes > 2 * 2 * (4 * 768 * 768 + 3 * 768 * 3072), "two layers of fp16 weights at least"
    assert engine.timings is None
    assert f"for compute capability {compute_capability}" in lines[0]
    assert any("steps" in line for line in lines[1:]), "progress is shown"


@pytest.mark.parametrize("compute_capability", ["8.0", "8.6"])
def test_the_demo_builds(library, demo, compute_capability):
    budget = budget_for(demo, 16384)
    assert budget.buckets == tuple(bucket for bucket in BUCKETS if bucket <= 1024)
    assert built(library, demo.graph(VARIANT), budget, compute_capability)[0].fused


def test_the_network_is_strongly_typed_and_has_the_documented_inputs_and_outputs(network, snowflake):
    parsed = network(snowflake.graph(VARIANT)).network
    interface = Interface.of_network(parsed, profiles_of(TINY))
    assert interface.inputs == {"input_ids": "INT64", "attention_mask": "INT64"}
    assert interface.outputs == {"scores": "FLOAT", "embedding": "FLOAT"}
    assert interface.widths == {"scores": 2, "embedding": 768}
    assert parsed.get_flag(load_library("tensorrt-rtx").module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def test_the_builder_accepts_every_shape_of_every_bucket(network, snowflake):
    build, budget = network(snowflake.graph(VARIANT)), budget_for(snowflake, 16384)
    config = build._config("8.0")
    for number, profile in enumerate(profiles_of(budget)):
        shapes = build._shapes(profile)
        for name in ("input_ids", "attention_mask"):
            smallest, _, largest = (tuple(shape) for shape in shapes.get_shape(name))
            assert (smallest, largest) == ((1, profile.row_length), (profile.max_docs, profile.row_length))
            assert profile.row_length * profile.max_docs <= budget.tokens
        assert config.add_optimization_profile(shapes) == number
    assert build.builder.is_network_supported(build.network, config)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_pooling_builds(library, encoders, head_files, tmp_path, family, pooling):
    heads = [read_head(name, file) for name, file in head_files.items()]
    file = tmp_path / "graph.onnx"
    write_graph(file, read_encoder(encoders[family]), heads, pooling, VARIANTS[VARIANT].dialect())
    engine, lines = built(library, file, TINY)
    assert not engine.fused and any("no fused attention kernel" in line for line in lines), "heads of 8 numbers"


def test_windows_build_with_fused_attention(library, demo, tmp_path):
    bundle = write_modernbert_base(tmp_path, demo.manifest, [VARIANT])
    assert built(library, bundle.graph(VARIANT), Budget(16384, "padded", (64, 512, 8192)))[0].fused


def test_a_bundle_without_heads_builds(library, bundles, encoders, tmp_path):
    file = tmp_path / "graph.onnx"
    write_graph(file, read_encoder(encoders["gte"]), [], "cls", VARIANTS[VARIANT].dialect())
    assert built(library, file, TINY)[0].engine.nbytes > 0


def changed(bundle, folder, change):
    """The graph of a bundle with something changed in it; the weights stay where they are."""
    source = bundle.graph(VARIANT)
    model = onnx.load(source, load_external_data=False)
    change(model)
    file = folder / source.name
    onnx.save(model, file)
    (folder / f"{source.name}.data").symlink_to(f"{source}.data")
    return file


def test_an_operator_that_the_library_lacks_is_named_with_its_node(library, demo, tmp_path):
    def change(model):
        node = next(node for node in model.graph.node if node.op_type == "Gelu")
        node.op_type, node.name = "Frobnicate", "layer.0.odd"

    with pytest.raises(BundleError, match=r"TensorRT for RTX 1\.\S+ cannot read node layer.0.odd \(Frobnicate\): "):
        built(library, changed(demo, tmp_path, change), TINY)


def test_types_that_do_not_agree_are_refused(library, demo, tmp_path):
    def change(model):
        for node in model.graph.node:
            if node.op_type == "LayerNormalization":
                node.input[0] = next(n for n in model.graph.node if n.op_type == "Gather").output[0]

    with pytest.raises(BundleError, match=r"cannot (read|build)"):
        built(library, changed(demo, tmp_path, change), TINY)


@pytest.mark.parametrize("content", [None, b"no graph"])
def test_a_file_that_is_no_graph_is_named(library, tmp_path, content):
    file = tmp_path / "graph.onnx"
    if content:
        file.write_bytes(content)
    with pytest.raises(BundleError, match=r"graph.onnx: TensorRT for RTX"):
        built(library, file, TINY)


def test_a_graph_of_other_inputs_is_refused(library, bundles):
    file = bundles["gte"].graph("cpu-fp32")
    with pytest.raises(BundleError, match=r"cpu-fp32.onnx"):
        built(library, file, TINY)


@pytest.mark.parametrize("compute_capability", ["9.0", "80", "ampere"])
def test_a_gpu_that_the_library_does_not_know_is_refused(library, demo, compute_capability):
    with pytest.raises(
        DeviceError, match=rf"compute capability {compute_capability}: .* builds for 7.5, 8.0, .*; .* use TensorRT"
    ):
        built(library, demo.graph(VARIANT), TINY, compute_capability)


def test_bytes_that_are_no_engine_are_refused_with_the_librarys_reason(library):
    with pytest.raises(DeviceError, match=r"a.engine: TensorRT for RTX .* cannot run this engine: .*magicTag"):
        deserialize(library, b"abcd" * 1000, Path("a.engine"))


def test_code_for_the_host_is_never_allowed(library):
    runtimes = []

    def start(log):
        runtimes.append(library.module.Runtime(log))
        return runtimes[-1]

    watched = SimpleNamespace(Runtime=start, ILogger=library.module.ILogger)
    with pytest.raises(DeviceError, match="cannot run this engine"):
        deserialize(replace(library, module=watched), b"abcd" * 1000, Path("a.engine"))
    assert [runtime.engine_host_code_allowed for runtime in runtimes] == [False]


def test_the_interface_is_that_of_the_budget():
    types = {"input_ids": "INT64", "attention_mask": "INT64"}, {"scores": "FLOAT", "embedding": "FLOAT"}
    good = Interface(*types, {"scores": 2, "embedding": 32}, profiles_of(TINY))
    good.check(TINY, "it")
    with pytest.raises(BundleError, match=r"it has profiles .*row_length=96, max_docs=10.*, expected .*max_docs=21"):
        good.check(Budget(2048, "padded", (32, 64, 96)), "it")
    with pytest.raises(BundleError, match=r"it has outputs {'scores': 'HALF'}"):
        Interface(types[0], {"scores": "HALF"}, {}, good.profiles).check(TINY, "it")


class Engine:
    """What an engine on a GPU says of itself, in the library's own types."""

    def __init__(self, trt, profiles):
        self._types = {
            "input_ids": trt.int64,
            "attention_mask": trt.int64,
            "scores": trt.float32,
            "embedding": trt.float32,
        }
        self._trt, self._profiles, self._widths = trt, profiles, {"scores": 2, "embedding": 32}
        self.num_io_tensors, self.num_optimization_profiles = len(self._types), len(profiles)

    def get_tensor_name(self, index):
        return list(self._types)[index]

    def get_tensor_dtype(self, name):
        return self._types[name]

    def get_tensor_mode(self, name):
        return self._trt.TensorIOMode.OUTPUT if name in self._widths else self._trt.TensorIOMode.INPUT

    def get_tensor_shape(self, name):
        return self._trt.Dims([-1, self._widths.get(name, -1)])

    def get_tensor_profile_shape(self, name, profile):
        return [self._trt.Dims(shape) for shape in self._profiles[profile]]


def test_an_engines_own_profiles_are_read_and_checked(library):
    trt, shapes = library.module, [[(1, p.row_length), *[(p.max_docs, p.row_length)] * 2] for p in profiles_of(TINY)]
    interface = Interface.of_engine(trt, Engine(trt, shapes))
    interface.check(TINY, "it")
    assert interface.widths == {"scores": 2, "embedding": 32}
    with pytest.raises(BundleError, match=r"it has profiles .*, expected .*row_length=96"):
        Interface.of_engine(trt, Engine(trt, shapes[:2])).check(TINY, "it")
    with pytest.raises(BundleError, match=r"profile 0 of the engine accepts .*, expected \[1..n, one length\]"):
        Interface.of_engine(trt, Engine(trt, [[(1, 1), (4, 32), (4, 32)]]))


def test_a_shape_outside_of_all_profiles_raises():
    interface = Interface({}, {}, {}, (Profile(32, 4), Profile(64, 2)))
    assert [interface.profile_of(*shape) for shape in ((1, 32), (4, 32), (2, 64))] == [0, 0, 1]
    for shape in ((5, 32), (0, 32), (1, 33), (1, 128)):
        with pytest.raises(BundleError, match=r"fits no profile of the engine, which takes \[1..4, 32\], \[1..2, 64\]"):
            interface.profile_of(*shape)


@pytest.mark.parametrize(("longest", "buckets"), [(20, (20,)), (32, (32,)), (96, (32, 64, 96)), (512, BUCKETS[:5])])
def test_buckets_end_at_the_longest_document(bundle, longest, buckets):
    cut = replace(bundle, manifest=replace(bundle.manifest, max_tokens=longest))
    assert budget_for(cut, 4096).buckets == buckets
    assert budget_for(cut, 1).tokens == longest, "the longest document must fit"


def test_a_library_that_is_missing_is_named_with_what_to_install(monkeypatch):
    for name in ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DeviceError, match=r"tensorrt and tensorrt-rtx: not installed; pip install 'tensorrt>=10.15'"):
        load_library()
    with pytest.raises(DeviceError, match="tensorrt-rtx: not installed; pip install 'tensorrt-rtx-cu13-libs"):
        load_library("tensorrt-rtx")


def test_an_unknown_library_is_named():
    with pytest.raises(DeviceError, match="library 'trt' is unknown; known are tensorrt, tensorrt-rtx"):
        load_library("trt")


def test_a_library_that_does_not_load_says_why(monkeypatch, tmp_path):
    (tmp_path / "tensorrt.py").write_text("import ctypes\nctypes.CDLL('libnvinfer.so.99')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(DeviceError, match=r"tensorrt is installed, but cannot be loaded \(libnvinfer.so.99.*pip"):
        load_library("tensorrt")


def test_a_library_that_is_too_old_says_what_is_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.9.0.34"))
    with pytest.raises(DeviceError, match=r"TensorRT 10.9.0.34 is too old, 10.15 or later is needed; pip install"):
        load_library("tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="11.2.0"))
    assert isinstance(load_library("tensorrt"), Library)
