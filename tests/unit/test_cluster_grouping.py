"""Calls that come together run together, are answered one by one, and leave nothing running."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest

from chaos.sim.loop import SimLoop
from cluster.grouping import GroupCall, Grouping
from protocol.errors import Overloaded

Call = GroupCall[int, int]
LATE_S = 0.5


class Recorder:
    """Doubles numbers after as many seconds as the slowest of a group asks for."""

    def __init__(self, *, items_max: int = 100, calls_max: int = 100, lanes: int = 2) -> None:
        self.groups: list[list[int]] = []
        self.cancelled: list[list[int]] = []
        self.seconds: dict[int, float] = {}
        self.error: Exception | None = None
        self.grouping = Grouping[int, int](
            self.run, items_max=items_max, calls_max=calls_max, lanes=lanes, late_s=LATE_S
        )

    async def run(self, calls: Sequence[Call]) -> None:
        items = [call.item for call in calls]
        self.groups.append(sorted(items))
        try:
            for call in sorted(calls, key=lambda call: self.seconds.get(call.item, 0.1)):
                await asyncio.sleep(self.seconds.get(call.item, 0.1) / len(calls))
                if self.error is not None:
                    error, self.error = self.error, None
                    raise error
                call.settle(2 * call.item)
        except asyncio.CancelledError:
            self.cancelled.append(sorted(items))
            raise

    def start(self, *items: int) -> list[asyncio.Task[int]]:
        return [asyncio.ensure_future(self.grouping.submit(item)) for item in items]


def simulate(main: Callable[[], Awaitable[None]]) -> None:
    """Run under virtual time; fails if a task is left or failed unnoticed."""
    loop = SimLoop()

    async def whole() -> None:
        before = asyncio.all_tasks()
        await main()
        assert asyncio.all_tasks() == before

    try:
        loop.run_until_complete(whole())
        assert loop.unnoticed_failures() == []
    finally:
        loop.close()


def test_calls_of_one_turn_share_a_group_and_a_lone_call_starts_at_once() -> None:
    async def main() -> None:
        recorder = Recorder()
        assert await asyncio.gather(*recorder.start(1, 2, 3)) == [2, 4, 6]
        started = asyncio.get_running_loop().time()
        assert await recorder.grouping.submit(4) == 8
        assert asyncio.get_running_loop().time() - started == pytest.approx(0.1)
        assert recorder.groups == [[1, 2, 3], [4]]

    simulate(main)


def test_with_all_lanes_busy_what_waits_goes_together() -> None:
    async def main() -> None:
        recorder = Recorder(lanes=2)
        tasks = []
        for number in range(6):
            tasks += recorder.start(number)
            await asyncio.sleep(0.01)
        assert recorder.groups == [[0], [1]]
        assert await asyncio.gather(*tasks) == [2 * number for number in range(6)]
        assert recorder.groups == [[0], [1], [2, 3, 4, 5]]

    simulate(main)


def test_a_group_holds_no_more_than_its_limit_and_the_oldest_go_first() -> None:
    async def main() -> None:
        recorder = Recorder(items_max=3, lanes=1)
        await asyncio.gather(*recorder.start(*range(8)))
        assert recorder.groups == [[0, 1, 2], [3, 4, 5], [6, 7]]

    simulate(main)


def test_groups_that_are_late_do_not_hold_up_the_others() -> None:
    async def main() -> None:
        recorder = Recorder(lanes=2)
        recorder.seconds = {1: 60.0, 2: 60.0}
        slow = recorder.start(1)
        await asyncio.sleep(0.01)
        slow += recorder.start(2)
        await asyncio.sleep(0.01)
        started = asyncio.get_running_loop().time()
        for number in (3, 4, 5):
            assert await recorder.grouping.submit(number) == 2 * number
        assert asyncio.get_running_loop().time() - started <= LATE_S + 3 * 0.1
        assert not any(task.done() for task in slow)
        assert await asyncio.gather(*slow) == [2, 4]

    simulate(main)


def test_a_lane_given_back_late_is_given_back_once() -> None:
    async def main() -> None:
        recorder = Recorder(lanes=1)
        recorder.seconds = {1: 2 * LATE_S, 2: 2 * LATE_S}
        assert await asyncio.gather(*recorder.start(1)) == [2]
        await asyncio.gather(*recorder.start(2))
        tasks = recorder.start(3)
        await asyncio.sleep(0.01)
        tasks += recorder.start(4)
        await asyncio.sleep(0.01)
        assert recorder.groups == [[1], [2], [3]], "one lane, one group at a time"
        await asyncio.gather(*tasks)

    simulate(main)


def test_a_call_is_answered_before_the_slowest_of_its_group() -> None:
    async def main() -> None:
        recorder = Recorder()
        recorder.seconds = {1: 0.1, 2: 30.0}
        quick, slow = recorder.start(1, 2)
        assert await quick == 2
        assert not slow.done()
        assert await slow == 4

    simulate(main)


def test_an_error_goes_to_the_calls_of_its_group_that_have_no_answer() -> None:
    async def main() -> None:
        recorder = Recorder()
        recorder.seconds = {1: 0.1, 2: 1.0, 3: 1.0}
        first, *others = recorder.start(1, 2, 3)
        assert await first == 2
        recorder.error = KeyError("late")
        for result in await asyncio.gather(*others, return_exceptions=True):
            assert isinstance(result, KeyError)
        assert await recorder.grouping.submit(4) == 8

    simulate(main)


def test_a_caller_that_leaves_does_not_take_the_others_along() -> None:
    async def main() -> None:
        recorder = Recorder()
        first, second = recorder.start(1, 2)
        await asyncio.sleep(0.05)
        first.cancel()
        assert await second == 4
        assert first.cancelled()
        assert recorder.cancelled == []

    simulate(main)


@pytest.mark.parametrize("at_once", [True, False])
def test_a_group_that_nobody_waits_for_is_cancelled_and_frees_its_lane(at_once: bool) -> None:
    async def main() -> None:
        recorder = Recorder(lanes=1)
        recorder.seconds = {1: 60.0, 2: 60.0}
        started = asyncio.get_running_loop().time()
        tasks = recorder.start(1, 2)
        await asyncio.sleep(0.05)
        for task in tasks:
            task.cancel()
            if not at_once:
                await asyncio.wait((task,))
        await asyncio.wait(tasks)
        assert recorder.cancelled == [[1, 2]]
        assert await recorder.grouping.submit(3) == 6
        assert asyncio.get_running_loop().time() - started < 1.0

    simulate(main)


def test_a_caller_that_leaves_while_it_waits_is_not_run() -> None:
    async def main() -> None:
        recorder = Recorder(lanes=1)
        tasks = recorder.start(1)
        await asyncio.sleep(0.01)
        tasks += recorder.start(2, 3)
        await asyncio.sleep(0.01)
        tasks[1].cancel()
        await asyncio.wait(tasks)
        assert recorder.groups == [[1], [3]]

    simulate(main)


def test_callers_that_all_leave_before_the_start_leave_the_lane_free() -> None:
    async def main() -> None:
        recorder = Recorder(lanes=1)

        async def leave() -> None:
            task = asyncio.ensure_future(recorder.grouping.submit(1))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait((task,))

        await leave()
        assert await recorder.grouping.submit(2) == 4
        assert [2] in recorder.groups

    simulate(main)


def test_more_calls_than_the_bound_are_told_to_come_back() -> None:
    async def main() -> None:
        recorder = Recorder(items_max=2, calls_max=4, lanes=1)
        tasks = recorder.start(1, 2, 3, 4)
        await asyncio.sleep(0.01)
        with pytest.raises(Overloaded):
            await recorder.grouping.submit(5)
        assert await asyncio.gather(*tasks) == [2, 4, 6, 8]
        assert await recorder.grouping.submit(5) == 10

    simulate(main)
