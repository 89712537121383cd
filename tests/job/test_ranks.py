from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jql_engine.errors import EngineError
from jql_engine.files.inputs import SourceFile
from jql_engine.job.ranks import Rank, rank_of, share
from jql_engine.names import RelativeName

BATCH = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_NNODES": "2"}
STEP = BATCH | {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5"}
ARRAY = {
    "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_STEP": "1",
    "SLURM_ARRAY_TASK_COUNT": "5", "SLURM_ARRAY_TASK_MAX": "4",
}  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Rank(0, 1, "default")),
        ({"PATH": "/bin", "RANK": "3"}, Rank(0, 1, "default")),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, Rank(3, 4, "RANK, WORLD_SIZE")),
        ({"RANK": "3", "WORLD_SIZE": "4"} | STEP | ARRAY, Rank(3, 4, "RANK, WORLD_SIZE")),
        ({"RANK": "", "WORLD_SIZE": "many", "ODD": "²"}, Rank(0, 1, "default")),
        (BATCH, Rank(0, 1, "default")),
        (STEP, Rank(5, 8, "SLURM_PROCID")),
        (BATCH | ARRAY, Rank(3, 5, "SLURM_ARRAY_TASK_ID")),
        (STEP | ARRAY, Rank(29, 40, "SLURM_PROCID, SLURM_ARRAY_TASK_ID")),
        (ARRAY | {"SLURM_ARRAY_TASK_ID": "4"}, Rank(4, 5, "SLURM_ARRAY_TASK_ID")),
    ],
    ids=[
        "nothing",
        "half",
        "torchrun",
        "torchrun first",
        "no numbers",
        "batch",
        "srun",
        "array",
        "both",
        "plain array",
    ],
)
def test_the_environment_says_the_rank(environment, expected):
    assert rank_of(None, None, environment) == expected


@pytest.mark.parametrize(("first", "last", "count"), [(5, 5, 1), (0, 0, 1), (3, 7, 2), (0, 7, 2), (1, 4, 4), (0, 8, 5)])
def test_some_tasks_of_an_array_that_are_submitted_again_do_not_guess(first, last, count):
    limits = {
        "SLURM_ARRAY_TASK_MIN": str(first),
        "SLURM_ARRAY_TASK_MAX": str(last),
        "SLURM_ARRAY_TASK_COUNT": str(count),
    }
    with pytest.raises(EngineError, match=f"job array of {count} tasks, {first} to {last}: .*--rank .*--world-size N"):
        rank_of(None, None, BATCH | ARRAY | limits | {"SLURM_ARRAY_TASK_ID": str(last)})


def test_every_task_of_an_array_of_steps_has_a_rank_of_its_own():
    ranks = [
        rank_of(None, None, STEP | ARRAY | {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_PROCID": str(process)})
        for task in range(5)
        for process in range(8)
    ]
    assert [rank.rank for rank in ranks] == list(range(40))
    assert {rank.world_size for rank in ranks} == {40}


def test_options_come_before_the_environment():
    assert rank_of(1, 3, STEP | ARRAY) == Rank(1, 3, "--rank, --world-size")


@pytest.mark.parametrize(("rank", "world_size"), [(0, None), (None, 4)])
def test_half_of_the_options_is_misuse(rank, world_size):
    with pytest.raises(EngineError, match="--rank and --world-size go together"):
        rank_of(rank, world_size, STEP)


@pytest.mark.parametrize(("rank", "world_size"), [(4, 4), (-1, 4), (0, 0), (1, 0)])
def test_a_rank_outside_of_its_world_is_misuse(rank, world_size):
    with pytest.raises(EngineError, match=rf"rank {rank} of {world_size} \(--rank, --world-size\)"):
        rank_of(rank, world_size, {})


def test_an_environment_that_contradicts_itself_is_named():
    with pytest.raises(EngineError, match=r"rank 9 of 4 \(RANK, WORLD_SIZE\)"):
        rank_of(None, None, {"RANK": "9", "WORLD_SIZE": "4"})


def sources(sizes: list[int]) -> list[SourceFile]:
    names = [Path(f"{number:03}.parquet") for number in range(len(sizes))]
    return [SourceFile(name, RelativeName(str(name)), size, "") for name, size in zip(names, sizes, strict=True)]


SIZES = st.lists(st.integers(-1, 1_000), max_size=40)  # -1: a file system that does not say


@given(SIZES, st.integers(1, 12))
@settings(deadline=None, max_examples=200)
def test_the_ranks_take_every_file_once_in_order(sizes, world_size):
    files = sources(sizes)
    shares = [share(files, Rank(rank, world_size)) for rank in range(world_size)]
    assert sorted((file for mine in shares for file in mine), key=lambda file: file.relative) == files
    assert all(mine == sorted(mine, key=lambda file: file.relative) for mine in shares)


@given(SIZES, st.integers(1, 12))
@settings(deadline=None, max_examples=200)
def test_the_shares_differ_by_a_file_at_most(sizes, world_size):
    files = sources(sizes)
    loads = [sum(max(1, file.size) for file in share(files, Rank(rank, world_size))) for rank in range(world_size)]
    assert max(loads) - min(loads) <= max([1, *sizes])


@given(SIZES, st.integers(1, 6), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=100)
def test_the_order_in_which_files_are_listed_does_not_matter(sizes, world_size, random):
    files = sources(sizes)
    mixed = random.sample(files, len(files))
    for rank in range(world_size):
        assert set(share(mixed, Rank(rank, world_size))) == set(share(files, Rank(rank, world_size)))


def test_the_largest_go_first():
    files = sources([1, 1, 1, 10, 6, 5])
    assert [[file.size for file in share(files, Rank(rank, 2))] for rank in range(2)] == [[1, 1, 10], [1, 6, 5]]
