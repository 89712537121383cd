from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from jql_engine.bundle import FORMAT, MANIFEST, PROBES, READOUTS, Bundle, EngineKey, Manifest, describe_files, sha256_of
from jql_engine.errors import BundleError

FILES = ("graphs/cpu-fp32.onnx", "graphs/cpu-fp32.onnx.data", READOUTS, PROBES, "tokenizer.json")
ENGINE = EngineKey("tensorrt-fp16", "ab" * 32, "tensorrt-rtx", "1.7", None, "8.0", "fp16", [[32, 512]])


@pytest.fixture
def copy(bundle, tmp_path) -> Path:
    """A bundle to damage."""
    return Path(shutil.copytree(bundle.path, tmp_path / "copy"))


def change_manifest(copy: Path, change: Callable[[dict[str, Any]], object]) -> None:
    fields = json.loads((copy / MANIFEST).read_text())
    change(fields)
    (copy / MANIFEST).write_text(json.dumps(fields))


def assert_refused(copy: Path, *parts: str) -> None:
    with pytest.raises(BundleError) as caught:
        Bundle.open(copy)
    for part in (str(copy), *parts):
        assert part in str(caught.value)


def test_a_copy_is_the_same_bundle(bundle, copy):
    opened = Bundle.open(str(copy))
    assert opened.manifest == bundle.manifest
    assert opened.hash == bundle.hash == sha256_of(copy / MANIFEST)
    assert opened.heads == ("edu", "prose")
    assert opened.graph("cpu-fp32").is_file() and opened.graph("cpu-fp32").is_relative_to(copy)


def test_the_manifest_lists_every_file_but_itself(bundle):
    on_disk = {file.relative_to(bundle.path).as_posix() for file in bundle.path.rglob("*") if file.is_file()}
    assert set(bundle.manifest.files) == on_disk - {MANIFEST} == set(describe_files(bundle.path))
    assert describe_files(bundle.path) == bundle.manifest.files
    assert set(FILES) <= on_disk


def test_a_manifest_written_and_read_is_the_same(bundle):
    assert Manifest.parse(json.loads(bundle.manifest.to_json())) == bundle.manifest


@pytest.mark.parametrize("name", FILES)
def test_a_changed_byte_is_found(copy, name):
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    assert_refused(copy, name, "was changed")


@pytest.mark.parametrize("name", FILES)
def test_a_changed_size_is_found(copy, name):
    size = (copy / name).stat().st_size
    with (copy / name).open("ab") as stream:
        stream.write(b"\0")
    assert_refused(copy, name, f"{size + 1} bytes", str(size))


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_found(copy, name):
    (copy / name).unlink()
    assert_refused(copy, f"{name} is missing")


@pytest.mark.parametrize("name", [FILES[0], *FILES[2:]])
def test_a_file_that_is_needed_must_be_listed(copy, name):
    change_manifest(copy, lambda fields: fields["files"].pop(name))
    assert_refused(copy, f"{name!r} is not among its files")


@pytest.mark.parametrize("name", [FILES[1], "graphs/cpu-fp32.bin", "graphs/of/another.name"])
def test_weights_that_are_not_listed_are_refused(copy, name):
    """They would be loaded with the graph, whatever they hold."""
    change_manifest(copy, lambda fields: fields["files"].pop(name, None))
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).touch()
    assert_refused(copy, f"{name!r} lies beside a graph and is not among its files")


@pytest.mark.parametrize("place", ["graphs", ""])
def test_hidden_weights_that_a_graph_names_are_refused_and_other_hidden_files_are_not(copy, place):
    """Both libraries of a CPU load them; what a system leaves is of no concern."""
    for graph in (copy / "graphs").glob("*.onnx*"):
        graph.rename(copy / place / graph.name)
    graph, weights = copy / place / "cpu-fp32.onnx", copy / place / "cpu-fp32.onnx.data"
    moved = replace_location(graph, ".w.data")
    for name in (".DS_Store", ".nfs0123", "._cpu-fp32.onnx"):
        (copy / place / name).touch()

    def keep_one(fields):
        variant = fields["variants"]["cpu-fp32"] | {"graph": graph.relative_to(copy).as_posix()}
        fields["variants"] = {"cpu-fp32": variant}
        fields["files"] = {k: v for k, v in describe_files(copy).items() if not Path(k).name.startswith(".")}

    for file in copy.rglob("standard-fp32*"):
        file.unlink()
    change_manifest(copy, keep_one)
    Bundle.open(copy)
    graph.write_bytes(moved)
    weights.rename(copy / place / ".w.data")
    change_manifest(copy, keep_one)
    name = Path(place, ".w.data").as_posix()
    assert_refused(copy, f"{name!r} lies beside a graph and is not among its files")


def replace_location(graph, location):
    """`graph` with its weights in another file."""
    model = onnx.load(graph, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = location if entry.key == "location" else entry.value
    return model.SerializeToString()


def test_what_took_the_place_of_an_opened_bundle_is_seen(copy):
    opened = Bundle.open(copy)
    opened.check_still_there()
    change_manifest(copy, lambda fields: fields.update(max_tokens=5))
    with pytest.raises(BundleError, match=rf"{copy} is bundle .* now, the job began with {opened.hash[:12]}"):
        opened.check_still_there()


@pytest.mark.parametrize("damage", ["longer", "gone"])
def test_a_file_that_was_replaced_since_is_seen_by_its_size(copy, damage):
    opened, graph = Bundle.open(copy), copy / FILES[0]
    if damage == "gone":
        graph.unlink()
    else:
        graph.write_bytes(graph.read_bytes() + b"x")
    with pytest.raises(BundleError, match=f"{FILES[0]} (is missing|has .* bytes, the manifest says)"):
        opened.check_still_there()


def test_a_folder_without_a_manifest_is_no_bundle(copy):
    (copy / MANIFEST).unlink()
    assert_refused(copy, MANIFEST, "No such file", "jql-export")


@pytest.mark.parametrize(("path", "what"), [("absent", "does not exist"), ("file", "is no bundle")])
def test_what_is_no_folder_is_no_bundle(tmp_path, path, what):
    (tmp_path / "file").touch()
    assert_refused(tmp_path / path, what, "make a bundle with jql-export")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"null", b'"text"', b"{}"])
def test_a_manifest_that_is_no_json_object_with_fields_is_damaged(copy, content):
    (copy / MANIFEST).write_bytes(content)
    assert_refused(copy, MANIFEST, "is damaged")


@pytest.mark.parametrize(
    "field",
    [field for field in Manifest.__dataclass_fields__ if field not in ("engines", "requires", "template", "windows")],
)
def test_a_missing_field_is_named(copy, field):
    change_manifest(copy, lambda fields: fields.pop(field))
    assert_refused(copy, MANIFEST, "is damaged", field)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda fields: fields["readouts"][0].pop("sha256"), "sha256"),
        (lambda fields: fields["encoder"].pop("revision"), "revision"),
        (lambda fields: fields["tokenizer"].pop("pad"), "pad"),
        (lambda fields: fields["variants"]["cpu-fp32"].pop("layout"), "layout"),
        (lambda fields: fields["files"]["tokenizer.json"].pop("sha256"), "sha256"),
        (lambda fields: fields.update(variants=None), "damaged"),
        (lambda fields: fields.update(files=None), "damaged"),
        (lambda fields: fields.update(max_tokens="8192"), "max_tokens is '8192', expected an integer"),
        (lambda fields: fields.update(max_tokens=True), "max_tokens is True, expected an integer"),
        (lambda fields: fields.update(max_tokens=2), "max_tokens is 2, expected 3 to"),
        (lambda fields: fields.update(max_tokens=2**40), "max_tokens is 1099511627776"),
        (lambda fields: fields.update(pooling="max"), "pooling is 'max', expected 'cls' or 'mean'"),
        (lambda fields: fields["readouts"][1].update(name="edu"), "['edu', 'edu'], expected a name for each"),
        (lambda fields: fields["readouts"][1].update(outputs=["edu"]), "['edu', 'edu'], expected a name for each"),
        (lambda fields: fields["readouts"][1].update(outputs=[]), "'prose' has 2 layers and 0 outputs"),
        (lambda fields: fields["readouts"][0].update(layers=[]), "'edu' has 0 layers and 1 outputs"),
        (lambda fields: fields["readouts"][0].update(pooling="last"), "readouts[0].pooling is 'last'"),
        (lambda fields: layer_of(fields).update(activation="mish"), "activation is 'mish', expected 'relu' or"),
        (lambda fields: layer_of(fields).update(norm_epsilon="0"), "norm_epsilon is '0', expected a finite"),
        (lambda fields: fields["readouts"].append(None), "readouts[2] is None, expected an object"),
        (lambda fields: fields["encoder"].update(hidden_size=0), "encoder.hidden_size is 0"),
        (lambda fields: fields["tokenizer"].update(prefix=[-1]), "an id in tokenizer is -1"),
        (lambda fields: fields["tokenizer"].update(prefix=[0.0]), "tokenizer.prefix[0] is 0.0, expected an integer"),
        (lambda fields: fields["tokenizer"].update(prefix=[], suffix=[]), "no prefix and no suffix"),
        (lambda fields: fields["tokenizer"].update(added_tokens=[""]), "added_tokens holds an empty text"),
        (lambda fields: fields["tokenizer"].update(fast=5), "tokenizer.fast is 5, expected a string or null"),
        (lambda fields: variant_of(fields).update(parity={"documents": 3}), "no max_abs_score or max_abs_embedding"),
        (lambda fields: variant_of(fields).update(parity={"max_abs_score": None}), "max_abs_score is None"),
        (lambda fields: variant_of(fields).update(tolerance={"score": float("nan")}), "tolerance.score is nan"),
        (lambda fields: variant_of(fields).update(tolerance={"score": 10**400}), "tolerance.score is 1000"),
        (lambda fields: fields["files"]["tokenizer.json"].update(bytes="9"), "files.tokenizer.json is"),
        (lambda fields: fields["files"].pop("tokenizer.json"), "'tokenizer.json' is not among its files"),
        (lambda fields: fields.update(engines=None), "damaged"),
        (lambda fields: fields.update(engines={FILES[0]: {"variant": "x"}}), "library"),
        (lambda fields: fields["variants"]["cpu-fp32"].update(graph=[]), "damaged"),
    ],
)
def test_a_part_of_another_shape_is_damage(copy, change, named):
    change_manifest(copy, change)
    assert_refused(copy, named)


def layer_of(fields: dict[str, Any]) -> dict[str, Any]:
    return fields["readouts"][0]["layers"][0]


def variant_of(fields: dict[str, Any]) -> dict[str, Any]:
    return fields["variants"]["cpu-fp32"]


def test_a_manifest_nested_without_end_is_damaged(copy):
    (copy / MANIFEST).write_text(f'{{"format": {FORMAT}, "encoder": ' + "[" * 100_000)
    assert_refused(copy, MANIFEST, "is damaged")


def test_a_file_whose_name_no_file_can_have_is_an_error(copy):
    change_manifest(copy, lambda fields: fields["files"].update({"x" * 300: {"bytes": 1, "sha256": ""}}))
    assert_refused(copy, "cannot be read: File name too long")


@pytest.mark.parametrize("place", [lambda fields: fields, lambda fields: fields["encoder"], layer_of])
def test_a_field_of_a_later_version_is_ignored(bundle, copy, place):
    change_manifest(copy, lambda fields: place(fields).update(color="red"))
    assert Bundle.open(copy).manifest == bundle.manifest


@pytest.mark.parametrize("further", [{}, {"pooling": "by smell"}, {"encoder": None}])
def test_a_feature_that_is_not_known_is_refused_before_what_it_stands_for(copy, further):
    change_manifest(copy, lambda fields: fields.update(requires=["smell", "taste"], **further))
    assert_refused(copy, "needs smell, taste, which this jql-engine does not know")


@pytest.mark.parametrize("name", ["graphs/other.onnx"])
def test_a_graph_or_an_engine_whose_hash_is_not_listed_is_refused(copy, name):
    (copy / "graphs" / "other.onnx").write_bytes((copy / FILES[0]).read_bytes())
    change_manifest(copy, lambda fields: fields["variants"]["cpu-fp32"].update(graph=name))
    assert_refused(copy, MANIFEST, f"{name!r} is not among its files")
    change_manifest(copy, lambda fields: fields["variants"]["cpu-fp32"].update(graph=FILES[0]))
    change_manifest(copy, lambda fields: fields.update(engines={name: asdict(ENGINE)}))
    assert_refused(copy, MANIFEST, f"{name!r} is not among its files")


def test_a_manifest_with_engines_is_read_as_it_was_written(copy):
    manifest = replace(Bundle.open(copy).manifest, engines={FILES[0]: ENGINE})
    (copy / MANIFEST).write_text(manifest.to_json())
    assert Bundle.open(copy).manifest == manifest


def file_at(fields, name):
    fields["files"][name] = fields["files"].pop("tokenizer.json")


def graph_at(fields, name):
    fields["variants"]["cpu-fp32"]["graph"] = name


@pytest.mark.parametrize("place", [file_at, graph_at])
@pytest.mark.parametrize("name", ["../tokenizer.json", "graphs/../../x", "/etc/passwd", "graphs//x", "./x", "", "a\0b"])
def test_a_name_that_leads_out_of_the_bundle_is_named(copy, place, name):
    change_manifest(copy, lambda fields: place(fields, name))
    assert_refused(copy, MANIFEST, repr(name), "cannot be the name of a file inside a folder")


def test_a_file_may_be_a_link_to_what_the_manifest_says(copy, tmp_path):
    (copy / "tokenizer.json").rename(tmp_path / "elsewhere")
    (copy / "tokenizer.json").symlink_to(tmp_path / "elsewhere")
    Bundle.open(copy)
    (tmp_path / "elsewhere").write_bytes((tmp_path / "elsewhere").read_bytes()[::-1])
    assert_refused(copy, "tokenizer.json was changed")


def test_an_unknown_layout_is_named(copy):
    change_manifest(copy, lambda fields: fields["variants"]["cpu-fp32"].update(layout="diagonal"))
    assert_refused(copy, "variants.cpu-fp32.layout is 'diagonal', expected 'exact' or 'padded' or 'packed'")


@pytest.mark.parametrize("version", [FORMAT + 1, "2"])
def test_a_newer_format_is_refused_with_both_versions(copy, version):
    change_manifest(copy, lambda fields: fields.update(format=version))
    assert_refused(copy, f"format {version}", f"reads {FORMAT}")


def test_the_format_from_before_the_first_release_is_refused(copy):
    change_manifest(copy, lambda fields: fields.update(format=1))
    assert_refused(copy, f"format 1; this jql-engine reads {FORMAT}: export the bundle again")


def test_a_newer_format_is_refused_whatever_else_it_holds(copy):
    (copy / MANIFEST).write_text(json.dumps({"format": FORMAT + 1}))
    assert_refused(copy, f"format {FORMAT + 1}", f"reads {FORMAT}", "update jql-engine")
