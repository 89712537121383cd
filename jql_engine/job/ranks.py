"""Several machines on one job: every rank takes its share of the files by itself, from the same list."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from jql_engine.errors import EngineError
from jql_engine.names import RelativeName


@dataclass(frozen=True, slots=True)
class Rank:
    """One of `world_size` runs of the same command, numbered from 0."""

    rank: int = 0
    world_size: int = 1
    said_by: str = "default"

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise EngineError(
                f"rank {self.rank} of {self.world_size} ({self.said_by}): expected 0 <= rank < world size"
            )


def rank_of(rank: int | None, world_size: int | None, environment: Mapping[str, str]) -> Rank:
    """The options where given, else what torchrun or SLURM (srun, job arrays, or both) say, else the only one."""
    if (rank is None) != (world_size is None):
        raise EngineError("--rank and --world-size go together; give both or neither")
    if rank is not None and world_size is not None:
        return Rank(rank, world_size, "--rank, --world-size")
    number = {name: int(value) for name, value in environment.items() if value.isdecimal()}
    if "RANK" in number and "WORLD_SIZE" in number:
        return Rank(number["RANK"], number["WORLD_SIZE"], "RANK, WORLD_SIZE")
    # Only srun sets SLURM_STEP_NUM_TASKS: the batch script itself is one process, whatever --ntasks says.
    inner, n_inner, said_by = 0, 1, []
    if "SLURM_STEP_NUM_TASKS" in number and "SLURM_PROCID" in number:
        inner, n_inner = number["SLURM_PROCID"], number["SLURM_STEP_NUM_TASKS"]
        said_by.append("SLURM_PROCID")
    outer, n_outer = 0, 1
    if "SLURM_ARRAY_TASK_ID" in number:
        outer, n_outer = _place_in_array(number)
        said_by.append("SLURM_ARRAY_TASK_ID")
    return Rank(outer * n_inner + inner, n_outer * n_inner, ", ".join(said_by) or "default")


def _place_in_array(number: Mapping[str, int]) -> tuple[int, int]:
    """Number and count of a job array's task; raises EngineError for what may be some tasks of it, submitted again."""
    task, count = number["SLURM_ARRAY_TASK_ID"], number.get("SLURM_ARRAY_TASK_COUNT", 0)
    first, last = number.get("SLURM_ARRAY_TASK_MIN", 0), number.get("SLURM_ARRAY_TASK_MAX", 0)
    if count < 2 or first != 0 or last != count - 1:
        raise EngineError(
            f"SLURM job array of {count} tasks, {first} to {last}: expected all of 0 to N-1, since the share of a task "
            "depends on N; for others give --rank $SLURM_ARRAY_TASK_ID --world-size N with the N of the whole job"
        )
    return task, count


class Sized(Protocol):
    """A file of an input."""

    @property
    def relative(self) -> RelativeName:
        """Where its scores go, below the output folder."""
        ...

    @property
    def size(self) -> int:
        """Size in bytes."""
        ...


F = TypeVar("F", bound=Sized)


def share(files: Sequence[F], rank: Rank) -> list[F]:
    """The files of `rank`, in the order of `files`: the largest goes first, to whoever has the fewest bytes so far."""
    loads = [(0, number) for number in range(rank.world_size)]
    mine: set[int] = set()
    for index in sorted(range(len(files)), key=lambda i: (-files[i].size, files[i].relative)):
        load, number = heapq.heappop(loads)
        heapq.heappush(loads, (load + max(1, files[index].size), number))
        if number == rank.rank:
            mine.add(index)
    return [file for index, file in enumerate(files) if index in mine]
