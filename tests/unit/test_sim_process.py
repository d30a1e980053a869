"""Simulated processes: killed ones never run again, paused ones catch up."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from chaos.sim.loop import SimLoop
from chaos.sim.process import ProcessDied, ProcessState, SimProcess, current_process


@pytest.fixture
def loop() -> Iterator[SimLoop]:
    loop = SimLoop(start=0.0)
    yield loop
    loop.close()


def test_a_killed_process_runs_no_clean_up(loop: SimLoop) -> None:
    process = SimProcess(loop, "victim")
    seen: list[str] = []

    async def work() -> None:
        try:
            await asyncio.sleep(10)
            seen.append("woke")
        finally:
            seen.append("cleaned up")

    async def main() -> None:
        process.spawn(work(), "work")
        await asyncio.sleep(1)
        process.kill()
        await asyncio.sleep(100)
        assert seen == []

    loop.run_until_complete(main())


def test_tasks_of_tasks_and_timers_belong_to_the_process(loop: SimLoop) -> None:
    process = SimProcess(loop, "parent")
    seen: list[object] = []

    async def child() -> None:
        seen.append(current_process())
        asyncio.get_running_loop().call_later(5, seen.append, "timer")
        await asyncio.sleep(5)
        seen.append("child")

    async def parent() -> None:
        await asyncio.gather(child(), child())

    async def main() -> None:
        process.spawn(parent(), "parent")
        await asyncio.sleep(1)
        assert seen == [process, process]
        process.kill()
        await asyncio.sleep(10)
        assert len(seen) == 2
        assert current_process() is None

    loop.run_until_complete(main())


def test_a_paused_process_does_nothing_and_then_catches_up_in_order(loop: SimLoop) -> None:
    process = SimProcess(loop, "sleeper")
    seen: list[tuple[int, float]] = []

    async def tick() -> None:
        for number in range(4):
            await asyncio.sleep(1)
            seen.append((number, loop.time()))

    async def main() -> None:
        process.spawn(tick(), "tick")
        await asyncio.sleep(1.5)
        process.pause()
        assert process.state is ProcessState.PAUSED
        await asyncio.sleep(60)
        assert seen == [(0, 1.0)]
        process.resume()
        await asyncio.sleep(10)
        assert seen == [(0, 1.0), (1, 61.5), (2, 62.5), (3, 63.5)]

    loop.run_until_complete(main())


def test_a_process_killed_while_paused_stays_dead(loop: SimLoop) -> None:
    process = SimProcess(loop, "sleeper")
    seen: list[str] = []

    async def work() -> None:
        await asyncio.sleep(1)
        seen.append("ran")

    async def main() -> None:
        process.spawn(work(), "work")
        await asyncio.sleep(0.5)
        process.pause()
        await asyncio.sleep(5)
        process.kill()
        process.resume()
        await asyncio.sleep(5)
        assert seen == []

    loop.run_until_complete(main())


def test_who_asks_a_process_learns_of_its_death_at_once(loop: SimLoop) -> None:
    process = SimProcess(loop, "server")

    async def serve() -> str:
        await asyncio.sleep(10)
        return "done"

    async def main() -> None:
        assert await process.ask(serve(), "serve") == "done"
        asyncio.get_running_loop().call_later(3, process.kill)
        with pytest.raises(ProcessDied):
            await process.ask(serve(), "serve")
        assert loop.time() == 13.0
        with pytest.raises(ProcessDied):
            await process.ask(serve(), "serve")

    loop.run_until_complete(main())


def test_an_error_inside_a_process_reaches_who_asked(loop: SimLoop) -> None:
    process = SimProcess(loop, "server")

    async def serve() -> None:
        raise LookupError("inside")

    async def main() -> None:
        with pytest.raises(LookupError, match="inside"):
            await process.ask(serve(), "serve")

    loop.run_until_complete(main())


@pytest.mark.parametrize("steps", range(8))
def test_a_fuse_stops_a_process_at_every_await(loop: SimLoop, steps: int) -> None:
    process = SimProcess(loop, "victim")
    seen: list[int] = []

    async def work() -> None:
        for number in range(20):
            seen.append(number)
            await asyncio.sleep(0)

    async def main() -> None:
        process.light_fuse(steps, process.kill)
        process.spawn(work(), "work")
        await asyncio.sleep(1)
        assert seen == list(range(steps))
        assert not process.alive

    loop.run_until_complete(main())
