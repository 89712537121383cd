"""Ranks share one listing, whenever they run and whatever they see."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jql_engine.dataset import find_files
from jql_engine.errors import OutputError
from jql_engine.frozen import freeze
from jql_engine.launch import Machine, score
from jql_engine.plan import Job
from jql_engine.progress import RunLog
from jql_engine.ranks import Rank
from tests.test_run import visible, write


def names(sources) -> list[str]:
    return sorted(source.relative.text for source in sources)


def corpus(folder: Path, *names: str) -> Path:
    for name in names:
        write(folder / name, [f"{name} {row}" for row in range(1 + len(name))])
    return folder


@given(st.lists(st.sets(st.integers(0, 9), min_size=1), min_size=1, max_size=5), st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_every_file_of_the_listing_belongs_to_one_rank_whatever_the_ranks_see(tmp_path_factory, seen, world_size):
    """Each rank sees other files than the one before, as where a corpus is still being written."""
    folder = tmp_path_factory.mktemp("frozen")
    everything = find_files([str(corpus(folder / "in", *(f"{i}.parquet" for i in range(10))))]).files
    shares = []
    for rank in range(world_size):
        sources = [everything[i] for i in sorted(seen[rank % len(seen)])]
        shares.append(freeze(folder / "out", ["in"], sources).share_of(Rank(rank, world_size), sources))
    first = {everything[i].relative.text for i in seen[0]}
    taken = [name for share in shares for name in [*names(share.sources), *(f.relative.text for f in share.gone)]]
    assert sorted(taken) == sorted(first)
    for rank, share in enumerate(shares):
        found = {everything[i].relative.text for i in seen[rank % len(seen)]}
        assert share.n_new == len(found - first) and set(names(share.sources)) <= found


def test_ranks_that_begin_at_once_take_the_same_listing(tmp_path):
    sources = find_files([str(corpus(tmp_path / "in", *(f"{i}.parquet" for i in range(16))))]).files
    together = threading.Barrier(16)

    def begin(number: int) -> str:
        together.wait()
        return freeze(tmp_path / "out", ["in"], sources[: number + 1]).id

    with ThreadPoolExecutor(16) as pool:
        assert len(set(pool.map(begin, range(16)))) == 1


def test_the_next_listing_begins_once_all_ranks_have_finished_this_one(tmp_path):
    sources = find_files([str(corpus(tmp_path / "in", "a.parquet", "b.parquet"))]).files
    out = tmp_path / "out"
    first = freeze(out, ["in"], sources[:1])
    first.finish(Rank(0, 2))
    assert freeze(out, ["in"], sources).id == first.id
    first.finish(Rank(1, 2))
    assert visible(out) == []
    second = freeze(out, ["in"], sources)
    assert second.id != first.id and [file.relative.text for file in second.files] == ["a.parquet", "b.parquet"]


def test_a_rank_that_was_killed_while_it_removed_a_finished_listing_leaves_no_old_one_behind(tmp_path):
    sources = find_files([str(corpus(tmp_path / "in", "a.parquet", "b.parquet"))]).files
    out = tmp_path / "out"
    first = freeze(out, ["in"], sources[:1])
    (out / ".parts" / f"{first.inputs}.0.{first.id}.0-of-1.done").write_bytes(b"")
    second = freeze(out, ["in"], sources)
    assert second.number == 1 and len(second.files) == 2
    assert [name for name in visible(out) if first.id in name or ".0." in name] == []


def test_other_inputs_have_a_listing_of_their_own(tmp_path):
    sources = find_files([str(corpus(tmp_path / "in", "a.parquet"))]).files
    one, other = (freeze(tmp_path / "out", [given], sources) for given in ("in", "more"))
    assert one.id != other.id and freeze(tmp_path / "out", ["in/"], sources).id == one.id


@pytest.mark.parametrize("content", [b"", b"[]", b'{"id": 1}', b'{"id": "x", "files": [["../x", 1]]}', b"\xff"])
def test_a_damaged_listing_is_named(tmp_path, content):
    sources = find_files([str(corpus(tmp_path / "in", "a.parquet"))]).files
    freeze(tmp_path / "out", ["in"], sources)
    [listing] = (tmp_path / "out/.parts").glob("*.listing")
    listing.write_bytes(content)
    with pytest.raises(OutputError, match=r"\.listing is damaged .*remove it"):
        freeze(tmp_path / "out", ["in"], sources)


def run(bundle, source: Path, out: Path, rank: int, world_size: int = 3) -> dict[str, object]:
    job = Job((str(source),), out, rank=Rank(rank, world_size))
    return score(job, bundle, Machine("cpu", "cpu-fp32"), RunLog(None), threading.Event())


def test_files_that_come_and_go_between_the_ranks_are_left_to_nobody(bundle, tmp_path, capfd):
    source, out = corpus(tmp_path / "in", *(f"{i}.parquet" for i in range(6))), tmp_path / "out"
    assert run(bundle, source, out, 0)["unfinished"] == []
    corpus(source, "00.parquet", "large-and-new.parquet")
    assert run(bundle, source, out, 1)["unfinished"] == []
    assert "2 files have appeared since the ranks began" in capfd.readouterr().err
    listed = [json.loads(file.read_bytes())["files"] for file in out.glob(".parts/*.listing")]
    assert [sorted(name for name, _ in files) for files in listed] == [[f"{i}.parquet" for i in range(6)]]
    left = {f"{i}.parquet" for i in range(6)} - set(visible(out))
    gone = min(left)
    (source / gone).unlink()
    [unfinished] = run(bundle, source, out, 2)["unfinished"]
    assert unfinished["file"] == gone and "is gone" in unfinished["reason"]
    assert visible(out) == sorted({f"{i}.parquet" for i in range(6)} - {gone})  # the listing is gone as well
    for rank in range(3):
        assert run(bundle, source, out, rank)["unfinished"] == []
    assert visible(out) == visible(source)
    for name in visible(source):
        assert pq.read_metadata(out / name).num_rows == pq.read_metadata(source / name).num_rows


def test_a_rank_alone_finishes_what_is_finished(bundle, tmp_path):
    source, out = corpus(tmp_path / "in", "a.parquet", "b.parquet"), tmp_path / "out"
    for rank in range(2):
        run(bundle, source, out, rank, 2)
    assert run(bundle, source, out, 0, 2)["skipped_files"] == 1
    assert visible(out) == ["a.parquet", "b.parquet"]


def test_with_a_limit_the_ranks_share_the_first_documents(bundle, tmp_path):
    source, out = corpus(tmp_path / "in", *(f"{i}.parquet" for i in range(6))), tmp_path / "out"
    job = Job((str(source),), out, limit=30)
    for rank in range(2):
        if rank:
            corpus(source, "00.parquet")
        ranked = replace(job, rank=Rank(rank, 2))
        score(ranked, bundle, Machine("cpu", "cpu-fp32"), RunLog(None), threading.Event())
    assert visible(out) == ["0.parquet", "1.parquet", "2.parquet"]
    assert sum(pq.read_metadata(out / name).num_rows for name in visible(out)) == 30


def test_a_rank_that_was_stopped_has_not_finished(bundle, tmp_path):
    source, out = corpus(tmp_path / "in", *(f"{i}.parquet" for i in range(4))), tmp_path / "out"
    stop = threading.Event()
    stop.set()
    job = Job((str(source),), out, rank=Rank(0, 2))
    score(job, bundle, Machine("cpu", "cpu-fp32"), RunLog(None), stop)
    assert not list(out.glob(".parts/*.done"))
