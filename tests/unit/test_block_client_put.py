"""Puts: acknowledged by all, or written elsewhere, or owed on record; never half a promise."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from block_cell import OWNER, REPLICA, RS, BlockCell, data_of, simulate

from cluster.block_client_settings import PutResult
from cluster.topology import NodeState
from erasure.scheme import Scheme
from protocol.errors import (
    HaversackError,
    NodeFull,
    NodeRefuses,
    NodeUnavailable,
    NotEnoughNodes,
    UnknownOutcome,
)
from protocol.hashing import hash_block
from protocol.ids import NodeId
from protocol.limits import SMALL_BLOCK_BYTES
from protocol.messages import ItemStatus


@pytest.mark.parametrize(
    ("size", "scheme"),
    [
        (0, REPLICA),
        (1, REPLICA),
        (SMALL_BLOCK_BYTES - 1, REPLICA),
        (SMALL_BLOCK_BYTES, RS),
        (4 * 1024 * 1024, RS),
    ],
)
def test_a_put_lands_on_every_slot_of_the_scheme_for_its_size(size: int, scheme: Scheme) -> None:
    async def main(cell: BlockCell) -> None:
        data = data_of(size, size)
        result = await cell.put(data)
        assert result.new
        assert not result.degraded
        assert await cell.slots_held(data) == list(range(scheme.n))
        row = await cell.row_of(data)
        assert (row.plain_bytes, row.stored_bytes) == (size, result.stored_bytes)
        assert await cell.get(data) == data
        assert await cell.index.debts() == 0

    simulate(main)


def test_a_second_put_exists_and_gives_its_owner_a_claim() -> None:
    async def main(cell: BlockCell) -> None:
        data = data_of(1)
        await cell.put(data)
        puts = len(cell.calls)
        assert await cell.index.claimed(8, [hash_block(data)]) == set()
        result = await cell.put(data, owner=8)
        assert not result.new
        assert len(cell.calls) == puts, "no node was asked"
        assert await cell.index.claimed(8, [hash_block(data)]) == {hash_block(data)}

    simulate(main)


def test_a_block_that_goes_away_between_lookup_and_claim_is_stored_again() -> None:
    async def main(cell: BlockCell) -> None:
        data = data_of(28)
        await cell.put(data)
        claim = cell.client._index.claim

        async def remove_first(owner: int, hashes: Any) -> Any:
            cell.remove_block(hash_block(data))
            return await claim(owner, hashes)

        cell.client._index.claim = remove_first  # type: ignore[method-assign]
        assert (await cell.put(data)).new
        assert await cell.slots_held(data) == list(range(9))

    simulate(main)


def test_compressible_bytes_are_stored_smaller_unless_told_not_to() -> None:
    async def main(cell: BlockCell) -> None:
        data = bytes(300_000)
        result = await cell.put(data)
        assert (result.stored_bytes < 1_000) == cell.settings.compress
        assert await cell.get(data) == data

    simulate(main)
    simulate(main, compress=False)


def test_concurrent_puts_of_one_hash_are_one_flight_and_all_owners_get_claims() -> None:
    async def main(cell: BlockCell) -> None:
        data = data_of(2)
        owners = list(range(1, 21))
        results = await asyncio.gather(*(cell.put(data, owner) for owner in owners))
        assert sum(result.new for result in results) == 1
        assert len([call for call in cell.calls if call.startswith("put")]) == RS.n
        for owner in owners:
            assert await cell.index.claimed(owner, [hash_block(data)]) == {hash_block(data)}

    simulate(main)


def test_the_failure_of_a_flight_is_everybodys() -> None:
    async def main(cell: BlockCell) -> None:
        cell.kill(*cell.node_ids)
        data = data_of(3)
        results = await asyncio.gather(
            *(cell.put(data, owner) for owner in range(4)), return_exceptions=True
        )
        assert [type(result) for result in results] == [NotEnoughNodes] * 4
        assert len({id(result) for result in results}) == 4
        assert await cell.row_of(data) is None

    simulate(main)


def test_when_the_first_of_a_flight_is_cancelled_the_next_one_leads() -> None:
    async def main(cell: BlockCell) -> None:
        for faults in cell.faults.values():
            faults.delay_s = lambda: 1.0
        data = data_of(4)
        tasks = [asyncio.ensure_future(cell.put(data, owner)) for owner in range(3)]
        await asyncio.sleep(0.5)
        tasks[0].cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(results[0], asyncio.CancelledError)
        assert sorted(result.new for result in results[1:]) == [False, True]  # type: ignore[union-attr]

    simulate(main)


def test_two_gateways_putting_one_hash_agree_on_one_row() -> None:
    async def main(cell: BlockCell) -> None:
        other_pool, other = cell.new_client(99)
        data = data_of(5)
        results = await asyncio.gather(
            cell.put(data), other.put(8, hash_block(data), (data,), len(data))
        )
        assert sorted(result.new for result in results) == [False, True]
        assert await cell.get(data) == data
        assert await cell.slots_held(data) == list(range(RS.n))
        await other_pool.aclose()

    simulate(main, volumes=1)
    simulate(main, volumes=4)


ERRORS = [
    NodeUnavailable("refused"),
    NodeFull("full"),
    NodeRefuses("no lease"),
    UnknownOutcome("no answer"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.kind)
def test_a_failed_slot_moves_the_whole_block_to_nodes_that_work(error: HaversackError) -> None:
    async def main(cell: BlockCell) -> None:
        bad = cell.node_ids[4]
        cell.open_volume(RS, cell.node_ids[:9])
        await cell.map.refresh()
        cell.faults[bad].put_refuses = error
        cell.open_volume(RS, [node for node in cell.node_ids if node != bad][:9])
        for number in range(5):
            data = data_of(number)
            result = await cell.put(data)
            assert result == PutResult(True, result.stored_bytes, False)
            row = await cell.row_of(data)
            assert bad not in (await cell.map.volume(row.volume)).slots
            assert await cell.slots_held(data) == list(range(9))
        assert await cell.index.debts() == 0

    simulate(main, nodes=12, volumes=0)


@pytest.mark.parametrize("status", [ItemStatus.IO_ERROR, ItemStatus.INVALID, ItemStatus.CORRUPT])
def test_a_refused_record_is_a_failed_slot(status: ItemStatus) -> None:
    async def main(cell: BlockCell) -> None:
        data = data_of(6)
        bad = cell.node_ids[0]
        cell.open_volume(RS, cell.node_ids[:9])
        cell.open_volume(RS, cell.node_ids[1:10])
        cell.faults[bad].put_statuses = {hash_block(data): status}
        await cell.put(data)
        row = await cell.row_of(data)
        assert bad not in (await cell.map.volume(row.volume)).slots

    simulate(main, nodes=10, volumes=0)


@pytest.mark.parametrize(("dead", "debts"), [(0, 0), (1, 1), (2, 2)])
def test_short_of_domains_a_put_is_taken_with_its_debts_on_record(dead: int, debts: int) -> None:
    async def main(cell: BlockCell) -> None:
        cell.kill(*cell.node_ids[:dead])
        data = data_of(7)
        result = await cell.put(data)
        assert result.new
        assert result.degraded == (dead > 0)
        assert await cell.index.debts() == debts
        assert len(await cell.slots_held(data)) == 9 - dead
        assert await cell.get(data) == data

    simulate(main)


@pytest.mark.parametrize("dead", [3, 4, 9])
def test_below_k_plus_one_a_put_is_refused_and_nothing_is_claimed(dead: int) -> None:
    async def main(cell: BlockCell) -> None:
        cell.kill(*cell.node_ids[:dead])
        data = data_of(8)
        with pytest.raises(NotEnoughNodes) as caught:
            await cell.put(data)
        assert caught.value.details["needed_nodes"] == 9
        assert len(caught.value.details["failed"]) == dead  # type: ignore[arg-type]
        assert await cell.row_of(data) is None
        assert await cell.index.claimed(OWNER, [hash_block(data)]) == set()
        assert await cell.index.debts() == 0

    simulate(main)


def test_a_node_that_dies_between_two_fragments_of_one_put() -> None:
    async def main(cell: BlockCell) -> None:
        for number, node_id in enumerate(cell.node_ids):
            cell.faults[node_id].delay_s = lambda number=number: 0.1 * number  # type: ignore[misc]
        data = data_of(9)
        task = asyncio.ensure_future(cell.put(data))
        await asyncio.sleep(0.45)
        victim = cell.node_ids[6]
        cell.faults[victim].is_stopped = True
        cell.faults[victim].put_refuses = NodeUnavailable("killed")
        result = await task
        held = await cell.slots_held(data)
        assert len(held) == 8
        assert result.degraded
        assert await cell.index.debts() == 1

    simulate(main, volumes=1)


def test_a_stopped_node_costs_one_deadline_and_later_puts_none() -> None:
    async def main(cell: BlockCell) -> None:
        cell.faults[cell.node_ids[2]].is_stopped = True
        started = cell.clock.monotonic()
        assert (await cell.put(data_of(10))).degraded
        assert cell.clock.monotonic() - started == pytest.approx(cell.settings.put_slot_s, rel=0.2)
        started = cell.clock.monotonic()
        for number in range(20):
            await cell.put(data_of(100 + number))
        assert cell.clock.monotonic() - started < 0.1

    simulate(main)


def test_a_put_waits_for_the_placement_service_to_open_a_volume_without_the_failed_node() -> None:
    async def main(cell: BlockCell) -> None:
        bad = cell.node_ids[0]
        cell.open_volume(RS, cell.node_ids[:9])
        cell.kill(bad)
        data = data_of(11)
        task = asyncio.ensure_future(cell.put(data))
        await asyncio.sleep(2.0)
        assert not task.done()
        cell.set_state(bad, NodeState.DOWN)
        opened = cell.open_volume(RS, cell.node_ids[1:10])
        result = await task
        assert not result.degraded
        assert (await cell.row_of(data)).volume == opened

    simulate(main, nodes=10, volumes=0)


def test_a_put_that_placement_cannot_help_is_taken_with_its_debts_on_record() -> None:
    """As when this gateway alone cannot reach a node: the first put gives placement its time, the
    others do not wait again."""

    async def main(cell: BlockCell) -> None:
        for _ in range(4):
            cell.open_volume(RS, cell.node_ids[:9])
        cell.kill(cell.node_ids[0], cell.node_ids[1])
        started = cell.clock.monotonic()
        assert (await cell.put(data_of(12))).degraded
        waited_s = cell.clock.monotonic() - started
        assert waited_s == pytest.approx(cell.settings.debts_after_s, rel=0.1)
        assert await cell.index.debts() == 2
        started = cell.clock.monotonic()
        for number in range(50):
            assert (await cell.put(data_of(200 + number))).degraded
            await asyncio.sleep(0.5)
        assert cell.clock.monotonic() - started < 25 + cell.settings.put_slot_s
        cell.heal()
        await asyncio.sleep(30)
        assert not (await cell.put(data_of(13))).degraded
        assert await cell.get(data_of(12)) == data_of(12)

    simulate(main, nodes=12, volumes=0)


def test_a_later_trouble_gives_placement_its_time_again() -> None:
    async def main(cell: BlockCell) -> None:
        cell.open_volume(RS, cell.node_ids[:9])
        for number in range(2):
            cell.kill(cell.node_ids[number])
            started = cell.clock.monotonic()
            assert (await cell.put(data_of(30 + number))).degraded
            assert cell.clock.monotonic() - started > 0.9 * cell.settings.debts_after_s
            cell.heal()
            await asyncio.sleep(30)
            assert not (await cell.put(data_of(40 + number))).degraded

    simulate(main, nodes=12, volumes=0)


def test_a_put_does_not_wait_for_the_placement_service_for_ever() -> None:
    async def main(cell: BlockCell) -> None:
        cell.open_volume(RS, cell.node_ids[:9])
        cell.kill(*cell.node_ids[:3])
        started = cell.clock.monotonic()
        with pytest.raises(NotEnoughNodes, match="placement"):
            await cell.put(data_of(12))
        waited_s = cell.clock.monotonic() - started
        assert waited_s == pytest.approx(cell.settings.placement_wait_s, rel=0.2)

    simulate(main, nodes=12, volumes=0)


def test_a_node_that_failed_a_put_is_used_again_once_the_map_names_a_new_life() -> None:
    """Every open volume holds it, and placement has no reason to open another."""

    async def main(cell: BlockCell) -> None:
        cell.open_volume(RS, cell.node_ids[:9])
        cell.kill(cell.node_ids[0])
        task = asyncio.ensure_future(cell.put(data_of(14)))
        await asyncio.sleep(2.0)
        assert not task.done()
        cell.heal()
        await cell.start_node(cell.node_ids[0])
        started = cell.clock.monotonic()
        assert not (await task).degraded
        assert cell.clock.monotonic() - started < 1.0

    simulate(main, nodes=10, volumes=0)


def test_volumes_with_vacant_slots_take_puts_when_nodes_are_short() -> None:
    async def main(cell: BlockCell) -> None:
        slots: list[NodeId | None] = [*cell.node_ids, None]
        cell.open_volume(RS, slots)
        data = data_of(13)
        result = await cell.put(data)
        assert result.degraded
        assert await cell.index.debts() == 1
        assert await cell.get(data) == data

    simulate(main, nodes=8, volumes=0)


def test_a_sealed_volume_takes_no_new_put() -> None:
    async def main(cell: BlockCell) -> None:
        first = cell.open_volume(RS)
        await cell.put(data_of(14))
        cell.seal_volume(first)
        second = cell.open_volume(RS)
        await asyncio.sleep(2 * cell.settings.map_age_s)
        await cell.put(data_of(15))
        assert (await cell.row_of(data_of(15))).volume == second

    simulate(main, volumes=0)
