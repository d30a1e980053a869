"""Puts through restarts, races, full queues and lost commits: done once, or not claimed at all."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from block_cell import OWNER, RS, BlockCell, data_of, simulate

from protocol.errors import (
    DatabaseBusy,
    HaversackError,
    NotEnoughNodes,
    Overloaded,
    UnknownOutcome,
)
from protocol.hashing import hash_block


def test_a_node_that_began_a_new_life_is_written_to_as_that_life() -> None:
    async def main(cell: BlockCell) -> None:
        await cell.put(data_of(16))
        await cell.start_node(cell.node_ids[0])
        data = data_of(17)
        result = await cell.put(data)
        assert not result.degraded
        assert await cell.slots_held(data) == list(range(9))

    simulate(main)


def test_a_restart_between_acknowledgement_and_record_fences_the_put_and_it_is_done_again() -> None:
    async def main(cell: BlockCell) -> None:
        record_puts = cell.client._index.record_puts
        entries = []

        async def restart_first(batch: Any) -> Any:
            if not entries:
                await cell.start_node(cell.node_ids[3])
            entries.extend(batch)
            return await record_puts(batch)

        cell.client._index.record_puts = restart_first  # type: ignore[method-assign]
        data = data_of(18)
        result = await cell.put(data)
        assert result.new
        assert not result.degraded
        assert len(entries) == 2
        assert await cell.slots_held(data) == list(range(9))

    simulate(main)


def test_a_node_fenced_for_ever_ends_in_an_error_not_in_an_endless_loop() -> None:
    async def main(cell: BlockCell) -> None:
        await cell.nodes[cell.node_ids[0]].lease(1_000, 1e6)  # a life the map does not know
        started = cell.clock.monotonic()
        with pytest.raises(NotEnoughNodes):
            await cell.put(data_of(19))
        assert cell.clock.monotonic() - started < cell.settings.put_s
        assert await cell.row_of(data_of(19)) is None

    simulate(main)


def test_an_acknowledgement_by_another_life_is_none() -> None:
    async def main(cell: BlockCell) -> None:
        liar = cell.faults[cell.node_ids[2]]
        liar.answers_as = 99
        task = asyncio.ensure_future(cell.put(data_of(26)))
        await asyncio.sleep(0.01)
        assert not task.done()
        liar.answers_as = None
        assert not (await task).degraded

    simulate(main)


def test_a_volume_that_is_removed_during_a_put_is_not_tried_again() -> None:
    async def main(cell: BlockCell) -> None:
        first = cell.open_volume(RS)
        record_puts = cell.client._index.record_puts
        opened = []

        async def remove_first(batch: Any) -> Any:
            if not opened:
                cell.seal_volume(first)
                opened.append(cell.open_volume(RS))
            return await record_puts(batch)

        cell.client._index.record_puts = remove_first  # type: ignore[method-assign]
        assert (await cell.put(data_of(27))).new
        assert (await cell.row_of(data_of(27))).volume == opened[0]
        assert len(cell.calls) == 2 * RS.n

    simulate(main, volumes=0)


def test_an_old_epoch_is_refused_by_nodes_and_the_put_follows_the_map() -> None:
    async def main(cell: BlockCell) -> None:
        await cell.put(data_of(20))
        volume = (await cell.row_of(data_of(20))).volume
        cell.raise_epoch(volume)
        other_pool, other = cell.new_client(99)
        await other.put(OWNER, hash_block(data_of(22)), (data_of(22),), len(data_of(22)))
        await other_pool.aclose()  # it read the new map, and now all nodes know the new epoch
        data = data_of(21)
        result = await cell.put(data)
        assert not result.degraded
        assert await cell.slots_held(data) == list(range(9))

    simulate(main, volumes=1)


def test_a_busy_node_is_waited_for_and_not_owed() -> None:
    async def main(cell: BlockCell) -> None:
        busy = cell.faults[cell.node_ids[1]]
        busy.put_refuses = Overloaded("queue is full")
        data = data_of(22)
        task = asyncio.ensure_future(cell.put(data))
        await asyncio.sleep(0.01)
        busy.put_refuses = None
        result = await task
        assert not result.degraded
        assert await cell.index.debts() == 0

    simulate(main)


def test_a_busy_node_is_not_owed_even_when_another_is_dead() -> None:
    async def main(cell: BlockCell) -> None:
        cell.kill(cell.node_ids[0])
        busy = cell.faults[cell.node_ids[1]]
        busy.put_refuses = Overloaded("queue is full")
        data = data_of(22)
        task = asyncio.ensure_future(cell.put(data))
        await asyncio.sleep(0.01)
        busy.put_refuses = None
        assert (await task).degraded
        assert await cell.index.debts() == 1

    simulate(main)


def test_a_node_that_stays_busy_is_reported_as_overload() -> None:
    async def main(cell: BlockCell) -> None:
        cell.faults[cell.node_ids[1]].put_refuses = Overloaded("queue is full")
        with pytest.raises(Overloaded):
            await cell.put(data_of(23))
        assert await cell.row_of(data_of(23)) is None

    simulate(main)


@pytest.mark.parametrize(
    "error", [UnknownOutcome("connection lost in COMMIT"), DatabaseBusy("locked")]
)
def test_a_commit_that_failed_is_never_reported_as_success(error: HaversackError) -> None:
    async def main(cell: BlockCell) -> None:
        async def fail(_batch: Any) -> Any:
            raise error

        cell.client._index.record_puts = fail  # type: ignore[method-assign]
        with pytest.raises(type(error)):
            await cell.put(data_of(24))
        results = await cell.client.put_many(
            OWNER, [(hash_block(data_of(n)), data_of(n)) for n in range(3)]
        )
        assert [type(result) for result in results] == [type(error)] * 3

    simulate(main)


def test_a_mistake_of_ours_in_one_slot_is_raised_and_leaves_nothing_behind() -> None:
    async def main(cell: BlockCell) -> None:
        cell.faults[cell.node_ids[3]].refuses = ZeroDivisionError("a mistake")
        with pytest.raises(ZeroDivisionError):
            await cell.put(data_of(29))
        cell.heal()
        assert (await cell.put(data_of(29))).new

    simulate(main)


@pytest.mark.parametrize("after_s", [0.0, 0.05, 0.15, 0.25, 0.5, 1.0])
def test_a_cancelled_put_leaves_no_task_and_no_flight(after_s: float) -> None:
    async def main(cell: BlockCell) -> None:
        for number, node_id in enumerate(cell.node_ids):
            cell.faults[node_id].delay_s = lambda number=number: 0.1 + number * 0.05  # type: ignore[misc]
        data = data_of(25)
        task = asyncio.ensure_future(cell.put(data))
        await asyncio.sleep(after_s)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        result = await cell.put(data)
        assert result.new != (after_s >= 1.0)
        assert await cell.get(data) == data

    simulate(main)


def test_puts_beyond_the_memory_budget_wait_their_turn_or_are_refused() -> None:
    async def main(cell: BlockCell) -> None:
        for faults in cell.faults.values():
            faults.delay_s = lambda: 1.0
        blocks = [data_of(number) for number in range(8)]
        results = await asyncio.gather(
            *(cell.put(block) for block in blocks), return_exceptions=True
        )
        refused = [result for result in results if isinstance(result, Overloaded)]
        assert 0 < len(refused) < 8
        for block, result in zip(blocks, results, strict=True):
            assert (await cell.row_of(block) is None) == isinstance(result, Overloaded)

    simulate(main, put_bytes_max=800_000, queue_s=2.5)
