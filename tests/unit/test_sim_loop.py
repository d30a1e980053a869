"""The virtual-time loop: time jumps, order repeats, and a stuck simulation says so."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from chaos.sim.clock import WALL_START, VirtualClock
from chaos.sim.loop import Deadlock, LimitReached, Livelock, NotSimulated, SimLoop

MakeLoop = Callable[..., SimLoop]


@pytest.fixture
def make_loop() -> Iterator[MakeLoop]:
    loops: list[SimLoop] = []

    def make(**options: Any) -> SimLoop:
        loops.append(SimLoop(**options))
        return loops[-1]

    yield make
    for loop in loops:
        loop.close()


def test_a_year_passes_without_waiting(make_loop: MakeLoop) -> None:
    loop = make_loop(start=5.0)

    async def main() -> None:
        await asyncio.sleep(365 * 86_400)

    loop.run_until_complete(main())
    assert loop.time() == 5.0 + 365 * 86_400
    assert loop.steps < 10


def test_timers_of_one_instant_fire_in_the_order_they_were_set(make_loop: MakeLoop) -> None:
    loop = make_loop()
    seen: list[int] = []

    async def main() -> None:
        for number in range(50):
            loop.call_later(1.0, seen.append, number)
        await asyncio.sleep(2.0)

    loop.run_until_complete(main())
    assert seen == list(range(50))


def test_a_timeout_fires_at_its_virtual_time(make_loop: MakeLoop) -> None:
    loop = make_loop(start=0.0)

    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(30):
                await loop.create_future()
        assert loop.time() == 30.0

    loop.run_until_complete(main())


def test_many_cancelled_timers_leave_the_heap(make_loop: MakeLoop) -> None:
    loop = make_loop()

    async def main() -> None:
        for _ in range(10_000):
            loop.call_later(1e6, print).cancel()
        assert len(loop._timers) < 1_000

    loop.run_until_complete(main())


async def _schedule(seen: list[int]) -> None:
    async def worker(number: int) -> None:
        for _ in range(3):
            seen.append(number)
            await asyncio.sleep(0)

    await asyncio.gather(*(worker(number) for number in range(8)))


def test_a_shuffled_schedule_repeats_with_its_seed_and_differs_with_another(
    make_loop: MakeLoop,
) -> None:
    def run(seed: int | None) -> list[int]:
        seen: list[int] = []
        shuffle = None if seed is None else random.Random(seed)
        make_loop(shuffle=shuffle).run_until_complete(_schedule(seen))
        return seen

    assert run(1) == run(1)
    assert run(1) != run(2)
    assert run(None) == [*range(8), *range(8), *range(8)]


def test_a_set_of_tasks_is_walked_in_order_of_creation(make_loop: MakeLoop) -> None:
    async def nothing() -> None:
        return None

    def run() -> list[int]:
        order: list[int] = []

        async def main() -> None:
            tasks = [asyncio.ensure_future(nothing()) for _ in range(200)]
            futures = [asyncio.get_running_loop().create_future() for _ in range(200)]
            place = {id(item): number for number, item in enumerate([*tasks, *futures])}
            order.extend(place[id(item)] for item in {*futures, *tasks})
            await asyncio.wait(tasks)

        make_loop().run_until_complete(main())
        return order

    assert run() == run()


def test_deadlock_names_the_tasks_that_wait(make_loop: MakeLoop) -> None:
    loop = make_loop()

    async def main() -> None:
        await asyncio.gather(asyncio.create_task(asyncio.Event().wait(), name="the-waiter"))

    with pytest.raises(Deadlock, match=r"the-waiter at .*locks"):
        loop.run_until_complete(main())


def test_livelock_is_an_error(make_loop: MakeLoop) -> None:
    loop = make_loop()

    async def main() -> None:
        while True:  # noqa: ASYNC110 - the endless loop is the point
            await asyncio.sleep(0)

    with pytest.raises(Livelock, match="without progress"):
        loop.run_until_complete(main())


def test_steps_take_time_so_that_the_smallest_rest_passes(make_loop: MakeLoop) -> None:
    """A loop that waits for the rest of an interval, by a clock that differs from the timer's."""
    loop = make_loop(start=1_000.0, step_s=1e-6)
    clock = VirtualClock(loop, rate=0.99)

    async def main() -> None:
        due = clock.monotonic() + 2.0
        while (rest := due - clock.monotonic()) > 0:  # noqa: ASYNC110 - the point of the test
            await asyncio.sleep(rest)
        assert 2.0 <= clock.monotonic() < 2.001

    loop.run_until_complete(main())
    assert loop.steps < 100


def test_timers_that_come_due_while_work_goes_on_are_not_held_back(make_loop: MakeLoop) -> None:
    loop = make_loop(step_s=1e-3)
    fired: list[float] = []

    async def main() -> None:
        loop.call_later(0.01, lambda: fired.append(loop.time()))
        for _ in range(100):
            await asyncio.sleep(0)
        assert fired
        assert fired[0] < 1_000.0 + 0.015

    loop.run_until_complete(main())


@pytest.mark.parametrize("limit", [{"steps_max": 100}, {"seconds_max": 100.0}])
def test_a_run_ends_at_its_limit(make_loop: MakeLoop, limit: dict[str, Any]) -> None:
    loop = make_loop(**limit)

    async def main() -> None:
        while True:  # noqa: ASYNC110 - the endless loop is the point
            await asyncio.sleep(1.0)

    with pytest.raises(LimitReached):
        loop.run_until_complete(main())


def test_fail_ends_the_run_from_any_callback(make_loop: MakeLoop) -> None:
    loop = make_loop()

    async def main() -> None:
        loop.call_later(1.0, loop.fail, LookupError("found it"))
        await asyncio.sleep(1e9)

    with pytest.raises(LookupError, match="found it"):
        loop.run_until_complete(main())


def test_threads_are_refused_unless_the_executor_is_inline(make_loop: MakeLoop) -> None:
    async def threaded() -> int:
        return await asyncio.get_running_loop().run_in_executor(None, len, "four")

    async def from_thread() -> None:
        asyncio.get_running_loop().call_soon_threadsafe(print)

    with pytest.raises(NotSimulated):
        make_loop().run_until_complete(threaded())
    with pytest.raises(NotSimulated):
        make_loop().run_until_complete(from_thread())
    assert make_loop(inline_executor=True).run_until_complete(threaded()) == 4


def test_an_inline_executor_hands_over_the_error(make_loop: MakeLoop) -> None:
    async def main() -> None:
        with pytest.raises(ZeroDivisionError):
            await asyncio.get_running_loop().run_in_executor(None, divmod, 1, 0)

    make_loop(inline_executor=True).run_until_complete(main())


def test_a_failed_task_that_nobody_awaited_is_found(make_loop: MakeLoop) -> None:
    loop = make_loop()

    async def fails() -> None:
        raise LookupError("nobody looks")

    async def main() -> None:
        task = asyncio.create_task(fails(), name="lost")
        await asyncio.sleep(1.0)
        assert task.done()

    loop.run_until_complete(main())
    assert [task.get_name() for task in loop.unnoticed_failures()] == ["lost"]


def test_closing_unwinds_what_never_finished_even_if_it_awaits_again(make_loop: MakeLoop) -> None:
    loop = make_loop()
    unwound: list[str] = []

    async def stubborn() -> None:
        try:
            await asyncio.sleep(1e9)
        finally:
            try:
                await asyncio.sleep(1.0)
            finally:
                unwound.append("stubborn")

    async def main() -> Coroutine[Any, Any, None] | None:
        asyncio.create_task(stubborn())  # noqa: RUF006 - the loop keeps it
        await asyncio.sleep(1.0)
        return None

    loop.run_until_complete(main())
    loop.close()
    assert unwound == ["stubborn"]


def test_a_hosts_clocks_drift_and_its_wall_clock_jumps_while_monotonic_does_not(
    make_loop: MakeLoop,
) -> None:
    loop = make_loop(start=50.0)
    clock = VirtualClock(loop, monotonic_start=7.0, rate=2.0, skew_s=-3.0)

    async def main() -> None:
        await clock.sleep(100.0)
        assert loop.time() == 100.0
        assert clock.monotonic() == 107.0
        assert clock.wall() == WALL_START + 100.0 - 3.0
        clock.jump(-86_400.0)
        assert clock.wall() == WALL_START + 97.0 - 86_400.0
        assert clock.monotonic() == 107.0

    loop.run_until_complete(main())
