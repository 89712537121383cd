from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jql_engine import Engine
from jql_engine.bundle import MANIFEST, Bundle, WindowsInfo, describe_files
from jql_engine.certificate import CERTIFICATE
from jql_export import cli
from jql_export.families.read import read_encoder
from tests.conftest import MAX_TOKENS
from tests.export.test_certificate import TEXTS
from tests.job.test_run import write

SCRIPT = Path(sys.executable).with_name("jql-export")


@pytest.fixture
def checkpoint(encoders, tmp_path):
    """A GTE checkpoint that says itself how to pool and how long an input may be."""
    folder = shutil.copytree(encoders["gte"], tmp_path / "encoder")
    module = "sentence_transformers.models"
    modules = [{"type": f"{module}.Transformer", "path": ""}, {"type": f"{module}.Pooling", "path": "1_Pooling"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 64}))
    return folder


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs jql-export in this process; gives its exit status and its stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["jql-export", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as end:
            return end.code, capsys.readouterr().err
        return 0, capsys.readouterr().err

    return run


def test_the_script_writes_a_bundle_with_what_the_checkpoint_says(checkpoint, head_files, tmp_path):
    heads = [f"--head={name}={head_files[name]}" for name in ("prose", "edu")]
    done = script(
        "--encoder", checkpoint, *heads, "--out", tmp_path / "out", "--variant=cpu-fp32", "--variant=standard-fp32"
    )
    assert done.returncode == 0, done.stderr
    manifest = Bundle.open(tmp_path / "out").manifest
    assert [head.name for head in manifest.readouts] == ["prose", "edu"]
    assert (manifest.encoder.id, manifest.pooling, manifest.max_tokens) == ("encoder", "cls", 64)
    assert list(manifest.variants) == ["cpu-fp32", "standard-fp32"]
    for line in ("tokenizer: ", "writing graph cpu-fp32", "standard-fp32 is certified: scores of ", "heads prose, edu"):
        assert line in done.stderr
    assert Engine(tmp_path / "out", device="cpu").score(["text"]).valid.all()


def test_template_and_windows_are_recorded_and_required_of_readers(call, checkpoint, head_files, tmp_path):
    options = ["--encoder", checkpoint, f"--head=edu={head_files['edu']}", "--out", tmp_path / "out"]
    code, error = call(*options, r"--template={url}\n\n{text}", "--windows=first+last", "--aggregate=mean")
    assert code == 0, error
    bundle = Bundle.open(tmp_path / "out")
    assert bundle.manifest.template == "{url}\n\n{text}" and bundle.manifest.requires == ["template", "windows"]
    assert bundle.manifest.windows == WindowsInfo("first+last", "mean")
    code, _ = call(*options, "--overwrite")
    plain = Bundle.open(tmp_path / "out")
    assert code == 0 and plain.manifest.requires == [] and plain.encoder_hash != bundle.encoder_hash


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--template={url}"], "has no {text}"),
        (["--template={text"], "is malformed"),
        (["--aggregate=max"], "is for --windows first+last or all"),
        (["--windows=some"], "is not one of 'first', 'first+last', 'all'"),
    ],
)
def test_a_template_without_text_and_an_aggregate_of_one_window_are_misuse(call, option, message):
    code, error = call("--encoder", "e", "--head=a=b", "--out", "out", *option)
    assert code == 2 and message in " ".join(error.split()), error


def test_engines_are_built_ahead_for_gpus_that_are_not_here(checkpoint, head_files, tmp_path):
    pytest.importorskip("tensorrt_rtx_bindings")
    done = script(
        "--encoder", checkpoint, f"--head=edu={head_files['edu']}", "--out", tmp_path / "out",
        "--variant=tensorrt-fp16", "--compute-capability=8.0", "--compute-capability=8.6",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    manifest = Bundle.open(tmp_path / "out").manifest
    assert sorted(key.compute_capability for key in manifest.engines.values()) == ["8.0", "8.6"]
    assert all(key.profiles == [[32, 512], [64, 256]] for key in manifest.engines.values())
    assert manifest.files == describe_files(tmp_path / "out"), "engines are listed like every other file"
    on_disk = {file.relative_to(tmp_path / "out").as_posix() for file in (tmp_path / "out" / "engines").iterdir()}
    assert manifest.engines.keys() == on_disk


@pytest.mark.parametrize(("option", "variant"), [("--compute-capability=8.0", "tensorrt-fp16")])
def test_an_option_for_a_variant_that_is_not_asked_for_is_misuse(call, option, variant):
    status, err = call("--encoder=any", "--out=any", "--no-heads", option)
    assert status == 2 and f"is for --variant {variant}" in " ".join(err.split())


def test_the_help_names_every_variant(call):
    from jql_export.variants import VARIANTS

    text = " ".join(subprocess.run([SCRIPT, "--help"], capture_output=True, text=True, check=True).stdout.split())
    assert all(name in text.replace("- ", "-") for name in VARIANTS)


def test_a_hub_id_that_cannot_be_reached_exits_1_and_is_named(head_files, tmp_path):
    done = script("--encoder=nobody/nothing", f"--head=edu={head_files['edu']}", "--out", tmp_path / "out")
    assert done.returncode == 1
    assert "jql-export: nobody/nothing is neither a directory here nor a model that the hub gave" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize("head", ["edu", "=file.ckpt", "edu="])
def test_a_head_that_is_not_name_and_file_is_misuse(call, head):
    status, err = call("--encoder=any", "--out=any", "--head", head)
    assert status == 2 and "is not NAME=FILE" in err


@pytest.mark.parametrize("missing", ["--head", "--out"])
def test_a_missing_option_is_misuse(call, missing):
    given = {"--encoder": "any", "--head": "edu=any", "--out": "any"}
    status, err = call(*(f"{name}={value}" for name, value in given.items() if name != missing))
    assert status == 2 and missing in err


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["--certify=any", "--bundle=any", "--variant=cpu-fp32"], "--variant"),
        (["--certify=any", "--bundle=any", "--out=any"], "--out"),
        (["--certify=any"], "--bundle"),
        (["--out=any", "--documents=10"], "--documents"),
        (["--out=any", "--bundle=any"], "--bundle"),
    ],
)
def test_options_of_the_certificate_and_of_the_export_exclude_each_other(call, arguments, option):
    status, err = call("--encoder=any", "--head=edu=any", *arguments)
    assert status == 2 and option in err


def test_a_certificate_is_made_with_what_the_bundle_says(call, checkpoint, head_files, tmp_path):
    of_both = ("--encoder", checkpoint, f"--head=edu={head_files['edu']}")
    assert call(*of_both, "--out", tmp_path / "out", "--max-tokens=16")[0] == 0
    write(tmp_path / "corpus.parquet", TEXTS[:30], 10)
    certify = (*of_both, "--certify", tmp_path / "corpus.parquet", "--bundle", tmp_path / "out", "--documents=20")
    status, err = call(*certify, "--max-tokens=32")
    assert status == 2 and "has 16, not 32" in " ".join(err.split()), err
    status, err = call(*certify[2:])  # the default encoder is another
    assert status == 2 and f"was made of {checkpoint.name}" in " ".join(err.split()) and "--encoder" in err, err
    status, err = call(*certify, "--max-tokens=16", "--pooling=cls")
    assert status == 0 and (tmp_path / "out" / CERTIFICATE).is_file(), err


def test_a_request_overrides_what_the_checkpoint_says(call, checkpoint, head_files, tmp_path):
    options = ("--encoder", checkpoint, f"--head=edu={head_files['edu']}", "--out", tmp_path / "out")
    assert call(*options, "--pooling=mean", "--max-tokens=16")[0] == 0
    manifest = Bundle.open(tmp_path / "out").manifest
    assert (manifest.pooling, manifest.max_tokens) == ("mean", 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pooling=max"], "pooling 'max' is unknown"),
        ([f"--max-tokens={MAX_TOKENS + 1}"], f"--max-tokens says {MAX_TOKENS + 1} tokens"),
        (["--variant=cpu-int4"], "variant 'cpu-int4' is unknown; known are cpu-fp32"),
        (["--head=edu=/none.ckpt"], "head edu: /none.ckpt cannot be read: No such file"),
        (["--head=a b=/none.ckpt"], "head name 'a b' cannot be a column name"),
    ],
)
def test_what_is_wrong_exits_1_with_one_line_and_writes_nothing(
    call, checkpoint, head_files, tmp_path, options, message
):
    status, err = call(
        "--encoder", checkpoint, f"--head=prose={head_files['prose']}", "--out", tmp_path / "out", *options
    )
    assert status == 1
    assert err.startswith(f"jql-export: {message}") and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_second_export_to_the_same_place_needs_overwrite(call, bundle, checkpoint, head_files, tmp_path):
    shutil.copytree(bundle.path, tmp_path / "out")
    options = ("--encoder", checkpoint, f"--head=new={head_files['edu']}", "--out", tmp_path / "out")
    status, err = call(*options)
    assert status == 1 and "exists and is a bundle; give --overwrite" in err
    assert Bundle.open(tmp_path / "out").hash == bundle.hash
    assert call(*options, "--overwrite")[0] == 0
    assert Bundle.open(tmp_path / "out").heads == ("new",)


def test_out_of_tolerance_exits_1_and_leaves_nothing(call, checkpoint, head_files, tmp_path, monkeypatch):
    def misread(directory):
        weights = read_encoder(directory)
        weights.layers[0].query.weight[:] *= 1.1
        return weights

    monkeypatch.setattr("jql_export.graphs.read_encoder", misread)
    (tmp_path / "place").mkdir()
    options = ("--encoder", checkpoint, f"--head=edu={head_files['edu']}", "--out", tmp_path / "place" / "out")
    status, err = call(*options)
    assert status == 1 and "jql-export: variant cpu-fp32 is out of tolerance: embedding differs by" in err
    assert list((tmp_path / "place").iterdir()) == []


def test_unused_tensors_are_reported(call, encoders, head_files, tmp_path):
    options = ("--encoder", encoders["bert"], f"--head=edu={head_files['edu']}", "--out", tmp_path / "out")
    status, err = call(*options, "--pooling=mean", f"--max-tokens={MAX_TOKENS}")
    assert status == 0 and "unused tensor: pooler.dense.weight\n" in err
    assert (tmp_path / "out" / MANIFEST).is_file()


@pytest.mark.parametrize("option", ["--encoder=", "--out=", "--head=", "--classifier="])
def test_an_empty_value_is_misuse(call, option):
    """As of a variable of the shell that is not set: it must not mean the default encoder, or the folder one is in."""
    status, err = call("--encoder=any", "--out=any", "--no-heads", option)
    assert status == 2 and err == f"jql-export: {option[:-1]} is empty; is a variable of the shell not set?\n"


def test_a_place_that_is_taken_is_noticed_before_anything_is_fetched(call, tmp_path):
    (tmp_path / "thesis.tex").write_text("ten years")
    status, err = call("--encoder=nobody/nothing", "--no-heads", "--out", tmp_path)
    assert status == 1 and err == f"jql-export: {tmp_path} exists and is no bundle; choose another --out\n"


AS_NOBODY = """
import os, sys
from pathlib import Path
from jql_engine.errors import EngineError
from jql_export.hub import find_checkpoint
from jql_export.place import check_place
if os.getuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
for call in (lambda: find_checkpoint(sys.argv[1]), lambda: check_place(Path(sys.argv[1]), False)):
    try:
        call()
    except EngineError as error:
        print(error)
"""


def test_a_folder_that_may_not_be_entered_is_an_error(tmp_path):
    inside = tmp_path / "closed" / "encoder"
    inside.mkdir(parents=True)
    inside.parent.chmod(0)
    done = subprocess.run([sys.executable, "-c", AS_NOBODY, inside], capture_output=True, text=True)
    inside.parent.chmod(0o700)
    assert done.stdout.splitlines() == [
        f"{inside} may not be read by this user; ask for its permissions, or copy it",
        f"{inside} cannot be looked at: Permission denied; choose another --out",
    ], done.stderr


WITHOUT_TORCH = """
import sys
class Without:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "onnx"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Without())
from jql_export.cli import main
main()
"""


def test_an_installation_for_running_alone_says_what_exporting_needs(tmp_path):
    arguments = ["--encoder=any", "--no-heads", "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == ("jql-export: the package transformers is not installed; pip install 'jql-engine[export]'\n")


DISK_FULL = """
import resource, sys
from jql_export.cli import main
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
main()
"""


def test_a_disk_that_is_full_is_an_error_of_one_line(checkpoint, tmp_path):
    """First it has no room for the tokenizer, then for the weights of the graph."""
    (tmp_path / "place").mkdir()
    for limit in (20_000, 60_000):
        options = ["--encoder", str(checkpoint), "--no-heads", "--out", str(tmp_path / "place" / "out")]
        code = [sys.executable, "-c", DISK_FULL, str(limit)]
        done = subprocess.run([*code, *options], capture_output=True, text=True)
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        last = done.stderr.splitlines()[-1]
        assert "cannot be written: File too large" in last and "tokenize a text" not in last, done.stderr
        assert list((tmp_path / "place").iterdir()) == []


def script(*arguments):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run([SCRIPT, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=120)
