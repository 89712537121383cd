from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pyarrow as pa
import pytest
import torch
from safetensors.numpy import load_file, save

from jql_engine.bundle import MANIFEST, PROBES
from tests.conftest import export, write_head
from tests.native.binding import ROOT, JqlError, NativeEngine, Options, package_file
from tests.native.conftest import VARIANTS, copy_of, needs_openvino, replace_file


@pytest.fixture
def copy(xlmr, tmp_path):
    """A bundle to damage."""
    return copy_of(xlmr, tmp_path / "copy")


def change(bundle: Path, path: str, value: object) -> None:
    """Another value at `path` of bundle.json; None as the last name removes it."""
    manifest = json.loads((bundle / MANIFEST).read_text())
    *names, last = path.split("/")
    part = manifest
    for name in names:
        part = part[int(name) if name.isdigit() else name]
    if value is ...:
        del part[last]
    else:
        part[last] = value
    replace_file(bundle, MANIFEST, json.dumps(manifest).encode())


def refused(library, bundle, status, *parts, **options):
    with pytest.raises(JqlError) as caught:
        NativeEngine(bundle, library, **options)
    assert caught.value.status == status, caught.value
    for part in parts:
        assert part in caught.value.sentence, caught.value


def test_a_bundle_that_is_not_there(library, tmp_path):
    refused(
        library, tmp_path / "none", "JQL_INVALID_BUNDLE", str(tmp_path / "none"), "holds no bundle.json", "jql-export"
    )
    refused(library, "", "JQL_INVALID_ARGUMENT", "bundle_dir")
    refused(library, tmp_path, "JQL_INVALID_BUNDLE", "is no bundle")
    (tmp_path / MANIFEST).mkdir()
    refused(library, tmp_path, "JQL_INVALID_BUNDLE", "is no bundle")


@pytest.mark.parametrize(
    "name", ["graphs/cpu-fp32.onnx", "graphs/cpu-fp32.onnx.data", "probes.safetensors", "tokenizer.json"]
)
def test_a_damaged_file(library, copy, name):
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    replace_file(copy, name, bytes(content), listed=False)
    refused(library, copy, "JQL_INVALID_BUNDLE", name, "was changed: SHA-256")
    replace_file(copy, name, bytes(content[:-1]), listed=False)
    refused(library, copy, "JQL_INVALID_BUNDLE", name, "bytes, the manifest says")
    (copy / name).unlink()
    refused(library, copy, "JQL_INVALID_BUNDLE", name, "is missing")


def test_a_damaged_file_is_not_noticed_where_nobody_looks(library, copy):
    content = bytearray((copy / "readouts.safetensors").read_bytes())
    content[-1] ^= 1
    replace_file(copy, "readouts.safetensors", bytes(content), listed=False)
    refused(library, copy, "JQL_INVALID_BUNDLE", "readouts.safetensors")
    NativeEngine(copy, library, verify=0).close()


@pytest.mark.parametrize(
    ("path", "value", "status", "part"),
    [
        ("format", 3, "JQL_INVALID_BUNDLE", "has bundle format 3; this libjql reads 2: update libjql"),
        ("format", 1, "JQL_INVALID_BUNDLE", "has bundle format 1; this libjql reads 2: export the bundle again"),
        ("requires", ["telepathy"], "JQL_UNSUPPORTED", 'needs "telepathy"'),
        ("max_tokens", ..., "JQL_INVALID_BUNDLE", '"max_tokens" is missing'),
        ("max_tokens", 2, "JQL_INVALID_BUNDLE", "max_tokens is 2, which leaves no room for text between 2"),
        ("max_tokens", 8192, "JQL_INVALID_BUNDLE", "max_tokens is 8192 in bundle.json, the longest document in probes"),
        ("tokenizer/prefix", [5], "JQL_INVALID_BUNDLE", "have other ids at their ends"),
        ("tokenizer/suffix", [0], "JQL_INVALID_BUNDLE", "have other ids at their ends"),
        ("tokenizer/prefix", [-1], "JQL_INVALID_BUNDLE", "is -1, expected a whole number from 0"),
        ("readouts/0/layers", [], "JQL_INVALID_BUNDLE", "readout edu has no layers"),
        ("readouts/0/layers", {"a": {}}, "JQL_INVALID_BUNDLE", '"layers" is an object, expected an array'),
        ("tokenizer/prefix", {"a": 0}, "JQL_INVALID_BUNDLE", '"prefix" is an object, expected an array'),
        ("variants", [], "JQL_INVALID_BUNDLE", '"variants" is an array, expected an object'),
        ("max_tokens", "many", "JQL_INVALID_BUNDLE", '"max_tokens" is a string, expected a number'),
        ("max_tokens", 2**40, "JQL_INVALID_BUNDLE", '"max_tokens" is 1099511627776, expected a whole number from 1'),
        ("variants/cpu-fp32/graph", "../graph.onnx", "JQL_INVALID_BUNDLE", "cannot be the name of a file"),
        ("variants/cpu-fp32/graph", "/etc/passwd", "JQL_INVALID_BUNDLE", "cannot be the name of a file"),
        ("variants/cpu-fp32/graph", "s3://x", "JQL_INVALID_BUNDLE", "cannot be the name of a file"),
        ("variants/cpu-fp32/graph", "graphs/other.onnx", "JQL_INVALID_BUNDLE", "is not among its files"),
        ("variants/cpu-fp32/layout", "packed", "JQL_UNSUPPORTED", "does not know the layout packed"),
        ("variants/cpu-fp32/provider", "cuda", "JQL_UNSUPPORTED", "is written for cuda"),
        ("variants/cpu-fp32", ..., "JQL_UNSUPPORTED", "has no variant cpu-fp32; it has: "),
        ("variants/cpu-fp32/tolerance/score", ..., "JQL_INVALID_BUNDLE", "lacks score"),
        ("variants/cpu-fp32/tolerance/score", 0.0, "JQL_PARITY", "score differs by"),
        ("readouts/0/outputs", ["edu", "edu"], "JQL_INVALID_BUNDLE", "two scores have the same name"),
        ("encoder/hidden_size", 7, "JQL_INVALID_BUNDLE", "is of another shape"),
        ("files/probes.safetensors", ..., "JQL_INVALID_BUNDLE", "is not among its files"),
    ],
)  # fmt: skip
def test_a_manifest_that_cannot_be_used(library, copy, path, value, status, part):
    change(copy, path, value)
    refused(library, copy, status, part)


@pytest.mark.parametrize("feature", ["template", "windows"])
def test_a_template_or_windows_leave_ids(library, copy, feature):
    change(copy, "requires", [feature])
    with NativeEngine(copy, library) as engine:
        assert engine.score_tokens([0, 5, 2], [0, 3]).shape == (1, 2)
        for call in (
            engine.tokenize,
            lambda text: engine.score([text]),
            lambda text: engine.embed([text]),
            lambda text: engine.score_arrow(pa.chunked_array([[text]]), None),
        ):
            with pytest.raises(JqlError, match=f'JQL_UNSUPPORTED: .*needs "{feature}".*texts cannot be scored'):
                call("text")


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[1]", b'{"format": 2}', b"\xff\xfe{", b"[" * 10**6])
def test_a_manifest_that_is_none(library, copy, content):
    replace_file(copy, MANIFEST, content)
    refused(library, copy, "JQL_INVALID_BUNDLE", str(copy))


def test_limits_grow_with_scores_beyond_ten(library, xlmr, tmp_path):
    encoder = ROOT / "examples/demo/encoder"
    head = write_head(tmp_path / "edu.ckpt", json.loads((encoder / "config.json").read_text())["hidden_size"])
    checkpoint = torch.load(head, weights_only=True)
    checkpoint["state_dict"]["layer2.bias"] += 100
    torch.save(checkpoint, head)
    bundle = export(encoder, {"edu": head}, tmp_path / "bundle")
    probes = load_file(bundle.path / PROBES)
    assert probes["scores"].min() > 50
    for by in (4e-4, 4e-3):
        copy = copy_of(bundle, tmp_path / str(by))
        replace_file(copy, PROBES, save(probes | {"scores": probes["scores"] + np.float32(by)}))
        if by == 4e-4:
            NativeEngine(copy, library).close()
        else:
            refused(library, copy, "JQL_PARITY", "score differs by", "both over |s| / 10")


def test_a_hidden_file_is_weights_where_a_graph_names_it(library, copy):
    (copy / "graphs" / ".DS_Store").touch()
    NativeEngine(copy, library).close()
    graph = onnx.load(copy / "graphs/standard-fp32.onnx", load_external_data=False)
    [data] = {entry.value for one in graph.graph.initializer for entry in one.external_data if entry.key == "location"}
    for one in graph.graph.initializer:
        for entry in one.external_data:
            entry.value = ".weights" if entry.key == "location" else entry.value
    os.link(copy / "graphs" / data, copy / "graphs" / ".weights")
    replace_file(copy, "graphs/standard-fp32.onnx", graph.SerializeToString())
    refused(library, copy, "JQL_INVALID_BUNDLE", '"graphs/.weights" lies beside a graph')


def test_it_stays_loaded_for_an_environment_that_may_call_it(library, copy):
    code = f"""
import ctypes
from tests.native.binding import NativeEngine, library_path, load
loaded = load()
NativeEngine({str(copy)!r}, loaded).close()
ctypes.CDLL(None).dlclose(ctypes.c_void_p(loaded._handle))
assert str(library_path().resolve()) in open("/proc/self/maps").read()
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_file_that_is_not_listed_beside_a_graph(library, copy):
    (copy / "graphs" / "more.onnx.data").write_bytes(b"weights")
    refused(library, copy, "JQL_INVALID_BUNDLE", "graphs/more.onnx.data", "is not listed")


@pytest.mark.parametrize("content", [b"", b"\x08" + bytes(7) + b"{}      ", b"\xff" * 16])
def test_damaged_probes(library, copy, content):
    replace_file(copy, "probes.safetensors", content)
    refused(library, copy, "JQL_INVALID_BUNDLE", "probes.safetensors")


def test_a_graph_that_is_none(library, copy):
    replace_file(copy, "graphs/cpu-fp32.onnx", b"no graph")
    refused(library, copy, "JQL_RUNTIME_FAILED", "ONNX Runtime: ")


@needs_openvino
def test_a_graph_that_is_none_for_openvino(library, copy):
    replace_file(copy, "graphs/openvino.onnx", b"no graph")
    refused(library, copy, "JQL_RUNTIME_FAILED", "OpenVINO: ", variant="openvino-fp32")


def test_a_readout_that_is_not_known_leaves_embeddings(library, copy):
    change(copy, "readouts/0/layers/0/activation", "mystery")
    with NativeEngine(copy, library) as engine:
        assert engine.embed(["text"]).values.shape[0] == 1
        for call in (lambda: engine.score(["text"]), lambda: engine.score_tokens([0, 2], [0, 2])):
            with pytest.raises(JqlError, match="JQL_UNSUPPORTED: readout edu has the activation mystery"):
                call()


@needs_openvino
@pytest.mark.parametrize(("option", "variant"), [("onnxruntime", "cpu-fp32"), ("openvino", "openvino-fp32")])
def test_a_runtime_that_is_none(library, xlmr, option, variant):
    refused(library, xlmr.path, "JQL_NO_RUNTIME", "/none.so", variant=variant, **{option: "/none.so"})
    refused(
        library, xlmr.path, "JQL_NO_RUNTIME", "libm.so.6 is no", "it lacks", variant=variant, **{option: "libm.so.6"}
    )


def build_fake(built: Path, version: str, *, fits: bool) -> Path:
    """An ONNX Runtime that ends the process where it is asked for its API in vain."""
    source = built.with_suffix(".c")
    source.write_text(
        "#include <stdlib.h>\n"
        f"static const void* api(unsigned v) {{ (void)v; {'return 0;' if fits else 'abort();'} }}\n"
        f'static const char* version(void) {{ return "{version}"; }}\n'
        "static const struct { const void* (*api)(unsigned); const char* (*version)(void); } base = {api, version};\n"
        "const void* OrtGetApiBase(void) { return &base; }\n"
    )
    subprocess.run(["cc", "-shared", "-fPIC", "-o", built, source], check=True)
    return built


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
@pytest.mark.parametrize(
    ("version", "fits"), [("1.23.9", False), ("2.0.0", False), ("nonsense", False), ("1.99.0", True)]
)
def test_the_version_of_onnx_runtime_is_read_before_its_api_is_asked_for(library, xlmr, tmp_path, version, fits):
    built = build_fake(tmp_path / "fake.so", version, fits=fits)
    refused(
        library, xlmr.path, "JQL_NO_RUNTIME", f"is ONNX Runtime {version}, libjql needs 1.24", onnxruntime=str(built)
    )


@pytest.mark.parametrize(
    ("ids", "offsets", "sentence"),
    [
        ([0, 5, 2], [1, 3], "offsets begin at 1, expected 0"),
        ([0, 5, 2], [0, 3, 1], "document 1 ends before it begins"),
        ([0, 5, 2], [0, 3, 3], "document 1 has no token"),
        ([0, -1, 2], [0, 3], "document 0 has the id -1, expected 0 to"),
        ([0, 2**31 - 1, 2], [0, 3], "document 0 has the id 2147483647"),
        ([0] * 97, [0, 97], "document 0 has 97 tokens, the most are 96"),
    ],
)
def test_ids_that_cannot_be_scored(native, ids, offsets, sentence):
    with pytest.raises(JqlError, match=f"JQL_INVALID_ARGUMENT: {sentence}"):
        native.score_tokens(ids, offsets)


def test_null_arguments(library, native, xlmr):
    error = ctypes.create_string_buffer(512)
    engine, n_ids, ids, offsets = native._engine, ctypes.c_size_t(), (ctypes.c_int32 * 9)(), (ctypes.c_int64 * 2)(0, 1)
    scores, texts = (ctypes.c_float * 9)(), (ctypes.c_char_p * 1)(b"text")
    path = str(xlmr.path).encode()
    calls = [
        ("bundle_dir", library.jql_open, None, None, ctypes.byref(ctypes.c_void_p())),
        ("engine", library.jql_open, path, None, None),
        ("engine", library.jql_tokenize, None, b"a", 1, ids, 9, n_ids, None),
        ("text", library.jql_tokenize, engine, None, 1, ids, 9, n_ids, None),
        ("ids", library.jql_tokenize, engine, b"a", 1, None, 9, n_ids, None),
        ("n_ids", library.jql_tokenize, engine, b"a", 1, ids, 9, None, None),
        ("engine", library.jql_score_tokens, None, ids, offsets, 1, scores),
        ("ids", library.jql_score_tokens, engine, None, offsets, 1, scores),
        ("offsets", library.jql_score_tokens, engine, ids, None, 1, scores),
        ("scores", library.jql_score_tokens, engine, ids, offsets, 1, None),
        ("engine", library.jql_score_texts, None, texts, None, 1, scores, None, None, None),
        ("texts", library.jql_score_texts, engine, None, None, 1, scores, None, None, None),
        ("scores", library.jql_score_texts, engine, texts, None, 1, None, None, None, None),
        ("embeddings", library.jql_embed_texts, engine, texts, None, 1, None, None, None, None),
        ("engine", library.jql_score_arrow, None, None, None, None),
        ("input", library.jql_score_arrow, engine, None, None, None),
    ]
    for name, function, *arguments in calls:
        status = function(*arguments, error, 512)
        assert (library.jql_status_name(status), error.value) == (b"JQL_INVALID_ARGUMENT", f"{name} is NULL".encode())
        assert function(*arguments, None, 0) == status
    library.jql_close(None)
    assert (library.jql_head_count(None), library.jql_head_name(None, 0), library.jql_max_tokens(None)) == (0, None, 0)
    assert library.jql_embedding_size(None) == 0 and library.jql_head_name(engine, 99) is None
    assert library.jql_status_name(99) == library.jql_status_name(-1) == b"unknown"


def test_texts_may_end_in_nul_and_their_counts_may_be_left_out(library, native):
    scores, error = (ctypes.c_float * len(native.heads))(), ctypes.create_string_buffer(64)
    texts = (ctypes.c_char_p * 1)(b"text")
    assert library.jql_score_texts(native._engine, texts, None, 1, scores, None, None, None, error, 64) == 0
    assert list(scores) == native.score(["text"]).values[0].tolist()


def test_an_error_fills_no_more_than_its_buffer(library, tmp_path):
    path = str(tmp_path / ("ü" * 40)).encode()
    for size in range(1, 80):
        error = ctypes.create_string_buffer(b"#" * 200)
        assert library.jql_open(path, None, ctypes.byref(ctypes.c_void_p()), error, size) == 2
        assert len(error.value) < size
        error.value.decode()  # not cut within a character
        assert error.raw[size:] == b"#" * (200 - size) + b"\0"


def test_options_that_make_no_sense(library, xlmr):
    refused(library, xlmr.path, "JQL_INVALID_ARGUMENT", "options.threads is -1", threads=-1)
    refused(library, xlmr.path, "JQL_UNSUPPORTED", "has no variant nothing", variant="nothing")
    engine, error = ctypes.c_void_p(), ctypes.create_string_buffer(512)
    options = Options(0, None, str(package_file("onnxruntime", "capi/libonnxruntime.so.*")).encode())
    status = library.jql_open(str(xlmr.path).encode(), ctypes.byref(options), ctypes.byref(engine), error, 512)
    assert library.jql_status_name(status) == b"JQL_INVALID_ARGUMENT" and b"JQL_OPTIONS_INIT" in error.value
    assert not engine
    for options, sentence in (
        (Options(ctypes.sizeof(Options) - 8), b"JQL_OPTIONS_INIT"),
        (Options(ctypes.sizeof(Options), reserved=1), b"options.reserved is not 0"),
    ):
        assert library.jql_open(str(xlmr.path).encode(), ctypes.byref(options), ctypes.byref(engine), error, 512) == 1
        assert sentence in error.value


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_the_search_for_onnx_runtime_goes_on_after_one_that_is_too_old(library, xlmr, tmp_path):
    """Debian's, for one, beside that of an environment."""
    build_fake(tmp_path / "libonnxruntime.so", "1.21.0", fits=False)
    packages = tmp_path / "venv" / "lib" / "python3.11" / "site-packages" / "onnxruntime" / "capi"
    packages.mkdir(parents=True)
    real = package_file("onnxruntime", "capi/libonnxruntime.so.*")
    program = (
        "import sys; from tests.native.binding import NativeEngine\nNativeEngine(sys.argv[1], onnxruntime=None).close()"
    )
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path), "VIRTUAL_ENV": str(tmp_path / "venv")}
    run = [sys.executable, "-c", program, str(xlmr.path)]
    none = subprocess.run(run, env=environment | {"HOME": str(tmp_path)}, capture_output=True, text=True, cwd=ROOT)
    assert "libonnxruntime.so is ONNX Runtime 1.21.0, libjql needs 1.24" in none.stderr, none.stderr
    (packages / real.name).symlink_to(real)
    done = subprocess.run(run, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_texts_are_looked_at_before_the_first_is_computed(native):
    good, bad = "a text " * 40, b"bad \xff"
    scores, error = (ctypes.c_float * (2 * len(native.heads)))(), ctypes.create_string_buffer(512)
    scores[0] = 7.0
    texts = (ctypes.c_char_p * 2)(good.encode(), bad)
    arguments = (native._engine, texts, None, 2, scores, None, None, None)
    assert native.library.jql_score_texts(*arguments, error, 512) == 3
    assert b"text 1 is not UTF-8 at byte 4" in error.value and scores[0] == 7.0


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("opened", [False, True])
def test_without_memory_there_is_an_error_and_no_score(library, xlmr, variant, opened):
    """At every step of opening and of scoring where there is no more."""
    if "JQL_LIBRARY" in os.environ:
        pytest.skip("a sanitizer needs the address space")
    lines = []
    for extra in (0, 1, 4, 16, 64):
        arguments = [sys.executable, "-c", LIMITED, xlmr.path, variant, str(extra << 20), str(int(opened))]
        found = subprocess.run(arguments, check=False, capture_output=True, text=True, cwd=ROOT)
        assert found.returncode == 0, found.stderr
        lines += found.stdout.splitlines()
    assert set(lines) <= {"right", "JQL_OUT_OF_MEMORY", "JQL_RUNTIME_FAILED"}, lines
    assert lines[0] != "right"


LIMITED = """
import os, resource, sys
from pathlib import Path
import numpy as np
from tests.native.binding import JqlError, NativeEngine
path, variant, extra, opened = sys.argv[1:]
open_engine = lambda: NativeEngine(path, variant=variant, threads=1)
texts = [f"Water boils at {i} degrees, on a mountain at fewer. " * 20 for i in range(64)]
with open_engine() as engine:
    expected = engine.score(texts).values
if int(opened):
    engine = open_engine()
size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
resource.setrlimit(resource.RLIMIT_AS, (size + int(extra), -1))
for _ in range(2):
    try:
        engine = engine if int(opened) else open_engine()
        print("right" if np.abs(engine.score(texts).values - expected).max() < 1e-5 else "wrong")
    except JqlError as error:
        assert error.sentence
        print(error.status)
    except MemoryError:  # of Python
        print("JQL_OUT_OF_MEMORY")
"""
