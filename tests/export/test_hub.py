"""The real huggingface_hub client and the installed command against a hub on loopback, which has what JQL has there."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jql_engine import Engine
from jql_engine.bundle import Bundle, sha256_of
from jql_export import probes
from jql_export.defaults import EDU_HEADS, EDU_REPOSITORY, SNOWFLAKE
from tests import servers
from tests.conftest import write_encoder, write_head
from tests.servers import Fault, Request, Server

SCRIPT = Path(sys.executable).with_name("jql-export")
NAMES = ("Edu-JQL-Gemma-SF", "Edu-JQL-Mistral-SF", "Edu-JQL-Llama-SF")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both repositories, tiny; the encoder's with code and an ONNX file, as the real one has them."""
    root = tmp_path_factory.mktemp("published")
    encoder = write_encoder(root / "models" / SNOWFLAKE, "gte")
    module = "sentence_transformers.models"
    modules = [{"type": f"{module}.Transformer", "path": ""}, {"type": f"{module}.Pooling", "path": "1_Pooling"}]
    (encoder / "1_Pooling").mkdir()
    config = json.loads((encoder / "config.json").read_text())
    config["auto_map"] = {name: f"modeling_gte.{name}" for name in ("AutoConfig", "AutoModel")}
    for name, content in {
        "config.json": config,
        "modules.json": modules,
        "1_Pooling/config.json": {"pooling_mode_cls_token": True},
        "sentence_bert_config.json": {"max_seq_length": 64},
    }.items():
        (encoder / name).write_text(json.dumps(content))
    (encoder / "modeling_gte.py").write_text("raise SystemExit('remote code was run')\n")
    (encoder / "onnx").mkdir()
    (encoder / "onnx" / "model.onnx").write_bytes(b"large")
    for seed, file in enumerate(EDU_HEADS.values()):
        target = root / "models" / EDU_REPOSITORY / file
        target.parent.mkdir(parents=True, exist_ok=True)
        write_head(target, seed=seed)
    return root


@pytest.fixture
def repositories(published: Path, tmp_path: Path) -> dict[str, Path]:
    """A copy that a test may change."""
    shutil.copytree(published / "models", tmp_path / "models")
    return {f"models/{name}": tmp_path / "models" / name for name in (SNOWFLAKE, EDU_REPOSITORY)}


@pytest.fixture
def hub(repositories: dict[str, Path]) -> Iterator[Server]:
    with servers.hub(repositories) as server:
        yield server


def environment(server: Server, tmp_path: Path, **more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    cache = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_ENDPOINT": server.url}
    return kept | cache | more


def export(server: Server, tmp_path: Path, *options: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = [str(SCRIPT), "--out", str(tmp_path / "out"), *options]
    env = environment(server, tmp_path, **more)
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)


def refused(done: subprocess.CompletedProcess[str], tmp_path: Path, *parts: str) -> None:
    """Exit 1, one line that holds all `parts`, and no bundle."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("jql-export: ")]
    assert done.returncode == 1 and len(lines) == 1 and done.stderr.endswith(f"{lines[0]}\n"), done.stderr
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part in lines[0]
    assert not [file for file in tmp_path.iterdir() if "out" in file.name], "a bundle, or half of one"


def head_of(server: Server, name: str) -> str:
    """The commit at the head of main."""
    import urllib.request

    with urllib.request.urlopen(f"{server.url}/api/models/{name}") as answer:
        return str(json.load(answer)["sha"])


def test_without_options_snowflake_gets_the_three_edu_heads(hub, repositories, tmp_path):
    done = export(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    manifest = Bundle.open(tmp_path / "out").manifest
    assert (manifest.encoder.id, manifest.encoder.revision) == (SNOWFLAKE, head_of(hub, SNOWFLAKE))
    assert (manifest.pooling, manifest.max_tokens) == ("cls", 64), "from modules.json and sentence_bert_config.json"
    files = repositories[f"models/{EDU_REPOSITORY}"]
    commit = head_of(hub, EDU_REPOSITORY)
    assert [(head.name, head.sha256, head.source, head.revision) for head in manifest.readouts] == [
        (name, sha256_of(files / file), f"{EDU_REPOSITORY}/{file}", commit)
        for name, file in zip(NAMES, EDU_HEADS.values(), strict=True)
    ]
    asked = {request.path for request in hub.requests}
    assert not any(path.endswith((".py", ".onnx")) for path in asked)

    # The same again from the cache: with the hub switched off by name, and gone.
    scores = Engine(tmp_path / "out", device="cpu").score(probes.SENTENCES).values
    hub.requests.clear()
    done = export(hub, tmp_path, "--overwrite", HF_HUB_OFFLINE="1")
    assert done.returncode == 0 and not hub.requests, done.stderr
    gone = Server("http://127.0.0.1:9")
    done = export(gone, tmp_path, "--overwrite")
    assert done.returncode == 0, done.stderr
    again = Bundle.open(tmp_path / "out").manifest
    assert (again.encoder, again.readouts, again.files) == (manifest.encoder, manifest.readouts, manifest.files)
    assert (Engine(tmp_path / "out", device="cpu").score(probes.SENTENCES).values == scores).all()


@pytest.mark.parametrize("name", ["../../../../escaped.json", "../other/escaped.json", "/escaped.json"])
def test_a_name_that_leads_out_of_the_repository_is_an_error(hub, tmp_path, monkeypatch, name):
    """huggingface_hub refuses it; that it does is all that is tested here."""
    listed = servers._Repository.at

    def with_another(repository, revision):
        commit, files = listed(repository, revision)
        return commit, files | {name: b"{}"}

    monkeypatch.setattr(servers._Repository, "at", with_another)
    refused(export(hub, tmp_path), tmp_path, SNOWFLAKE, name)
    assert not list(tmp_path.rglob("escaped.json")) and not Path("/escaped.json").exists()


def test_revisions_pin_what_main_has_moved_on_from(hub, repositories, tmp_path):
    before = {name: head_of(hub, name) for name in (SNOWFLAKE, EDU_REPOSITORY)}
    old = sha256_of(repositories[f"models/{EDU_REPOSITORY}"] / EDU_HEADS[NAMES[0]])
    write_head(repositories[f"models/{EDU_REPOSITORY}"] / EDU_HEADS[NAMES[0]], seed=9)
    (repositories[f"models/{SNOWFLAKE}"] / "tokenizer_config.json").write_text('{"model_max_length": 32}')
    assert before[SNOWFLAKE] != head_of(hub, SNOWFLAKE)
    pins = [f"--revision={before[SNOWFLAKE]}", f"--heads-revision={before[EDU_REPOSITORY]}"]
    done = export(hub, tmp_path, *pins)
    assert done.returncode == 0, done.stderr
    manifest = Bundle.open(tmp_path / "out").manifest
    assert (manifest.encoder.revision, manifest.max_tokens) == (before[SNOWFLAKE], 64)
    assert (manifest.readouts[0].revision, manifest.readouts[0].sha256) == (before[EDU_REPOSITORY], old)
    assert export(hub, tmp_path, "--overwrite", f"--encoder={SNOWFLAKE}@{before[SNOWFLAKE]}").returncode == 0
    assert Bundle.open(tmp_path / "out").manifest.encoder.revision == before[SNOWFLAKE]
    assert export(hub, tmp_path, "--overwrite").returncode == 0
    manifest = Bundle.open(tmp_path / "out").manifest
    assert (manifest.encoder.revision, manifest.max_tokens) == (head_of(hub, SNOWFLAKE), 32)
    assert manifest.readouts[0].revision == head_of(hub, EDU_REPOSITORY) and manifest.readouts[0].sha256 != old


def test_a_known_encoder_without_the_pooling_files_is_pooled_as_known(hub, repositories, tmp_path):
    (repositories[f"models/{SNOWFLAKE}"] / "modules.json").unlink()
    done = export(hub, tmp_path, "--no-heads")
    assert done.returncode == 0, done.stderr
    assert Bundle.open(tmp_path / "out").manifest.pooling == "cls"
    assert not any(EDU_REPOSITORY in request.path for request in hub.requests)


def test_a_missing_head_file_is_named(hub, repositories, tmp_path):
    file = EDU_HEADS[NAMES[1]]
    (repositories[f"models/{EDU_REPOSITORY}"] / file).unlink()
    refused(export(hub, tmp_path), tmp_path, EDU_REPOSITORY, file, head_of(hub, EDU_REPOSITORY))


def test_a_file_that_is_listed_and_not_there_is_named(hub, repositories, tmp_path, monkeypatch):
    real = servers.file_answer

    def answer(request: Request, body: bytes, headers: dict[str, str]) -> servers.Answer:
        lost = request.path.endswith("/modules.json")
        return servers.missing("Entry", "Entry not found", headers) if lost else real(request, body, headers)

    monkeypatch.setattr(servers, "file_answer", answer)
    refused(export(hub, tmp_path), tmp_path, SNOWFLAKE, "404", "modules.json")


@pytest.mark.parametrize("lost", [SNOWFLAKE, EDU_REPOSITORY])
def test_a_missing_repository_is_named(repositories, tmp_path, lost):
    del repositories[f"models/{lost}"]
    with servers.hub(repositories) as server:
        refused(export(server, tmp_path), tmp_path, f"{server.url} has no repository {lost}")


def test_a_missing_revision_is_named(hub, tmp_path):
    refused(export(hub, tmp_path, "--revision=v9"), tmp_path, f"{SNOWFLAKE} has no revision v9")
    refused(export(hub, tmp_path, "--heads-revision=v9"), tmp_path, f"{EDU_REPOSITORY} has no revision v9")


@pytest.mark.parametrize(
    ("more", "why"),
    [({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"), ({}, "http://127.0.0.1:9 cannot be reached ([Errno 111]")],
)
def test_an_empty_cache_without_a_hub_is_an_error(tmp_path, more, why):
    done = export(Server("http://127.0.0.1:9"), tmp_path, **more)
    refused(done, tmp_path, why, str(tmp_path / "cache"), EDU_REPOSITORY)


def spoil(server: Server, file: Path, *faults: Fault) -> None:
    """The first downloads of a large file go wrong, as `faults` say; the last fault stays."""
    left = list(faults)

    def fault(request: Request) -> Fault | None:
        if request.method != "GET" or request.path != f"/large/{sha256_of(file)}":
            return None
        return left.pop(0) if len(left) > 1 else left[0]

    server.fault = fault


@pytest.mark.parametrize("file", ["model.safetensors", EDU_HEADS[NAMES[2]]])
def test_a_checksum_mismatch_is_refused_and_fetched_again(hub, repositories, tmp_path, file):
    repository = SNOWFLAKE if file == "model.safetensors" else EDU_REPOSITORY
    path = repositories[f"models/{repository}"] / file
    spoil(hub, path, "flip")
    refused(export(hub, tmp_path), tmp_path, repository, file, sha256_of(path)[:12], "removed from the cache")
    hub.fault = lambda _: None
    assert export(hub, tmp_path).returncode == 0
    assert Bundle.open(tmp_path / "out").heads == NAMES


def test_an_interrupted_download_leaves_no_bundle_and_goes_on_with_the_next_command(hub, repositories, tmp_path):
    spoil(hub, repositories[f"models/{SNOWFLAKE}"] / "model.safetensors", "cut", "drop")
    refused(export(hub, tmp_path), tmp_path, SNOWFLAKE, "start again to fetch what is missing")
    assert [fault for fault, _ in hub.faults][:2] == ["cut", "drop"]
    done = export(hub, tmp_path, HF_HUB_OFFLINE="1")
    refused(done, tmp_path, "HF_HUB_OFFLINE is set", f"does not hold all of {SNOWFLAKE}")
    hub.fault = lambda _: None
    hub.requests.clear()
    assert export(hub, tmp_path).returncode == 0
    assert Bundle.open(tmp_path / "out").heads == NAMES
    assert not any(request.path.endswith("/modules.json") for request in hub.requests), "that one was there already"


def test_a_connection_that_is_cut_once_goes_unnoticed(hub, repositories, tmp_path):
    spoil(hub, repositories[f"models/{SNOWFLAKE}"] / "model.safetensors", "cut", "cut")
    cuts = hub.fault
    hub.fault = lambda request: None if hub.faults else cuts(request)
    assert export(hub, tmp_path).returncode == 0
    assert len(hub.faults) == 1


def test_a_command_that_is_killed_while_it_downloads_leaves_nothing_in_the_way(hub, repositories, tmp_path):
    stuck, go_on = [], threading.Event()

    def stall(request: Request) -> Fault | None:
        if request.method == "GET" and request.path.startswith("/large/"):
            stuck.append(request)
            go_on.wait(30)
            return "drop"
        return None

    hub.fault = stall
    env = environment(hub, tmp_path)
    process = subprocess.Popen([SCRIPT, "--out", tmp_path / "out"], env=env, stderr=subprocess.DEVNULL)
    while not stuck:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    go_on.set()
    hub.fault = lambda _: None
    assert export(hub, tmp_path).returncode == 0
    assert Bundle.open(tmp_path / "out").heads == NAMES


def test_another_encoder_without_heads_is_misuse_that_says_why(hub, tmp_path):
    done = export(hub, tmp_path, "--encoder=intfloat/multilingual-e5-small")
    said = " ".join(done.stderr.split())
    assert done.returncode == 2 and not hub.requests
    assert f"({EDU_REPOSITORY}) read embeddings of {SNOWFLAKE} and of nothing else" in said
    assert "intfloat/multilingual-e5-small needs its own: give --head NAME=FILE.ckpt, or --no-heads" in said
