"""Puts: acknowledged by all, or written elsewhere, or owed on record; never half a promise."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from block_cell import OWNER, BlockCell, data_of, simulate

from cluster.block_client_settings import PutResult
from cluster.topology import NodeState
from erasure.scheme import Scheme
from protocol.errors import (
    DatabaseBusy,
    HaversackError,
    NodeFull,
    NodeRefuses,
    NodeUnavailable,
    NotEnoughNodes,
    Overloaded,
    UnknownOutcome,
)
from protocol.hashing import hash_block
from protocol.ids import BlockHash, NodeId
from protocol.limits import SMALL_BLOCK_BYTES
from protocol.messages import ItemStatus

RS = Scheme.parse("rs-6-3")
REPLICA = RS.small_twin()


async def row_of(cell: BlockCell, data: bytes) -> Any:
    return (await cell.index.lookup([hash_block(data)])).get(hash_block(data))


async def slots_held(cell: BlockCell, data: bytes) -> list[int]:
    """Slots whose fragment is on the disk of the node the map names, for the recorded volume."""
    row = await row_of(cell, data)
    await cell.map.refresh()
    volume = await cell.map.volume(row.volume)
    return [
        slot
        for slot, node_id in enumerate(volume.slots)
        if node_id is not None and cell.holds(node_id, row.volume, row.hash, slot)
    ]


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
        assert await slots_held(cell, data) == list(range(scheme.n))
        row = await row_of(cell, data)
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
        assert await slots_held(cell, data) == list(range(9))

    simulate(main)


def test_compressible_bytes_are_stored_smaller_unless_told_not_to() -> None:
    async def main(cell: BlockCell) -> None:
        data = bytes(300_000)
        result = await cell.put(data)
        assert (result.stored_bytes < 1_000) == cell.settings.compress
        assert await cell.get(data) == data

    simulate(main)
    simulate(main, compress=False)


# -- concurrent puts ---------------------------------------------------------------------------


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
        assert await row_of(cell, data) is None

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
        assert await slots_held(cell, data) == list(range(RS.n))
        await other_pool.aclose()

    simulate(main, volumes=1)
    simulate(main, volumes=4)


# -- failing nodes -----------------------------------------------------------------------------

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
            row = await row_of(cell, data)
            assert bad not in (await cell.map.volume(row.volume)).slots
            assert await slots_held(cell, data) == list(range(9))
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
        row = await row_of(cell, data)
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
        assert len(await slots_held(cell, data)) == 9 - dead
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
        assert await row_of(cell, data) is None
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
        held = await slots_held(cell, data)
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
        assert (await row_of(cell, data)).volume == opened

    simulate(main, nodes=10, volumes=0)


def test_a_put_does_not_wait_for_the_placement_service_for_ever() -> None:
    async def main(cell: BlockCell) -> None:
        cell.open_volume(RS, cell.node_ids[:9])
        cell.kill(cell.node_ids[0])
        started = cell.clock.monotonic()
        with pytest.raises(NotEnoughNodes, match="placement"):
            await cell.put(data_of(12))
        waited_s = cell.clock.monotonic() - started
        assert waited_s == pytest.approx(cell.settings.placement_wait_s, rel=0.2)

    simulate(main, nodes=12, volumes=0)


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
        assert (await row_of(cell, data_of(15))).volume == second

    simulate(main, volumes=0)


# -- fencing -----------------------------------------------------------------------------------


def test_a_node_that_began_a_new_life_is_written_to_as_that_life() -> None:
    async def main(cell: BlockCell) -> None:
        await cell.put(data_of(16))
        await cell.start_node(cell.node_ids[0])
        data = data_of(17)
        result = await cell.put(data)
        assert not result.degraded
        assert await slots_held(cell, data) == list(range(9))

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
        assert await slots_held(cell, data) == list(range(9))

    simulate(main)


def test_a_node_fenced_for_ever_ends_in_an_error_not_in_an_endless_loop() -> None:
    async def main(cell: BlockCell) -> None:
        await cell.nodes[cell.node_ids[0]].lease(1_000, 1e6)  # a life the map does not know
        started = cell.clock.monotonic()
        with pytest.raises(NotEnoughNodes):
            await cell.put(data_of(19))
        assert cell.clock.monotonic() - started < cell.settings.put_s
        assert await row_of(cell, data_of(19)) is None

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
        assert (await row_of(cell, data_of(27))).volume == opened[0]
        assert len(cell.calls) == 2 * RS.n

    simulate(main, volumes=0)


def test_an_old_epoch_is_refused_by_nodes_and_the_put_follows_the_map() -> None:
    async def main(cell: BlockCell) -> None:
        await cell.put(data_of(20))
        volume = (await row_of(cell, data_of(20))).volume
        cell.raise_epoch(volume)
        other_pool, other = cell.new_client(99)
        await other.put(OWNER, hash_block(data_of(22)), (data_of(22),), len(data_of(22)))
        await other_pool.aclose()  # it read the new map, and now all nodes know the new epoch
        data = data_of(21)
        result = await cell.put(data)
        assert not result.degraded
        assert await slots_held(cell, data) == list(range(9))

    simulate(main, volumes=1)


# -- busy, unknown, cancelled --------------------------------------------------------------------


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
        assert await row_of(cell, data_of(23)) is None

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
            assert (await row_of(cell, block) is None) == isinstance(result, Overloaded)

    simulate(main, put_bytes_max=800_000, queue_s=2.5)


# -- many at once ------------------------------------------------------------------------------


def named(*blocks: bytes) -> list[tuple[BlockHash, bytes]]:
    return [(hash_block(block), block) for block in blocks]


def test_many_small_blocks_are_one_frame_to_each_node() -> None:
    async def main(cell: BlockCell) -> None:
        blocks = [data_of(number, 1_000) for number in range(300)]
        results = await cell.client.put_many(OWNER, named(*blocks))
        assert all(isinstance(result, PutResult) and result.new for result in results)
        assert len(cell.calls) == REPLICA.n
        assert await cell.client.get_many([hash_block(block) for block in blocks]) == blocks

    simulate(main)


def test_a_batch_of_mixed_sizes_known_and_repeated_blocks() -> None:
    async def main(cell: BlockCell) -> None:
        known, small, large = data_of(1, 500), data_of(2, 600), data_of(3, 300_000)
        await cell.put(known, owner=1)
        results = await cell.client.put_many(OWNER, named(large, known, small, small, large, b""))
        assert [result.new for result in results] == [True, False, True, False, False, True]  # type: ignore[union-attr]
        hashes = [hash_block(block) for block in (known, small, large, b"")]
        assert await cell.index.claimed(OWNER, hashes) == set(hashes)
        assert [bytes(block) for block in await cell.client.get_many(hashes)] == [  # type: ignore[arg-type]
            known,
            small,
            large,
            b"",
        ]

    simulate(main)


def test_one_refused_record_of_a_batch_is_written_elsewhere_and_the_others_are_not() -> None:
    async def main(cell: BlockCell) -> None:
        blocks = [data_of(number, 1_000) for number in range(50)]
        bad_block = hash_block(blocks[17])
        cell.open_volume(REPLICA, cell.node_ids[:4])
        cell.faults[cell.node_ids[2]].put_statuses = {bad_block: ItemStatus.IO_ERROR}
        task = asyncio.ensure_future(cell.client.put_many(OWNER, named(*blocks)))
        await asyncio.sleep(0.5)
        second = cell.open_volume(REPLICA, cell.node_ids[4:8])
        results = await task
        assert all(isinstance(result, PutResult) and not result.degraded for result in results)
        rows = await cell.index.lookup([hash_block(block) for block in blocks])
        assert [row.hash for row in rows.values() if row.volume == second] == [bad_block]

    simulate(main, nodes=8, volumes=0)


def test_a_batch_over_a_dead_node_is_taken_with_debts_when_nodes_are_short() -> None:
    async def main(cell: BlockCell) -> None:
        cell.kill(cell.node_ids[0])
        blocks = [data_of(number, 1_000) for number in range(100)]
        results = await cell.client.put_many(OWNER, named(*blocks))
        assert all(isinstance(result, PutResult) and result.degraded for result in results)
        assert await cell.index.debts() == 100
        assert len(cell.calls) <= REPLICA.n + 3

    simulate(main, nodes=4)


def test_a_batch_larger_than_a_frame_is_split() -> None:
    async def main(cell: BlockCell) -> None:
        blocks = [data_of(number, 10_000) for number in range(20)]
        results = await cell.client.put_many(OWNER, named(*blocks))
        assert all(isinstance(result, PutResult) and result.new for result in results)
        assert len(cell.calls) == 4 * REPLICA.n

    simulate(main, put_group_bytes_max=50_000)


def test_overlapping_batches_store_each_block_once_and_answer_all() -> None:
    async def main(cell: BlockCell) -> None:
        blocks = [data_of(number, 1_000) for number in range(60)]
        batches = [named(*blocks[:40]), named(*blocks[20:]), named(*reversed(blocks))]
        answers = await asyncio.gather(
            *(cell.client.put_many(owner, batch) for owner, batch in enumerate(batches))
        )
        new = [
            block
            for batch, results in zip(batches, answers, strict=True)
            for (block, _), result in zip(batch, results, strict=True)
            if isinstance(result, PutResult) and result.new
        ]
        assert sorted(new) == sorted(hash_block(block) for block in blocks)
        for owner, batch in enumerate(batches):
            hashes = {block for block, _ in batch}
            assert await cell.index.claimed(owner, list(hashes)) == hashes

    simulate(main)
