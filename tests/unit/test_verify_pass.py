"""Passes of the verifier over a cell in one process: every class of difference is found, and what
merely happens during a pass is not one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
from block_cell import BlockCell, data_of, simulate
from verifying import (
    Verifying,
    all_zero,
    counts,
    name_of,
    orphan_record,
    resealed,
)

from cluster.debts import DebtReason, read_debts
from cluster.verify.settings import VerifierSettings
from protocol.errors import NodeUnavailable, NotLeader
from protocol.hashing import hash_block
from protocol.ids import VolumeId
from storage_node.interface import FragmentKey

LARGE = [data_of(seed) for seed in range(6)]
SMALL = [data_of(100 + seed, 3_000) for seed in range(6)]
DATA = LARGE + SMALL


def on_full_cell(
    main: Callable[[BlockCell, Verifying], Awaitable[None]], *, nodes: int = 11
) -> None:
    """Run `main` on a cell that holds `DATA`."""

    async def whole(cell: BlockCell) -> None:
        for data in DATA:
            await cell.put(data)
        await main(cell, Verifying(cell))

    simulate(whole, nodes=nodes)


@pytest.mark.parametrize("deep", [False, True])
def test_a_healthy_cell_has_no_differences(deep: bool) -> None:
    async def main(cell: BlockCell, verifying: Verifying) -> None:
        report = await verifying.whole_pass(deep=deep)
        assert all_zero(report)
        assert report["blocks"] == report["blocks_total"] == len(DATA)
        assert report["unlooked_slots"] == 0
        assert cell.all_debts() == set()
        assert "pass ended" in verifying.events()

    on_full_cell(main)


def test_a_missing_fragment_is_found_and_becomes_a_debt() -> None:
    async def main(cell: BlockCell, verifying: Verifying) -> None:
        places = [await verifying.key_of(DATA[at], slot) for at, slot in ((0, 2), (3, 8), (9, 1))]
        for node, key in places:
            cell.stores[node].delete_group([key])
        report = await verifying.whole_pass()
        assert counts(report) == {"missing": 3}
        assert cell.all_debts() == {(key.volume, key.slot, key.block) for _, key in places}
        (owed,) = [
            debt
            for debt in cell.db.read_now(lambda c: read_debts(c, places[0][1].volume, 10))
            if debt.hash == places[0][1].block
        ]
        assert owed.reason is DebtReason.MISSING
        examples = report["differences"]["missing"]["examples"]
        assert {example["block"] for example in examples} == {str(key.block) for _, key in places}
        again = await verifying.whole_pass()
        assert all_zero(again), "what is owed is known: no difference"

    on_full_cell(main)


def test_fragments_outside_their_slot_are_misplaced_stale_or_orphans() -> None:
    async def main(cell: BlockCell, verifying: Verifying) -> None:
        stale_node, stale = await verifying.key_of(LARGE[0], 1)
        verifying.plant(
            await verifying.bystander(LARGE[0]), stale, verifying.record(stale_node, stale)
        )
        lost_node, lost = await verifying.key_of(LARGE[1], 4)
        verifying.plant(
            await verifying.bystander(LARGE[1]), lost, verifying.record(lost_node, lost)
        )
        cell.stores[lost_node].delete_group([lost])
        node, key = await verifying.key_of(SMALL[0], 0)
        record = verifying.record(node, key)
        unknown = name_of("nobody's")
        for volume in (key.volume, VolumeId(4_000)):
            verifying.plant(
                node,
                FragmentKey(volume, unknown, key.slot),
                orphan_record(record, unknown, volume),
            )
        report = await verifying.whole_pass()
        assert counts(report) == {"stale copy": 1, "misplaced": 1, "orphan": 2, "missing": 1}
        assert {str(row.kind) for row in verifying.strays()} == {
            "stale copy",
            "misplaced",
            "orphan",
        }
        first_seen = {row.place: row.first_seen for row in verifying.strays()}
        await cell.clock.sleep(1_000)
        report = await verifying.whole_pass()
        assert counts(report) == {"stale copy": 1, "misplaced": 1, "orphan": 2}
        assert {row.place: row.first_seen for row in verifying.strays()} == first_seen

    on_full_cell(main)


def test_a_stray_that_is_gone_is_forgotten() -> None:
    async def main(cell: BlockCell, verifying: Verifying) -> None:
        node, key = await verifying.key_of(LARGE[0], 1)
        other = await verifying.bystander(LARGE[0])
        verifying.plant(other, key, verifying.record(node, key))
        assert counts(await verifying.whole_pass()) == {"stale copy": 1}
        cell.stores[other].delete_group([key])
        assert all_zero(await verifying.whole_pass())
        assert verifying.strays() == []

    on_full_cell(main)


def test_wrong_bytes_are_found_by_a_deep_pass_only() -> None:
    async def main(cell: BlockCell, verifying: Verifying) -> None:
        node, key = await verifying.key_of(LARGE[2], 5)
        cell.stores[node]._disk.corrupt(key)
        assert all_zero(await verifying.whole_pass())
        assert counts(await verifying.whole_pass(deep=True)) == {"wrong bytes": 1}
        (debt,) = cell.db.read_now(lambda c: read_debts(c, key.volume, 10))
        assert (debt.slot, debt.reason) == (5, DebtReason.CORRUPT)

    on_full_cell(main)


def test_a_record_under_anothers_key_is_wrong_bytes() -> None:
    async def main(cell: BlockCell, verifying: Verifying) -> None:
        node, key = await verifying.key_of(SMALL[1], 2)
        other = next(
            found
            for found, _ in cell.stores[node].inventory(None, 1_000)[0]
            if found.block != key.block
        )
        verifying.plant(node, key, verifying.record(node, other))
        report = await verifying.whole_pass(deep=True)
        assert counts(report) == {"wrong bytes": 1}

    on_full_cell(main)


def test_a_fragment_of_another_seal_is_told_from_its_stripe() -> None:
    async def main(cell: BlockCell, verifying: Verifying) -> None:
        node, key = await verifying.key_of(LARGE[3], 7)
        verifying.plant(node, key, resealed(verifying.record(node, key)))
        assert all_zero(await verifying.whole_pass())
        assert counts(await verifying.whole_pass(deep=True)) == {"other stripe": 1}
        (debt,) = cell.db.read_now(lambda c: read_debts(c, key.volume, 10))
        assert (debt.slot, debt.reason) == (7, DebtReason.LYING)

    on_full_cell(main)


def test_a_fragment_of_another_length_is_found_without_reading_it() -> None:
    async def main(cell: BlockCell, verifying: Verifying) -> None:
        node, key = await verifying.key_of(LARGE[3], 0)
        verifying.plant(node, key, resealed(verifying.record(node, key), b"short" * 10))
        assert counts(await verifying.whole_pass()) == {"wrong length": 1}
        assert {slot for _, slot, _ in cell.all_debts()} == {0}

    on_full_cell(main)


def test_seals_that_are_even_are_reported_and_owe_nothing() -> None:
    async def main(cell: BlockCell, verifying: Verifying) -> None:
        for slot in (0, 1):
            node, key = await verifying.key_of(SMALL[2], slot)
            verifying.plant(node, key, resealed(verifying.record(node, key)))
        assert counts(await verifying.whole_pass(deep=True)) == {"unsettled": 1}
        assert cell.all_debts() == set()

    on_full_cell(main)


def test_a_node_that_does_not_answer_is_not_looked_at_and_misses_nothing() -> None:
    async def main(cell: BlockCell, verifying: Verifying) -> None:
        node, key = await verifying.key_of(LARGE[0], 0)
        cell.stores[node].delete_group([key])
        cell.faults[node].refuses = NodeUnavailable(f"{node}: connection refused")
        report = await verifying.whole_pass()
        assert all_zero(report)
        assert report["unlooked_slots"] > 0
        assert list(report["silent_nodes"]) == [node]
        assert cell.all_debts() == set()
        cell.heal()
        assert counts(await verifying.whole_pass()) == {"missing": 1}

    on_full_cell(main)


def test_a_disk_that_cannot_list_is_not_looked_at() -> None:
    async def main(cell: BlockCell, verifying: Verifying) -> None:
        node, _ = await verifying.key_of(LARGE[0], 0)
        cell.stores[node]._disk.unreadable = True
        report = await verifying.whole_pass()
        assert all_zero(report)
        assert list(report["silent_nodes"]) == [node]
        assert cell.all_debts() == set()

    on_full_cell(main)


def test_a_put_under_way_is_no_orphan_and_a_block_that_is_recorded_later_is_none() -> None:
    async def main(cell: BlockCell, verifying: Verifying) -> None:
        data = data_of(77)
        await cell.put(data)
        row = await cell.row_of(data)
        assert row is not None
        values = cell.take_row(row.hash)
        verifying.ask()
        while await verifying.service.step():
            pass
        assert verifying.report()["current"]["state"] == "settling"
        assert len(verifying.strays()) == 9, "seen, and kept back"
        cell.give_row(values)
        await cell.clock.sleep(120)
        assert await verifying.service.step()
        assert all_zero(verifying.report()["finished"])
        assert verifying.strays() == []

    on_full_cell(main)


def test_who_waits_for_a_pass_is_told_what_is_too_young_to_be_called_an_orphan() -> None:
    async def main(cell: BlockCell, verifying: Verifying) -> None:
        hurried = Verifying(cell, VerifierSettings())
        data = data_of(78)
        await cell.put(data)
        row = await cell.row_of(data)
        assert row is not None
        cell.take_row(row.hash)
        began = cell.clock.wall()
        assert counts(await hurried.whole_pass()) == {"too young to tell": 9}
        assert cell.clock.wall() - began < 15
        await cell.clock.sleep(VerifierSettings().settle_s)
        assert counts(await hurried.whole_pass()) == {"orphan": 9}

    on_full_cell(main)


def test_a_request_ends_the_waiting_of_the_pass_that_is_under_way() -> None:
    async def main(cell: BlockCell, verifying: Verifying) -> None:
        hurried = Verifying(cell, VerifierSettings())
        data = data_of(79)
        await cell.put(data)
        row = await cell.row_of(data)
        assert row is not None
        cell.take_row(row.hash)
        while await hurried.service.step():
            pass
        assert hurried.report()["current"]["state"] == "settling", "the pass that was due"
        began = cell.clock.wall()
        report = await hurried.whole_pass()
        assert (report["number"], report["request"]) == (2, 1)
        assert cell.clock.wall() - began < 15

    on_full_cell(main)


def test_what_changes_between_the_index_and_the_nodes_is_no_difference() -> None:
    """Puts, deletes and moves at every call that reaches a node."""

    async def main(cell: BlockCell, verifying: Verifying) -> None:
        todo = [
            lambda: cell.put(data_of(500)),
            lambda: cell.put(data_of(501, 900)),
            lambda: _remove(cell, LARGE[4]),
            lambda: _remove(cell, SMALL[4]),
            lambda: _move(cell, LARGE[5]),
        ]
        seen = 0
        for step in range(60):
            if len(cell.calls) > seen + 3 and todo:
                seen = len(cell.calls)
                await todo.pop(0)()
            if step == 0:
                verifying.ask()
            await verifying.service.step()
            await cell.clock.sleep(3.0)
        report = await verifying.whole_pass()
        assert set(counts(report)) <= {"stale copy"}, report
        assert cell.all_debts() == set()

    on_full_cell(main)


async def _remove(cell: BlockCell, data: bytes) -> None:
    cell.remove_block(hash_block(data))


async def _move(cell: BlockCell, data: bytes) -> None:
    row = await cell.row_of(data)
    assert row is not None
    nodes = await cell.slots_of(data)
    spare = next(node for node in cell.node_ids if node not in nodes)
    alone = [other for other in cell.all_rows() if other.volume == row.volume]
    for other in alone:
        if other.hash != row.hash:
            cell.remove_block(other.hash)
    await cell.move_slots(row.hash, {2: spare})


def test_a_pass_goes_on_after_a_restart_where_it_stood() -> None:
    async def main(cell: BlockCell, verifying: Verifying) -> None:
        node, key = await verifying.key_of(LARGE[0], 0)
        cell.stores[node].delete_group([key])
        verifying.ask()
        steps = 0
        while verifying.report()["finished"] is None:
            verifying.service = verifying.new_service()
            if not await verifying.service.step():
                await cell.clock.sleep(10.0)
            steps += 1
        report = verifying.report()["finished"]
        assert steps > 3, "several sections"
        assert counts(report) == {"missing": 1}
        assert report["blocks"] == len(DATA), "no section was looked at twice, none left out"
        assert report["number"] == 1

    on_full_cell(main)


def test_a_pass_is_due_once_a_period() -> None:
    async def main(cell: BlockCell, verifying: Verifying) -> None:
        while await verifying.service.step():
            pass
        assert verifying.report()["finished"]["number"] == 1, "the first is due at once"
        await cell.clock.sleep(VerifierSettings().period_s - 60)
        assert not await verifying.service.step()
        await cell.clock.sleep(60)
        assert await verifying.service.step()
        assert verifying.report()["current"]["number"] == 2

    on_full_cell(main)


def test_a_verifier_that_lost_its_role_writes_nothing() -> None:
    async def main(cell: BlockCell, verifying: Verifying) -> None:
        node, key = await verifying.key_of(LARGE[0], 0)
        cell.stores[node].delete_group([key])
        verifying.ask()
        await verifying.service.step()
        verifying.take_role("another")
        with pytest.raises(NotLeader):
            await verifying.service.run()
        assert cell.all_debts() == set()

    on_full_cell(main)
