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

from jql_engine.errors import EngineError, OutputError
from jql_engine.files.inputs import find_files
from jql_engine.job.finished import check_finished
from jql_engine.job.frozen import freeze, remove_stray
from jql_engine.job.launch import Machine, score
from jql_engine.job.plan import Job
from jql_engine.job.progress import RunLog
from jql_engine.job.ranks import Rank
from tests.job.test_run import visible, write


def names(sources) -> list[str]:
    return sorted(source.relative.text for source in sources)


def corpus(folder: Path, *names: str) -> Path:
    for name in names:
        write(folder / name, [f"{name} {row}" for row in range(1 + len(name))])
    return folder


KEY = "0123456789ab"


def begin(out: Path, sources, given: tuple[str, ...] = ("in",)):
    return freeze(out, KEY, given, sources)


@given(st.lists(st.sets(st.integers(0, 9), min_size=1), min_size=1, max_size=5), st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_every_file_of_the_listing_belongs_to_one_rank_whatever_the_ranks_see(tmp_path_factory, seen, world_size):
    """Each rank sees other files than the one before, as where a corpus is still being written."""
    folder = tmp_path_factory.mktemp("frozen")
    everything = find_files([str(corpus(folder / "in", *(f"{i}.parquet" for i in range(10))))]).files
    shares = []
    for rank in range(world_size):
        sources = [everything[i] for i in sorted(seen[rank % len(seen)])]
        shares.append(begin(folder / "out", sources).share_of(Rank(rank, world_size), sources))
    first = {everything[i].relative.text for i in seen[0]}
    taken = [name for share in shares for name in [*names(share.sources), *(f.relative.text for f in share.gone)]]
    assert sorted(taken) == sorted(first)
    for rank, share in enumerate(shares):
        found = {everything[i].relative.text for i in seen[rank % len(seen)]}
        assert share.n_new == len(found - first) and set(names(share.sources)) <= found


def test_ranks_that_begin_at_once_take_the_same_listing(tmp_path):
    sources = find_files([str(corpus(tmp_path / "in", *(f"{i}.parquet" for i in range(16))))]).files
    together = threading.Barrier(16)

    def start(number: int) -> str:
        together.wait()
        return begin(tmp_path / "out", sources[: number + 1]).id

    with ThreadPoolExecutor(16) as pool:
        assert len(set(pool.map(start, range(16)))) == 1


def test_the_next_listing_begins_once_all_ranks_have_finished_this_one(tmp_path):
    sources = find_files([str(corpus(tmp_path / "in", "a.parquet", "b.parquet"))]).files
    out = tmp_path / "out"
    first = begin(out, sources[:1])
    assert first.finish(Rank(0, 2)) == [1]
    assert begin(out, sources).id == first.id
    assert first.finish(Rank(1, 2)) == []
    assert visible(out) == []
    second = begin(out, sources)
    assert second.id != first.id and [file.relative.text for file in second.files] == ["a.parquet", "b.parquet"]


def test_a_rank_that_begins_again_has_not_finished(tmp_path):
    sources = find_files([str(corpus(tmp_path / "in", "a.parquet", "b.parquet"))]).files
    listing = begin(tmp_path / "out", sources)
    listing.finish(Rank(0, 2))
    listing.begin(Rank(0, 2))
    assert listing.finish(Rank(1, 2)) == [0]
    assert begin(tmp_path / "out", sources).id == listing.id


def test_who_closes_a_listing_late_leaves_the_next_one_alone(tmp_path):
    sources = find_files([str(corpus(tmp_path / "in", "a.parquet", "b.parquet"))]).files
    out = tmp_path / "out"
    first = begin(out, sources[:1])
    first.finish(Rank())
    second = begin(out, sources)
    assert second.number == first.number  # numbers begin anew where nothing is left
    first.close()
    assert begin(out, sources).id == second.id
    assert [name for name in visible(out) if first.id in name] == []


@pytest.mark.parametrize("left", ["{first}.0-of-1.done", "{first}.closed"])
def test_a_rank_that_was_killed_while_it_closed_a_listing_leaves_nothing_behind(tmp_path, left):
    sources = find_files([str(corpus(tmp_path / "in", "a.parquet", "b.parquet"))]).files
    out = tmp_path / "out"
    first = begin(out, sources[:1])
    place = out / ".parts" / left.format(first=f"{KEY}.0.{first.id}")
    if "done" in left:  # before it removed the listing
        place.write_bytes(b"")
        second = begin(out, sources)
        assert second.number == 1 and len(second.files) == 2
    else:  # after it
        first.finish(Rank())
        place.parent.mkdir()
        place.write_bytes(b"")
        remove_stray(out, KEY, overwrite=False)
        assert visible(out) == []
        second = begin(out, sources)
    assert visible(out) == [f".parts/{KEY}.{second.number}.listing"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_job_that_starts_over_removes_the_listings_of_others(tmp_path, overwrite):
    sources = find_files([str(corpus(tmp_path / "in", "a.parquet"))]).files
    listing = begin(tmp_path / "out", sources)
    (tmp_path / "out/.parts" / f"{KEY}.0.{listing.id}.1-of-2.done").write_bytes(b"")
    before = visible(tmp_path / "out")
    remove_stray(tmp_path / "out", KEY, overwrite)
    assert visible(tmp_path / "out") == before
    remove_stray(tmp_path / "out", "f" * 12, overwrite)
    assert visible(tmp_path / "out") == ([] if overwrite else before)


def test_other_inputs_of_one_rank_are_an_error(tmp_path):
    sources = find_files([str(corpus(tmp_path / "in", "a.parquet"))]).files
    listing = begin(tmp_path / "out", sources)
    assert begin(tmp_path / "out", sources, ("in/",)).id == listing.id
    with pytest.raises(OutputError, match=r"only there in, only here in/1, in/2; .* a pattern in quotes"):
        begin(tmp_path / "out", sources, ("in/1", "in/2"))
    listing.finish(Rank())
    assert begin(tmp_path / "out", sources, ("more",)).id != listing.id


@pytest.mark.parametrize("content", [b"", b"[]", b'{"id": 1}', b'{"id": "x", "files": [["../x", 1]]}', b"\xff"])
def test_a_damaged_listing_is_named(tmp_path, content):
    sources = find_files([str(corpus(tmp_path / "in", "a.parquet"))]).files
    begin(tmp_path / "out", sources)
    [listing] = (tmp_path / "out/.parts").glob("*.listing")
    listing.write_bytes(content)
    with pytest.raises(OutputError, match=r"\.listing is damaged .*remove it"):
        begin(tmp_path / "out", sources)


def run(bundle, source: Path, out: Path, rank: int, world_size: int = 3) -> dict[str, object]:
    job = Job((str(source),), out, rank=Rank(rank, world_size))
    return score(job, bundle, Machine("cpu", "cpu-fp32"), RunLog(None), threading.Event())


def test_files_that_come_and_go_between_the_ranks_are_left_to_nobody(bundle, tmp_path, capfd):
    source, out = corpus(tmp_path / "in", *(f"{i}.parquet" for i in range(6))), tmp_path / "out"
    assert run(bundle, source, out, 0)["unfinished"] == []
    corpus(source, "00.parquet", "large-and-new.parquet")
    assert run(bundle, source, out, 1)["unfinished"] == []
    assert "2 files appeared since the ranks began" in capfd.readouterr().err
    listed = [json.loads(file.read_bytes())["files"] for file in out.glob(".parts/*.listing")]
    assert [sorted(name for name, _ in files) for files in listed] == [[f"{i}.parquet" for i in range(6)]]
    left = {f"{i}.parquet" for i in range(6)} - set(visible(out))
    gone = min(left)
    (source / gone).unlink()
    [unfinished] = run(bundle, source, out, 2)["unfinished"]
    assert unfinished["file"] == gone and "is gone" in unfinished["reason"]
    [listed] = [name for name in visible(out) if name.startswith(".parts/")]  # the listing is gone as well
    assert listed.endswith(".2-of-3.run")
    assert set(visible(out)) - {listed} == {f"{i}.parquet" for i in range(6)} - {gone}
    for rank in range(3):
        assert run(bundle, source, out, rank)["unfinished"] == []
    assert visible(out) == visible(source)
    for name in visible(source):
        assert pq.read_metadata(out / name).num_rows == pq.read_metadata(source / name).num_rows


def test_a_rank_whose_share_cannot_be_read_names_it(bundle, tmp_path):
    source, out = corpus(tmp_path / "in", "a.parquet"), tmp_path / "out"
    (source / "b.parquet").write_bytes(b"x")
    unfinished = [file for rank in range(2) for file in run(bundle, source, out, rank, 2)["unfinished"]]
    assert [Path(file["file"]).name for file in unfinished] == ["b.parquet"]
    left, a = visible(out)  # all ranks are through: what comes next is in the next listing
    assert left.endswith(".run") and a == "a.parquet"
    corpus(source, "c.parquet")
    for rank in range(2):
        run(bundle, source, out, rank, 2)
    assert visible(out)[-2:] == ["a.parquet", "c.parquet"]
    assert [Path(one.file).name for one in check_finished(str(out))] == ["b.parquet"]


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


def test_the_output_belongs_to_the_ranks_until_all_are_through(bundle, tmp_path, capfd):
    source, out = corpus(tmp_path / "in", *(f"{i}.parquet" for i in range(4))), tmp_path / "out"
    run(bundle, source, out, 0)
    assert "this rank is through; of 3, not yet: 1, 2" in capfd.readouterr().err
    with pytest.raises(OutputError, match=r"finish that job with its own command.*--overwrite"):
        score(Job((str(source),), out, limit=1), bundle, Machine("cpu", "cpu-fp32"), RunLog(None), threading.Event())
    assert run(bundle, source, out, 0, 1)["unfinished"] == []  # alone, instead of the others
    assert visible(out) == visible(source)


def test_a_rank_with_other_inputs_is_refused_and_changes_nothing(bundle, tmp_path):
    source, out = corpus(tmp_path / "in", *(f"{i}.parquet" for i in range(4))), tmp_path / "out"
    run(bundle, source, out, 0)
    before = visible(out)
    with pytest.raises(OutputError, match="pattern in quotes"):
        run(bundle, source / "*.parquet", out, 1)
    assert visible(out) == before


def limited(bundle, source: Path, out: Path, rank: int) -> dict[str, object]:
    job = Job((str(source),), out, limit=30, rank=Rank(rank, 2))
    return score(job, bundle, Machine("cpu", "cpu-fp32"), RunLog(None), threading.Event())


@pytest.mark.parametrize("change", ["gone", "grown"])
def test_with_a_limit_ranks_that_find_other_files_are_refused(bundle, tmp_path, change):
    source, out = corpus(tmp_path / "in", *(f"{i}.parquet" for i in range(6))), tmp_path / "out"
    limited(bundle, source, out, 0)
    if change == "gone":
        (source / "0.parquet").unlink()
    else:
        write(source / "0.parquet", ["more"] * 50)
    with pytest.raises(OutputError, match=r"0\.parquet was changed or removed since the first rank began"):
        limited(bundle, source, out, 1)


def test_a_mistake_of_the_first_rank_binds_nobody(bundle, tmp_path):
    source, out = corpus(tmp_path / "in", *(f"{i}.parquet" for i in range(4))), tmp_path / "out"
    job = Job((str(source),), out, text_column="txt", rank=Rank(0, 2))
    with pytest.raises(EngineError, match="has no column 'txt'"):
        score(job, bundle, Machine("cpu", "cpu-fp32"), RunLog(None), threading.Event())
    assert not out.exists()


def test_a_listing_that_was_being_removed_is_finished(tmp_path):
    sources = find_files([str(corpus(tmp_path / "in", "a.parquet", "b.parquet"))]).files
    first = begin(tmp_path / "out", sources[:1])
    (tmp_path / "out/.parts" / f"{KEY}.0.{first.id}.closed").write_bytes(b"")
    second = begin(tmp_path / "out", sources)
    assert second.id != first.id and visible(tmp_path / "out") == [f".parts/{KEY}.{second.number}.listing"]


def test_a_rank_that_ends_after_its_listing_leaves_no_mark(tmp_path):
    sources = find_files([str(corpus(tmp_path / "in", "a.parquet"))]).files
    listing = begin(tmp_path / "out", sources)
    listing.finish(Rank())
    assert listing.finish(Rank(1, 2)) == []
    assert visible(tmp_path / "out") == []
