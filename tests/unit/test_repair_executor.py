"""Repair over real nodes, SQL and bytes: made again, verified, and only then named by the map."""

from __future__ import annotations

import asyncio

from block_cell import BlockCell, data_of, simulate
from repair_cell import (
    assert_whole,
    good_slots,
    listed,
    lose,
    moves,
    new_repair,
    owe,
    repair_until_idle,
    set_since,
    volumes_of,
)
from sqlalchemy import Connection
from verifying import Verifying

from cluster.block_sql import Debt
from cluster.debts import DebtReason
from cluster.repair.executor import RunState
from cluster.repair.plan import SlotMove
from cluster.repair.service import RepairService
from cluster.repair.settings import RepairSettings
from cluster.topology import NodeState, VolumeState
from cluster.verify.differences import Difference
from cluster.verify.stray_rows import StrayRow, mark_removing, save_strays
from erasure.fragment import pack_header, parse
from protocol.errors import DirectoryForeign, NodeFull
from protocol.hashing import hash_block
from protocol.ids import NodeId
from protocol.messages import ItemStatus
from storage_node.interface import FragmentKey

BLOCKS = 9


async def fill(cell: BlockCell, blocks: int = BLOCKS) -> list[bytes]:
    """Large and small blocks; they do not compress, or do."""
    data = [data_of(seed, 150_000 + seed) for seed in range(blocks)]
    data += [data_of(100 + seed, 3_000) for seed in range(blocks // 2)]
    data.append(b"haversack " * 40_000)
    for item in data:
        await cell.put(item)
    return data


async def started(cell: BlockCell, **settings: float) -> RepairService:
    service = new_repair(cell, **settings)
    await service.start()
    return service


async def finish(cell: BlockCell, service: RepairService) -> None:
    await service._pool.aclose()


def busiest(cell: BlockCell, data: list[bytes]) -> NodeId:
    """A node that holds fragments of most blocks."""
    volumes = volumes_of(cell, cell.all_rows()).values()
    return max(
        cell.node_ids,
        key=lambda node: sum(volume.blocks for volume in volumes if node in volume.slots),
    )


def test_a_lost_node_is_made_again_on_others_and_every_block_reads_back() -> None:
    async def main(cell: BlockCell) -> None:
        data = await fill(cell)
        victim = busiest(cell, data)
        lose(cell, victim)
        service = await started(cell)
        await repair_until_idle(cell, service)
        assert_whole(cell)
        for volume in volumes_of(cell, cell.all_rows()).values():
            assert victim not in volume.slots
            assert volume.state is VolumeState.SEALED or len(set(volume.slots)) == 9
        for item in data:
            assert await cell.get(item) == item
        assert service.counters.made_bytes > 0
        await finish(cell, service)

    simulate(main, nodes=11)


def test_m_lost_nodes_are_made_from_one_read_of_k_fragments() -> None:
    async def main(cell: BlockCell) -> None:
        data = await fill(cell)
        row = await cell.row_of(data[0])
        assert row is not None
        slots = volumes_of(cell, [row])[row.volume].slots
        lose(cell, *[node for node in slots[:3] if node is not None])
        service = await started(cell, batch_blocks=1_000)
        cell.calls.clear()
        result = None
        view = await service.view()
        plan = service.plan(view)
        for repair in plan.repairs:
            if repair.volume == row.volume:
                result = await service.executor.repair_all([repair])
                assert len(repair.moves) == 3
        assert result is not None
        assert result[0].state is RunState.DONE, result
        assert sum(call.startswith("get") for call in cell.calls) == 6
        await repair_until_idle(cell, service)
        assert_whole(cell)
        await finish(cell, service)

    simulate(main, nodes=13, volumes=1)


def test_a_node_that_is_not_out_yet_is_left_alone() -> None:
    async def main(cell: BlockCell) -> None:
        data = await fill(cell)
        victim = busiest(cell, data)
        lose(cell, victim, since=-30)
        service = await started(cell)
        assert not await service.step()
        assert moves(cell) == []
        await cell.clock.sleep(40)
        await repair_until_idle(cell, service)
        assert_whole(cell)
        await finish(cell, service)

    simulate(main, nodes=11)


def test_a_node_that_answers_is_not_out_whatever_placement_thinks() -> None:
    async def main(cell: BlockCell) -> None:
        data = await fill(cell)
        victim = busiest(cell, data)
        cell.set_state(victim, NodeState.DOWN)
        set_since(cell, victim, cell.clock.wall() - 5e4)
        service = await started(cell)
        assert not await service.step()
        assert moves(cell) == []
        cell.nodes[victim]._fail(OSError("gone"))
        await cell.nodes[victim].detach()
        cell.nodes[victim].refuse(DirectoryForeign("the directory is empty"))
        assert not await service.step()
        set_since(cell, victim, cell.clock.wall() - 25 * 3600.0)
        await service._map.refresh()
        assert (await service.view()).out == {victim}
        await finish(cell, service)

    simulate(main, nodes=11)


def test_debts_of_every_kind_are_repaid_in_place() -> None:
    async def main(cell: BlockCell) -> None:
        data = await fill(cell)
        rows = [await cell.row_of(item) for item in data[:3]]
        for slot, row, reason in zip((0, 7, 4), rows, DebtReason, strict=False):
            assert row is not None
            node = volumes_of(cell, [row])[row.volume].slots[slot]
            assert node is not None
            key = FragmentKey(row.volume, row.hash, slot)
            cell.stores[node].delete_group([key])
            owe(cell, Debt(row.volume, slot, row.hash), reason)
        before = {v.volume_id: v.epoch for v in volumes_of(cell, cell.all_rows()).values()}
        service = await started(cell)
        await repair_until_idle(cell, service)
        assert_whole(cell)
        after = {v.volume_id: v.epoch for v in volumes_of(cell, cell.all_rows()).values()}
        assert before == after, "a debt repaid in place moves nothing"
        assert service.counters.repaid == 3
        await finish(cell, service)

    simulate(main)


def test_a_debt_whose_fragment_is_there_after_all_is_struck_out_without_a_write() -> None:
    async def main(cell: BlockCell) -> None:
        data = await fill(cell)
        row = await cell.row_of(data[0])
        assert row is not None
        owe(cell, Debt(row.volume, 2, row.hash), DebtReason.UNREADABLE)
        service = await started(cell)
        await repair_until_idle(cell, service)
        assert_whole(cell)
        assert service.counters.made_fragments == 0
        await finish(cell, service)

    simulate(main)


def test_a_liar_is_replaced_although_its_checksums_are_right() -> None:
    async def main(cell: BlockCell) -> None:
        data = await fill(cell)
        row = await cell.row_of(data[0])
        other = await cell.row_of(data[1])
        assert row is not None
        assert other is not None
        node = volumes_of(cell, [row])[row.volume].slots[1]
        assert node is not None
        spoil(cell, node, FragmentKey(row.volume, row.hash, 1))
        assert 1 not in good_slots(cell, row)
        owe(cell, Debt(row.volume, 1, row.hash), DebtReason.LYING)
        service = await started(cell)
        await repair_until_idle(cell, service)
        assert_whole(cell)
        await finish(cell, service)

    simulate(main)


def spoil(cell: BlockCell, node: NodeId, key: FragmentKey) -> None:
    """A fragment with other bytes, and checksums to match."""
    (answer,) = cell.stores[node].get_many([key])
    assert answer.record is not None
    fragment = parse(answer.record)
    payload = bytes(byte ^ 0x55 for byte in fragment.payload)
    header = pack_header(
        fragment.scheme,
        fragment.slot,
        fragment.block,
        fragment.volume,
        fragment.epoch,
        fragment.stored_length,
        payload,
        fragment.stripe_tag,
        fragment.plain_length,
    )
    cell.stores[node].put_group([(key, header + payload)])


def test_an_unknown_liar_among_the_sources_is_found_and_repaired_too() -> None:
    async def main(cell: BlockCell) -> None:
        data = await fill(cell)
        row = await cell.row_of(data[0])
        assert row is not None
        slots = volumes_of(cell, [row])[row.volume].slots
        assert slots[1] is not None
        assert slots[0] is not None
        spoil(cell, slots[1], FragmentKey(row.volume, row.hash, 1))
        lose(cell, slots[0])
        service = await started(cell)
        await repair_until_idle(cell, service)
        assert_whole(cell)
        await finish(cell, service)

    simulate(main, nodes=11)


def test_a_corrupt_source_is_replaced_by_another_and_repaired_too() -> None:
    async def main(cell: BlockCell) -> None:
        data = await fill(cell)
        row = await cell.row_of(data[0])
        assert row is not None
        slots = volumes_of(cell, [row])[row.volume].slots
        assert slots[2] is not None
        assert slots[0] is not None
        cell.stores[slots[2]].delete_group([FragmentKey(row.volume, row.hash, 2)])
        lose(cell, slots[0])
        service = await started(cell)
        await repair_until_idle(cell, service)
        assert_whole(cell)
        await finish(cell, service)

    simulate(main, nodes=11)


def test_a_block_with_fewer_than_k_fragments_is_listed_and_stops_no_other() -> None:
    async def main(cell: BlockCell) -> None:
        data = await fill(cell)
        row = await cell.row_of(data[0])
        assert row is not None
        slots = volumes_of(cell, [row])[row.volume].slots
        for slot in (1, 2, 3):
            node = slots[slot]
            assert node is not None
            cell.stores[node].delete_group([FragmentKey(row.volume, row.hash, slot)])
        assert slots[0] is not None
        lose(cell, slots[0])
        service = await started(cell)
        for _ in range(20):
            await service.step()
            await cell.clock.sleep(5)
        assert listed(cell) == {row.hash}
        for other in cell.all_rows():
            if other.hash != row.hash:
                assert len(good_slots(cell, other)) >= 4
        volume = volumes_of(cell, [row])[row.volume]
        assert slots[0] not in volume.slots, "the others' slot was placed anew all the same"
        assert (row.volume, 0, row.hash) in cell.all_debts()
        await finish(cell, service)

    simulate(main, nodes=11)


def test_a_slot_waits_for_its_old_disk_if_that_may_hold_the_last_fragment_of_a_block() -> None:
    async def main(cell: BlockCell) -> None:
        data = await fill(cell)
        row = await cell.row_of(data[0])
        assert row is not None
        slots = volumes_of(cell, [row])[row.volume].slots
        for slot in (1, 2, 3):
            node = slots[slot]
            assert node is not None
            cell.stores[node].delete_group([FragmentKey(row.volume, row.hash, slot)])
        assert slots[0] is not None
        lose(cell, slots[0], since=-3600)
        service = await started(cell)
        for _ in range(5):
            await service.step()
            await cell.clock.sleep(5)
        assert listed(cell) == {row.hash}
        assert volumes_of(cell, [row])[row.volume].slots[0] == slots[0]
        cell.heal()
        cell.set_state(slots[0], NodeState.UP)
        await cell.clock.sleep(1_000)
        await repair_until_idle(cell, service)
        assert_whole(cell)
        assert listed(cell) == set()
        assert await cell.get(data[0]) == data[0]
        await finish(cell, service)

    simulate(main, nodes=11)


def test_a_block_that_left_no_fragment_anywhere_is_found_by_the_scan_and_listed() -> None:
    async def main(cell: BlockCell) -> None:
        data = await fill(cell)
        row = await cell.row_of(data[0])
        assert row is not None
        slots = volumes_of(cell, [row])[row.volume].slots
        for slot, node in enumerate(slots):
            assert node is not None
            cell.stores[node].delete_group([FragmentKey(row.volume, row.hash, slot)])
        assert slots[0] is not None
        lose(cell, slots[0])
        service = await started(cell)
        for _ in range(10):
            await service.step()
            await cell.clock.sleep(5)
        assert listed(cell) == {row.hash}
        await finish(cell, service)

    simulate(main, nodes=11)


def test_a_full_target_is_replaced_by_another() -> None:
    async def main(cell: BlockCell) -> None:
        data = await fill(cell)
        victim = busiest(cell, data)
        lose(cell, victim)
        for node in cell.node_ids[:2]:
            cell.faults[node].put_refuses = NodeFull(f"{node} is full")
        service = await started(cell)
        await repair_until_idle(cell, service)
        assert_whole(cell)
        await finish(cell, service)

    simulate(main, nodes=13)


def test_a_target_that_dies_is_replaced_by_another() -> None:
    async def main(cell: BlockCell) -> None:
        data = await fill(cell)
        victim = busiest(cell, data)
        lose(cell, victim)
        service = await started(cell)
        view = await service.view()
        plan = service.plan(view)
        target = plan.repairs[0].moves[0].target
        cell.kill(target)
        results = await service.executor.repair_all(plan.repairs[:1])
        assert results[0].state is RunState.UNFIT
        cell.set_state(target, NodeState.DOWN)
        await repair_until_idle(cell, service)
        lost = {victim, target}
        for volume in volumes_of(cell, cell.all_rows()).values():
            assert victim not in volume.slots
        set_since(cell, target, cell.clock.wall() - 1e5)
        await repair_until_idle(cell, service)
        for volume in volumes_of(cell, cell.all_rows()).values():
            assert not lost & set(volume.slots)
        assert_whole(cell)
        await finish(cell, service)

    simulate(main, nodes=13)


def test_a_target_that_restarts_before_the_publication_is_verified_again() -> None:
    async def main(cell: BlockCell) -> None:
        data = await fill(cell)
        victim = busiest(cell, data)
        lose(cell, victim)
        service = await started(cell)
        plan = service.plan(await service.view())
        target = plan.repairs[0].moves[0].target
        finish_run = service.executor._finish

        async def restart_first(*arguments: object) -> object:
            await cell.start_node(target)
            return await finish_run(*arguments)  # type: ignore[arg-type]

        service.executor._finish = restart_first  # type: ignore[method-assign, assignment]
        (result,) = await service.executor.repair_all(plan.repairs[:1])
        assert result.state is RunState.MOVED_ON
        service.executor._finish = finish_run  # type: ignore[method-assign]
        await repair_until_idle(cell, service)
        assert_whole(cell)
        await finish(cell, service)

    simulate(main, nodes=11)


def test_a_node_that_comes_back_in_the_middle_ends_its_moves() -> None:
    async def main(cell: BlockCell) -> None:
        data = await fill(cell)
        victim = busiest(cell, data)
        lose(cell, victim)
        service = await started(cell)
        plan = service.plan(await service.view())
        for node in cell.node_ids:
            cell.faults[node].get_status = ItemStatus.IO_ERROR
        results = await service.executor.repair_all(plan.repairs)
        assert {result.state for result in results} == {RunState.PARTIAL}
        assert moves(cell)
        cell.heal()
        cell.set_state(victim, NodeState.UP)
        await cell.clock.sleep(1000)
        await repair_until_idle(cell, service)
        assert_whole(cell)
        assert any(victim in v.slots for v in volumes_of(cell, cell.all_rows()).values())
        await finish(cell, service)

    simulate(main, nodes=11)


def test_a_living_nodes_slot_is_copied_not_decoded() -> None:
    async def main(cell: BlockCell) -> None:
        data = await fill(cell)
        row = await cell.row_of(data[0])
        assert row is not None
        volume = volumes_of(cell, [row])[row.volume]
        source = volume.slots[4]
        (target, *_) = [node for node in cell.node_ids if node not in volume.slots]
        service = await started(cell)
        cell.calls.clear()
        seen = []
        (result,) = await service.executor.run(
            [SlotMove(row.volume, 4, source, target, "drain", 7)],
            lambda fragments, size: seen.append((fragments, size)),
        )
        assert result.state is RunState.DONE, result
        gets = {call for call in cell.calls if call.startswith("get")}
        assert gets == {f"get {source}"}
        assert sum(fragments for fragments, _ in seen) == volume.blocks
        assert volumes_of(cell, [row])[row.volume].slots[4] == target
        assert_whole(cell)
        await finish(cell, service)

    simulate(main, nodes=11)


def test_a_node_that_comes_back_is_not_read_and_its_fragments_are_strays_until_used_again() -> None:
    async def main(cell: BlockCell) -> None:
        data = await fill(cell)
        victim = busiest(cell, data)
        row = next(
            row for row in cell.all_rows() if victim in volumes_of(cell, [row])[row.volume].slots
        )
        slot = volumes_of(cell, [row])[row.volume].slots.index(victim)
        lose(cell, victim)
        service = await started(cell)
        await repair_until_idle(cell, service)
        assert_whole(cell)
        cell.heal()
        await cell.start_node(victim)
        cell.set_state(victim, NodeState.UP)
        await cell.map.refresh()
        kept = {key for key, _ in cell.stores[victim].inventory(None, 10_000)[0]}
        assert kept, "nothing is removed by the return itself"
        cell.calls.clear()
        for item in data:
            assert await cell.get(item) == item
        assert f"get {victim}" not in cell.calls
        verifying = Verifying(cell)
        await verifying.whole_pass()
        found = {stray.key for stray in verifying.strays() if stray.node == victim}
        assert found == kept
        # A move that comes back to it finds its fragments and writes none of them again.
        cell.calls.clear()
        now = volumes_of(cell, [row])[row.volume]
        move = SlotMove(row.volume, slot, now.slots[slot], victim, "rebalance")
        await finish(cell, service)
        service = await started(cell)  # the verifier has the role
        result = await service.executor.repair(row.volume, [move], ())
        assert result.state is RunState.DONE
        assert result.made_fragments == 0
        assert f"put {victim}" not in cell.calls
        assert volumes_of(cell, [row])[row.volume].slots[slot] == victim
        assert_whole(cell)
        verifying = Verifying(cell)
        await verifying.whole_pass()
        left = {stray.key for stray in verifying.strays() if stray.node == victim}
        assert left == {key for key in kept if (key.volume, key.slot) != (row.volume, slot)}
        await finish(cell, service)

    simulate(main, nodes=11)


def test_no_move_begins_where_a_delete_of_that_slot_may_still_be_under_way() -> None:
    async def main(cell: BlockCell) -> None:
        data = data_of(1)
        await cell.put(data)
        row = await cell.row_of(data)
        assert row is not None
        source = (await cell.slots_of(data))[2]
        (target,) = set(cell.node_ids) - set(await cell.slots_of(data))
        service = await started(cell)
        now = cell.clock.wall()
        key = FragmentKey(row.volume, row.hash, 2)
        sent = StrayRow(target, key, Difference.STALE, 100, now - 1e6, 1, None)

        def delete_sent(connection: Connection) -> None:
            save_strays(connection, [sent], 1)
            mark_removing(connection, [sent.place], now)

        cell.db.transact(delete_sent)
        epoch = volumes_of(cell, [row])[row.volume].epoch
        move = SlotMove(row.volume, 2, source, target, "drain")
        result = await service.executor.repair(row.volume, [move], ())
        assert (result.state, result.unfit) == (RunState.UNFIT, target)
        assert volumes_of(cell, [row])[row.volume].epoch == epoch
        assert moves(cell) == []
        await cell.clock.sleep(RepairSettings().delete_fade_s + 1)
        result = await service.executor.repair(row.volume, [move], ())
        assert result.state is RunState.DONE
        assert (await cell.slots_of(data))[2] == target
        assert_whole(cell)
        await finish(cell, service)

    simulate(main, nodes=10)


def test_puts_that_were_under_way_are_fenced_and_written_elsewhere() -> None:
    async def main(cell: BlockCell) -> None:
        data = await fill(cell)
        row = await cell.row_of(data[0])
        assert row is not None
        volume = volumes_of(cell, [row])[row.volume]
        (target, *_) = [node for node in cell.node_ids if node not in volume.slots]
        service = await started(cell)
        late = [data_of(500 + number) for number in range(20)]
        async with asyncio.TaskGroup() as tasks:
            for item in late:
                tasks.create_task(cell.put(item))
            tasks.create_task(
                service.executor.run([SlotMove(row.volume, 0, volume.slots[0], target, "x")])
            )
        await repair_until_idle(cell, service)
        assert_whole(cell)
        for item in [*data, *late]:
            assert await cell.get(item) == item
        assert hash_block(late[0]) in {row.hash for row in cell.all_rows()}
        await finish(cell, service)

    simulate(main, nodes=11)


def test_too_few_nodes_leave_slots_blocked_with_the_reason() -> None:
    async def main(cell: BlockCell) -> None:
        data = await fill(cell)
        lose(cell, busiest(cell, data))
        service = await started(cell)
        plan = service.plan(await service.view())
        large = [item for item in plan.blocked if "add a node" in item.reason]
        assert large
        await repair_until_idle(cell, service)
        assert service.counters.blocked_slots == len(large)
        assert moves(cell) == []
        await finish(cell, service)

    simulate(main, nodes=9)
