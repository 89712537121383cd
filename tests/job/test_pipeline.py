from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jql_engine.files.chunks import StageSeconds
from jql_engine.job.pipeline import CAPACITY, StageTime, pipeline


def run(items: Iterable[int], *stages, capacity: int = CAPACITY):
    clocks = [StageTime(f"stage {number}") for number in range(len(stages))]
    return clocks, pipeline(items, list(zip(clocks, stages, strict=True)), capacity)


def add_one(items: Iterator[int]) -> Iterator[int]:
    for item in items:
        yield item + 1


def pair(items: Iterator[int]) -> Iterator[tuple[int, ...]]:
    held: tuple[int, ...] = ()
    for item in items:
        held = (*held, item)
        if len(held) == 2:
            yield held
            held = ()
    if held:
        yield held


def flatten(items: Iterator[tuple[int, ...]]) -> Iterator[int]:
    for item in items:
        yield from item


def threads_of_stages() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("stage ")]


def wait_for(condition) -> None:
    until = time.monotonic() + 20
    while not condition() and time.monotonic() < until:
        time.sleep(0.005)
    assert condition()


@given(st.lists(st.integers(), max_size=30), st.integers(1, 3))
@settings(deadline=None, max_examples=50)
def test_results_come_out_in_order_whatever_a_stage_joins_or_splits(items, capacity):
    _, results = run(items, add_one, pair, flatten, add_one, capacity=capacity)
    assert list(results) == [item + 2 for item in items]
    assert not threads_of_stages()


def test_no_stage_at_all_is_nothing_to_do():
    _, results = run([], add_one)
    assert list(results) == []


class Unwelcome(BaseException):
    pass


@pytest.mark.parametrize("error", [ValueError("this one"), KeyboardInterrupt(), Unwelcome()], ids=repr)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_error_comes_out_after_all_results_before_it(error, place):
    def fail_at_five(items: Iterator[int]) -> Iterator[int]:
        for item in items:
            if item - place == 5:
                raise error
            yield item

    stages = [add_one, add_one]
    stages.insert(place, fail_at_five)
    _, results = run(range(100), *stages)
    seen = []
    with pytest.raises(type(error)) as caught:
        seen.extend(iter(lambda: next(results), None))
    assert caught.value is error
    assert seen == [2, 3, 4, 5, 6]
    wait_for(lambda: not threads_of_stages())


def test_an_error_of_the_input_comes_out():
    def items() -> Iterator[int]:
        yield 1
        raise OSError("no more")

    _, results = run(items(), add_one, add_one)
    assert next(results) == 3
    with pytest.raises(OSError, match="no more"):
        next(results)


def test_an_error_before_the_first_item_comes_out():
    def never(_: Iterator[int]) -> Iterator[int]:
        raise ValueError("not even a generator")

    _, results = run([1], add_one, never, add_one)
    with pytest.raises(ValueError, match="not even a generator"):
        next(results)
    wait_for(lambda: not threads_of_stages())


def test_closing_early_ends_the_threads_and_closes_the_stages():
    closed = []

    def tidy(items: Iterator[int]) -> Iterator[int]:
        try:
            yield from items
        finally:
            closed.append(threading.current_thread().name)

    _, results = run(iter(int, 1), tidy, add_one, tidy)
    assert [next(results), next(results)] == [1, 1]
    assert len(threads_of_stages()) == 3
    results.close()
    wait_for(lambda: not threads_of_stages())
    assert sorted(closed) == ["stage 0", "stage 2"]


def test_a_stage_that_wants_no_more_ends_those_before_it():
    def first_three(items: Iterator[int]) -> Iterator[int]:
        for item, _ in zip(items, range(3), strict=False):
            yield item

    def then_the_others(items: Iterator[int]) -> Iterator[int]:
        yield from items
        wait_for(lambda: [thread.name for thread in threads_of_stages()] == ["stage 2"])
        yield 0

    _, results = run(iter(int, 1), add_one, first_three, then_the_others)
    assert list(results) == [1, 1, 1, 0]
    wait_for(lambda: not threads_of_stages())


@pytest.mark.parametrize("capacity", [1, 2, 5])
def test_the_queues_are_bounded(capacity):
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(1_000):
            taken.append(number)
            yield number

    clocks, results = run(items(), add_one, add_one, capacity=capacity)
    assert taken == []  # nothing begins before the first result is asked for
    next(results)
    most = 1 + 2 * capacity + 2  # the result, each queue full, and one item in the hands of each stage
    wait_for(lambda: len(taken) == most)
    wait_for(lambda: all(clock.seconds().blocked > 0.02 for clock in clocks))
    assert len(taken) == most
    for _ in range(10):
        next(results)
    wait_for(lambda: len(taken) == most + 10)
    results.close()
    assert len(taken) <= most + 11


def test_stages_work_at_the_same_time():
    together = threading.Barrier(3, timeout=20)

    def meet(number: int) -> Callable[[Iterator[int]], Iterator[int]]:
        def stage(items: Iterator[int]) -> Iterator[int]:
            for item in items:
                if item == 2 - number:
                    together.wait()  # the first stage with item 2 in hand, the last with item 0
                yield item

        return stage

    _, results = run(range(3), meet(0), meet(1), meet(2))
    assert list(results) == [0, 1, 2]


def test_the_time_of_a_stage_is_all_accounted_for():
    def slow(items: Iterator[int]) -> Iterator[int]:
        for item in items:
            time.sleep(0.02)
            yield item

    began = time.monotonic()
    clocks, results = run(range(10), add_one, slow, add_one)
    assert len(list(results)) == 10
    whole = time.monotonic() - began
    first, middle, last = (clock.seconds() for clock in clocks)
    assert middle.busy >= 10 * 0.02
    assert first.blocked > first.busy and last.starved > last.busy  # they wait for the one in the middle
    assert max(middle.starved, middle.blocked) < middle.busy
    for spent in (first, middle, last):
        assert 0 < spent.busy + spent.starved + spent.blocked <= whole + 1e-3
    assert clocks[0].seconds() == first  # stands still after the end


def test_a_clock_can_be_read_while_its_stage_waits():
    clocks, results = run(iter(int, 1), add_one, add_one)
    next(results)
    wait_for(lambda: clocks[0].seconds().blocked > 0.05)
    before = clocks[0].seconds()
    wait_for(lambda: clocks[0].seconds().blocked > before.blocked + 0.02)
    assert clocks[0].seconds().busy <= before.busy + 0.01
    results.close()


def test_a_stage_that_has_not_begun_has_spent_nothing():
    assert StageTime("x").seconds() == StageSeconds(0, 0, 0)


def test_working_and_waiting_add_up_exactly(monkeypatch):
    now = iter([10.0, 11.0, 13.0, 20.0, 24.0, 25.0])
    monkeypatch.setattr("jql_engine.job.pipeline.time.monotonic", lambda: next(now))
    clock = StageTime("x")
    with clock.working():  # from 10 to 25
        with clock.waiting("starved"):  # from 11 to 13
            pass
        with clock.waiting("blocked"):  # from 20 to 24
            pass
    assert clock.seconds() == StageSeconds(busy=9.0, starved=2.0, blocked=4.0)
