"""Gets: the exact bytes from any k slots, soon, whoever is gone or slow; or a reasoned error."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest
from block_cell import REPLICA, RS, BlockCell, data_of, simulate

from cluster.node_pool import HEDGE_COLD_S, Direction
from cluster.topology import NodeState
from protocol.errors import (
    BlockNotFound,
    BlockUnreadable,
    DatabaseBusy,
    Overloaded,
)
from protocol.hashing import hash_block


def test_a_healthy_get_asks_the_data_slots_and_nobody_else() -> None:
    async def main(cell: BlockCell) -> None:
        data = data_of(1)
        await cell.put(data)
        slots = await cell.slots_of(data)
        cell.calls.clear()
        assert await cell.get(data) == data
        assert sorted(cell.calls) == sorted(f"get {node}" for node in slots[:6])

    simulate(main)


def test_a_block_that_does_not_exist_is_not_found() -> None:
    async def main(cell: BlockCell) -> None:
        with pytest.raises(BlockNotFound):
            await cell.get(b"never stored")
        assert cell.calls == []

    simulate(main)


def test_reads_of_replicas_spread_over_all_copies() -> None:
    async def main(cell: BlockCell) -> None:
        data = data_of(2, 1_000)
        await cell.put(data)
        cell.calls.clear()
        for _ in range(400):
            assert await cell.get(data) == data
        counts = Counter(cell.calls)
        assert len(counts) == REPLICA.n
        assert min(counts.values()) > 60

    simulate(main)


def test_the_index_is_asked_once_for_a_block_that_is_read_often() -> None:
    async def main(cell: BlockCell) -> None:
        await cell.put(data_of(3))
        pool, client = cell.new_client(5)
        asked: list[Any] = []
        lookup = client._index.lookup

        async def counting(hashes: Any) -> Any:
            asked.extend(hashes)
            return await lookup(hashes)

        client._index.lookup = counting  # type: ignore[method-assign]
        for _ in range(5):
            assert await client.get(hash_block(data_of(3))) == data_of(3)
        assert asked == [hash_block(data_of(3))]
        await pool.aclose()

    simulate(main)


@pytest.mark.parametrize("size", [1_000, 200_000])
def test_one_node_too_many_is_unreadable_with_a_reason_for_each_slot(size: int) -> None:
    async def main(cell: BlockCell) -> None:
        data = data_of(4, size)
        await cell.put(data)
        slots = await cell.slots_of(data)
        scheme = RS if len(slots) == 9 else REPLICA
        cell.kill(*slots[: scheme.m + 1])
        with pytest.raises(BlockUnreadable) as caught:
            await cell.get(data)
        details = caught.value.details
        assert details["needed"] == scheme.k
        assert details["good"] == scheme.k - 1
        assert [item["slot"] for item in details["slots"]] == list(range(scheme.m + 1))
        assert {item["kind"] for item in details["slots"]} == {"node_unavailable"}
        cell.heal()
        assert await cell.get(data) == data, "suspected nodes are tried last, not never"

    simulate(main)


def test_a_read_waits_a_moment_for_nodes_that_are_coming_back() -> None:
    async def main(cell: BlockCell) -> None:
        data = data_of(5)
        await cell.put(data)
        cell.kill(*(await cell.slots_of(data))[:4])
        task = asyncio.ensure_future(cell.get(data))
        await asyncio.sleep(0.02)
        cell.heal()
        assert await task == data

    simulate(main)


def test_nodes_that_all_restarted_elsewhere_are_found_through_the_map() -> None:
    async def main(cell: BlockCell) -> None:
        data = data_of(6)
        await cell.put(data)
        await cell.get(data)
        for node_id in cell.node_ids:
            await cell.start_node(node_id)
        assert await timed(cell, data) == 0.0, "the map is asked at once, without a pause"

    simulate(main)


def test_nodes_that_the_map_calls_down_are_not_asked_while_others_suffice() -> None:
    async def main(cell: BlockCell) -> None:
        data = data_of(7)
        await cell.put(data)
        down = (await cell.slots_of(data))[0]
        cell.set_state(down, NodeState.DOWN)
        await asyncio.sleep(2 * cell.settings.map_age_s)
        cell.calls.clear()
        assert await cell.get(data) == data
        assert f"get {down}" not in cell.calls

    simulate(main)


def test_a_get_goes_on_while_the_database_is_away() -> None:
    async def main(cell: BlockCell) -> None:
        data = data_of(8)
        await cell.put(data)
        await cell.get(data)
        await asyncio.sleep(10)

        async def busy(*_: Any) -> Any:
            raise DatabaseBusy("locked")

        cell.db.read = busy  # type: ignore[method-assign]
        cell.kill(cell.node_ids[1])
        assert await cell.get(data) == data

    simulate(main)


def test_a_volume_that_moved_is_followed() -> None:
    async def main(cell: BlockCell) -> None:
        data = data_of(9)
        cell.open_volume(RS, cell.node_ids[:9])
        await cell.put(data)
        assert await cell.get(data) == data
        await cell.move_slots(hash_block(data), dict(zip((0, 3), cell.node_ids[9:], strict=False)))
        assert await cell.get(data) == data
        await cell.move_slots(hash_block(data), dict(enumerate(cell.node_ids[11:], start=4)))
        assert await cell.get(data) == data
        assert cell.problems == [], "our map was old; nothing is wrong with the fragments"

    simulate(main, nodes=16, volumes=0)


def test_a_block_that_left_the_index_is_not_found_although_its_row_was_cached() -> None:
    async def main(cell: BlockCell) -> None:
        data = data_of(10)
        await cell.put(data)
        assert await cell.get(data) == data
        cell.remove_block(hash_block(data))
        with pytest.raises(BlockNotFound):
            await cell.get(data)

    simulate(main)


async def timed(cell: BlockCell, data: bytes) -> float:
    started = cell.clock.monotonic()
    assert await cell.get(data) == data
    return cell.clock.monotonic() - started


def test_a_slow_slot_is_hedged_at_the_p95_of_its_node() -> None:
    async def main(cell: BlockCell) -> None:
        data = data_of(18)
        await cell.put(data)
        for faults in cell.faults.values():
            faults.delay_s = lambda: cell.rng.uniform(0.02, 0.03)
        for _ in range(100):
            await cell.get(data)
        slow = (await cell.slots_of(data))[3]
        cell.faults[slow].delay_s = lambda: 3.0
        cell.calls.clear()
        assert await timed(cell, data) < 0.08
        assert len(cell.calls) <= 8

    simulate(main)


def test_a_cold_client_hedges_too() -> None:
    async def main(cell: BlockCell) -> None:
        data = data_of(19)
        await cell.put(data)
        cell.faults[(await cell.slots_of(data))[0]].is_stopped = True
        assert await timed(cell, data) < 2 * HEDGE_COLD_S

    simulate(main)


def test_as_many_slow_slots_as_there_is_parity_are_hedged() -> None:
    async def main(cell: BlockCell) -> None:
        data = data_of(20)
        await cell.put(data)
        for node_id in (await cell.slots_of(data))[:3]:
            cell.faults[node_id].delay_s = lambda: 4.0
        assert await timed(cell, data) < 2 * HEDGE_COLD_S

    simulate(main)


def test_a_stopped_node_is_left_alone_after_a_few_hedges() -> None:
    async def main(cell: BlockCell) -> None:
        data = data_of(21)
        await cell.put(data)
        stopped = (await cell.slots_of(data))[2]
        cell.faults[stopped].is_stopped = True
        for _ in range(10):
            await cell.get(data)
            await asyncio.sleep(0.2)
        assert cell.pool.is_suspected(stopped, Direction.READ)
        cell.calls.clear()
        for _ in range(20):
            assert await timed(cell, data) < 0.01
        assert f"get {stopped}" not in cell.calls

    simulate(main)


def test_slow_everywhere_is_no_reason_to_give_up() -> None:
    async def main(cell: BlockCell) -> None:
        data = data_of(22)
        await cell.put(data)
        for faults in cell.faults.values():
            faults.delay_s = lambda: 2.0
        assert await timed(cell, data) < 3.0

    simulate(main)


def test_all_stopped_ends_at_the_deadline() -> None:
    async def main(cell: BlockCell) -> None:
        data = data_of(23)
        await cell.put(data)
        for faults in cell.faults.values():
            faults.is_stopped = True
        started = cell.clock.monotonic()
        with pytest.raises(BlockUnreadable):
            await cell.get(data)
        assert cell.clock.monotonic() - started <= cell.settings.get_s + 0.1

    simulate(main)


def test_a_mistake_of_ours_in_one_slot_is_raised_and_leaves_nothing_behind() -> None:
    async def main(cell: BlockCell) -> None:
        data = data_of(27)
        await cell.put(data)
        cell.faults[(await cell.slots_of(data))[3]].refuses = ZeroDivisionError("a mistake")
        with pytest.raises(ZeroDivisionError):
            await cell.get(data)
        with pytest.raises(ZeroDivisionError):
            await cell.client.get_many([hash_block(data)])

    simulate(main)


@pytest.mark.parametrize("after_s", [0.0, 0.01, 0.2, 0.3, 0.6])
def test_a_cancelled_get_leaves_nothing_running(after_s: float) -> None:
    async def main(cell: BlockCell) -> None:
        data = data_of(24)
        await cell.put(data)
        for faults in cell.faults.values():
            faults.delay_s = lambda: cell.rng.uniform(0.1, 1.0)
        task = asyncio.ensure_future(cell.get(data))
        await asyncio.sleep(after_s)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert cell.client._get_budget.free == cell.settings.get_bytes_max

    simulate(main)


def test_gets_beyond_the_memory_budget_wait_their_turn_or_are_refused() -> None:
    async def main(cell: BlockCell) -> None:
        data = data_of(25)
        await cell.put(data)
        for faults in cell.faults.values():
            faults.delay_s = lambda: 0.2
        results = await asyncio.gather(*(cell.get(data) for _ in range(10)), return_exceptions=True)
        assert Counter(type(result) for result in results) == {bytes: 4, Overloaded: 6}

    simulate(main, get_bytes_max=800_512, queue_s=0.3)
