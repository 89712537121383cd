"""A real FTP server: a file system without atomic uploads, whose URLs name a host and a user that paths do not."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from pyftpdlib.authorizers import DummyAuthorizer
from pyftpdlib.handlers import FTPHandler
from pyftpdlib.servers import ThreadedFTPServer

from jql_engine.cli import cut as jql_cut
from jql_engine.cli import run as jql_run
from tests.job.test_run import visible, write


@pytest.fixture
def served(tmp_path) -> Iterator[tuple[Path, str]]:
    """A folder, and its URL."""
    root = tmp_path / "root"
    root.mkdir()
    authorizer = DummyAuthorizer()
    authorizer.add_user("user", "secret", str(root), perm="elradfmwMT")
    handler = type("Handler", (FTPHandler,), {"authorizer": authorizer})
    logging.getLogger("pyftpdlib").setLevel(logging.CRITICAL)
    server = ThreadedFTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield root, f"ftp://user:secret@127.0.0.1:{server.address[1]}"
    server.close_all()
    thread.join()


def test_scores_and_kept_rows_go_to_an_ftp_server(bundle, served, tmp_path, capfd):
    root, url = served
    for name in ("a", "b"):
        write(root / f"corpus/{name}.parquet", [f"Water {name} {row}" for row in range(50)])
    options = ["--bundle", bundle.path, "--device", "cpu", "--retry-minutes", "0"]
    assert called(jql_run, f"{url}/corpus", "--out", f"{url}/scores", *options) == 0, capfd.readouterr()
    assert called(jql_run, f"{url}/corpus", "--out", f"{url}/scores", *options) == 0
    assert "2 files finished already" in capfd.readouterr().err
    kept = ["--corpus", f"{url}/corpus", "--out", f"{url}/kept", "--quantile", "0.6", "--rule", "any"]
    assert called(jql_cut, f"{url}/scores", *kept) == 0, capfd.readouterr()
    assert called(jql_cut, f"{url}/scores", *kept, "--keep", "0.5") == 2, "misuse"
    assert visible(root) == [
        "corpus/a.parquet", "corpus/b.parquet", "kept/a.parquet", "kept/b.parquet", "kept/thresholds.json",
        "scores/a.parquet", "scores/b.parquet",
    ]  # fmt: skip
    n_kept = sum(pq.read_metadata(root / f"kept/{name}.parquet").num_rows for name in ("a", "b"))
    assert n_kept == json.loads((root / "kept/thresholds.json").read_text())["counts"]["kept_documents"] > 0
    assert "secret" not in "".join(capfd.readouterr())


def test_an_output_inside_of_the_input_is_refused(bundle, served, capfd):
    root, url = served
    write(root / "corpus/a.parquet", ["Water"])
    assert called(jql_run, f"{url}/corpus", "--out", f"{url}/corpus/scores", "--bundle", bundle.path) == 1
    assert "lies inside of the input" in capfd.readouterr().err
    assert visible(root) == ["corpus/a.parquet"]


def called(module, *arguments: object) -> int:
    """The exit code of a command."""
    with pytest.raises(SystemExit) as raised, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["jql", *map(str, arguments)])
        module.main()
    return raised.value.code
