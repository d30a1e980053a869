"""The byte budget and the row cache of the block client: bounded, fair, and given back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import cast

import pytest

from chaos.sim.loop import SimLoop
from cluster.block_index import BlockIndex, BlockRow
from cluster.block_rows import BlockRows
from cluster.byte_budget import ByteBudget
from protocol.errors import Overloaded
from protocol.hashing import hash_block
from protocol.ids import BlockHash, VolumeId

Main = Callable[[], Awaitable[None]]


@pytest.fixture
def simulate() -> Iterator[Callable[[Main], None]]:
    loop = SimLoop()
    yield lambda main: loop.run_until_complete(main())
    loop.close()


def test_holders_never_exceed_the_capacity(simulate: Callable[[Main], None]) -> None:
    async def main() -> None:
        budget = ByteBudget("puts", 100, wait_s=1_000)
        held, peak = 0, 0

        async def worker(wanted: int) -> None:
            nonlocal held, peak
            async with budget.hold(wanted):
                held += wanted
                peak = max(peak, held)
                await asyncio.sleep(1)
                held -= wanted

        await asyncio.gather(*(worker(1 + number % 60) for number in range(200)))
        assert 60 < peak <= 100
        assert budget.free == 100

    simulate(main)


def test_turns_come_in_order_so_a_large_request_is_not_starved(
    simulate: Callable[[Main], None],
) -> None:
    async def main() -> None:
        budget = ByteBudget("puts", 10, wait_s=1_000)
        order: list[int] = []

        async def worker(number: int, wanted: int) -> None:
            async with budget.hold(wanted):
                order.append(number)
                await asyncio.sleep(1)

        await asyncio.gather(*(worker(n, 10 if n == 3 else 2) for n in range(30)))
        assert order == list(range(30))

    simulate(main)


def test_a_request_larger_than_everything_runs_alone(simulate: Callable[[Main], None]) -> None:
    async def main() -> None:
        budget = ByteBudget("puts", 10, wait_s=5)
        async with budget.hold(1_000):
            assert budget.free == 0
        assert budget.free == 10

    simulate(main)


def test_a_turn_that_does_not_come_is_overload_and_leaks_nothing(
    simulate: Callable[[Main], None],
) -> None:
    async def main() -> None:
        budget = ByteBudget("gets", 10, wait_s=5)
        async with budget.hold(8):
            with pytest.raises(Overloaded, match="gets in flight"):
                async with budget.hold(5):
                    raise AssertionError("must not run")
            async with budget.hold(2):
                pass
        assert budget.free == 10

    simulate(main)


def test_cancelled_waiters_leak_nothing_whenever_they_are_cancelled(
    simulate: Callable[[Main], None],
) -> None:
    async def main() -> None:
        budget = ByteBudget("puts", 4, wait_s=1_000)

        async def worker() -> None:
            async with budget.hold(3):
                await asyncio.sleep(1)

        for cancel_after in range(12):
            tasks = [asyncio.ensure_future(worker()) for _ in range(6)]
            await asyncio.sleep(0.5 * cancel_after)
            for task in tasks[::2]:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert budget.free == 4

    simulate(main)


def test_a_waiter_cancelled_in_the_instant_of_its_turn_passes_it_on(
    simulate: Callable[[Main], None],
) -> None:
    async def main() -> None:
        budget = ByteBudget("puts", 1, wait_s=1_000)
        entered = asyncio.Event()

        async def waiter() -> None:
            async with budget.hold(1):
                entered.set()

        async with budget.hold(1):
            first = asyncio.ensure_future(waiter())
            second = asyncio.ensure_future(waiter())
            await asyncio.sleep(0)
        first.cancel()  # its turn has just been granted, and it has not run since
        await asyncio.gather(first, second, return_exceptions=True)
        assert first.cancelled()
        assert entered.is_set()
        assert budget.free == 1

    simulate(main)


class CountingIndex:
    """An index that holds what it is told and counts how often it is asked for each."""

    def __init__(self, rows: Sequence[BlockRow]) -> None:
        self.rows = {row.hash: row for row in rows}
        self.asked: list[BlockHash] = []

    async def lookup(self, hashes: Sequence[BlockHash]) -> dict[BlockHash, BlockRow]:
        self.asked.extend(hashes)
        return {block: self.rows[block] for block in hashes if block in self.rows}


def make_rows(count: int) -> list[BlockRow]:
    return [
        BlockRow(hash_block(str(number).encode()), VolumeId(1), 100, 50) for number in range(count)
    ]


def test_a_row_is_looked_up_once_and_absence_every_time(simulate: Callable[[Main], None]) -> None:
    async def main() -> None:
        rows = make_rows(3)
        index = CountingIndex(rows[:2])
        cache = BlockRows(cast(BlockIndex, index), rows_max=10)
        hashes = [row.hash for row in rows]
        for _ in range(3):
            assert await cache.find(hashes) == {row.hash: row for row in rows[:2]}
        assert index.asked == [*hashes, hashes[2], hashes[2]]
        cache.forget(hashes[0])
        await cache.find(hashes[:1])
        assert index.asked[-1] == hashes[0]

    simulate(main)


def test_the_cache_keeps_the_rows_used_last_and_no_more_than_its_bound(
    simulate: Callable[[Main], None],
) -> None:
    async def main() -> None:
        rows = make_rows(6)
        index = CountingIndex(rows)
        cache = BlockRows(cast(BlockIndex, index), rows_max=3)
        await cache.find([row.hash for row in rows[:3]])
        await cache.find([rows[0].hash])
        await cache.find([rows[3].hash])
        index.asked.clear()
        await cache.find([rows[0].hash, rows[2].hash, rows[3].hash])
        assert index.asked == []
        await cache.find([rows[1].hash])
        assert index.asked == [rows[1].hash]

    simulate(main)
