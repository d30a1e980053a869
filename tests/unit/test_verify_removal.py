"""Removal of strays: what a plan holds, a dry run that changes nothing, reasons to keep."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from block_cell import BlockCell, data_of, simulate
from faulty_port import FaultyPort
from sqlalchemy import insert, select
from verifying import Verifying, counts, name_of, orphan_record, resealed

from cluster.debts import DebtReason, record_debts
from cluster.schema import slot_moves, volumes
from cluster.verify.removal import RemovalPlan
from cluster.verify.stray_rows import may_receive
from protocol.errors import NodeUnavailable, UnknownOutcome
from protocol.hashing import hash_block
from protocol.ids import NodeId
from storage_node.interface import FragmentKey

DAY_S = 24 * 3600.0
LARGE = [data_of(seed) for seed in range(3)]
SMALL = [data_of(100 + seed, 3_000) for seed in range(3)]


class Strays:
    """A cell with one stale copy and one orphan, old enough to be removed."""

    def __init__(self, cell: BlockCell, verifying: Verifying) -> None:
        self.cell = cell
        self.verifying = verifying

    async def plant(self) -> None:
        verifying = self.verifying
        holder, self.stale = await verifying.key_of(LARGE[0], 3)
        self.holder = holder
        self.stale_node = await verifying.bystander(LARGE[0])
        verifying.plant(self.stale_node, self.stale, verifying.record(holder, self.stale))
        node, key = await verifying.key_of(SMALL[0], 1)
        unknown = name_of("nobody's")
        self.orphan_node, self.orphan = node, FragmentKey(key.volume, unknown, 1)
        record = orphan_record(verifying.record(node, key), unknown)
        verifying.plant(node, self.orphan, record)
        for volume_id in self.cell.volumes_opened:
            self.cell.seal_volume(volume_id)

    async def age(self) -> None:
        assert counts(await self.verifying.whole_pass()) == {"stale copy": 1, "orphan": 1}
        await self.cell.clock.sleep(DAY_S + 1)

    def holds(self, node: NodeId, key: FragmentKey) -> bool:
        (answer,) = self.cell.stores[node].get_many([key])
        return answer.record is not None

    @property
    def both_are_there(self) -> bool:
        return self.holds(self.stale_node, self.stale) and self.holds(self.orphan_node, self.orphan)

    def epoch(self, key: FragmentKey) -> int:
        query = select(volumes.c.epoch).where(volumes.c.volume_id == int(key.volume))
        return int(self.cell.db.read_now(lambda c: c.execute(query).scalar_one()))


def on_cell(
    main: Callable[[Strays], Awaitable[None]],
    *,
    before: Callable[[Strays], Awaitable[None]] | None = None,
) -> None:
    async def whole(cell: BlockCell) -> None:
        for data in LARGE + SMALL:
            await cell.put(data)
        strays = Strays(cell, Verifying(cell))
        await strays.plant()
        if before is not None:
            await before(strays)
        await strays.age()
        await main(strays)

    simulate(whole, nodes=11)


async def planned(strays: Strays) -> RemovalPlan:
    return await strays.verifying.remover().plan()


def test_strays_past_the_grace_period_are_removed_and_nothing_else() -> None:
    async def main(strays: Strays) -> None:
        before = sum(len(store._disk.entries) for store in strays.cell.stores.values())
        strays.verifying.ask(remove=True)
        assert await strays.verifying.service.step()
        removal = strays.verifying.report()["removal"]
        assert removal["planned"] == {"orphan": 1, "stale copy": 1}
        assert removal["removed"] == 2
        assert not strays.holds(strays.stale_node, strays.stale)
        assert not strays.holds(strays.orphan_node, strays.orphan)
        after = sum(len(store._disk.entries) for store in strays.cell.stores.values())
        assert after == before - 2
        assert strays.verifying.strays() == []
        assert "strays removed" in strays.verifying.events()
        for data in LARGE + SMALL:
            assert await strays.cell.get(data) == data

    on_cell(main)


def test_younger_strays_are_left_alone() -> None:
    async def whole(cell: BlockCell) -> None:
        for data in LARGE + SMALL:
            await cell.put(data)
        strays = Strays(cell, Verifying(cell))
        await strays.plant()
        await strays.verifying.whole_pass()
        await cell.clock.sleep(DAY_S - 200)
        assert (await planned(strays)).removals == ()

    simulate(whole, nodes=11)


def test_a_dry_run_issues_no_mutating_call(monkeypatch: Any) -> None:
    async def spy(self: FaultyPort, *_args: object) -> Any:
        raise AssertionError(f"a dry run wrote to {self.node_id}")

    async def main(strays: Strays) -> None:
        monkeypatch.setattr(FaultyPort, "delete", spy)
        monkeypatch.setattr(FaultyPort, "put", spy)
        epochs = strays.epoch(strays.orphan)
        strays.verifying.ask(remove=True, dry_run=True)
        assert await strays.verifying.service.step()
        removal = strays.verifying.report()["removal"]
        assert removal["planned"] == {"orphan": 1, "stale copy": 1}
        assert "removed" not in removal
        assert strays.both_are_there
        assert strays.epoch(strays.orphan) == epochs
        assert [row.removing for row in strays.verifying.strays()] == [None, None]

    on_cell(main)


def test_a_copy_whose_slot_lacks_a_good_one_is_kept() -> None:
    async def main(strays: Strays) -> None:
        strays.cell.stores[strays.holder]._disk.corrupt(strays.stale)
        plan = await planned(strays)
        assert [removal.stray.key for removal in plan.removals] == [strays.orphan]
        assert dict(plan.kept) == {"its slot lacks a good one": 1}

    on_cell(main)


def test_a_copy_whose_slot_is_owed_is_kept() -> None:
    async def main(strays: Strays) -> None:
        from cluster.block_sql import Debt

        key = strays.stale
        debt = Debt(key.volume, key.slot, key.block)
        strays.cell.db.transact(lambda c: record_debts(c, [debt], 1.0, DebtReason.LYING))
        plan = await planned(strays)
        assert dict(plan.kept) == {"its slot is owed a good one": 1}

    on_cell(main)


def test_a_copy_of_another_seal_is_kept() -> None:
    async def other_seal(strays: Strays) -> None:
        record = strays.verifying.record(strays.stale_node, strays.stale)
        strays.verifying.plant(strays.stale_node, strays.stale, resealed(record))

    async def main(strays: Strays) -> None:
        plan = await planned(strays)
        assert dict(plan.kept) == {"it is of another seal than its slot's own": 1}

    on_cell(main, before=other_seal)


def test_a_copy_is_kept_while_a_node_does_not_answer() -> None:
    async def main(strays: Strays) -> None:
        strays.cell.faults[strays.holder].refuses = NodeUnavailable("gone")
        plan = await planned(strays)
        assert dict(plan.kept) == {"a node did not answer": 1}

    on_cell(main)


def test_strays_of_a_volume_with_a_move_are_kept() -> None:
    async def main(strays: Strays) -> None:
        for key in (strays.stale, strays.orphan):
            values = {
                "volume_id": int(key.volume),
                "slot": 0,
                "target": "node-11",
                "epoch": 2,
                "reason": "drain",
                "begun": 0.0,
            }
            strays.cell.db.transact(
                lambda c, values=values: c.execute(insert(slot_moves), values)  # type: ignore[misc]
            )
        plan = await planned(strays)
        assert plan.removals == ()
        assert dict(plan.kept) == {"a move is under way in its volume": 2}

    on_cell(main)


def test_an_orphan_of_an_open_volume_is_kept() -> None:
    async def main(strays: Strays) -> None:
        strays.cell.db.transact(lambda c: c.execute(volumes.update().values(state="open")))
        plan = await planned(strays)
        assert dict(plan.kept) == {"its volume still takes puts": 1}

    on_cell(main)


def test_what_changed_after_the_plan_was_made_is_not_removed() -> None:
    async def main(strays: Strays) -> None:
        plan = await planned(strays)
        assert len(plan.removals) == 2
        row = await strays.cell.row_of(SMALL[0])
        assert row is not None
        values = strays.cell.take_row(hash_block(SMALL[0]))
        strays.cell.give_row({**values, "hash": bytes(strays.orphan.block)})
        await strays.cell.start_node(strays.holder)
        outcome = await strays.verifying.remover().execute(plan)
        assert (outcome.removed, outcome.skipped) == (0, 2)
        assert strays.both_are_there

    on_cell(main)


def test_a_node_that_registered_again_is_not_deleted_from() -> None:
    async def main(strays: Strays) -> None:
        remover = strays.verifying.remover()
        plan = await remover.plan()
        await strays.cell.start_node(strays.stale_node)
        await strays.cell.start_node(strays.orphan_node)
        outcome = await remover.execute(plan)
        assert outcome.removed == 0
        assert outcome.failed == 2
        assert strays.both_are_there
        assert [row.removing for row in strays.verifying.strays()] == [None, None]

    on_cell(main)


def test_removing_an_orphan_fences_puts_that_are_under_way() -> None:
    async def main(strays: Strays) -> None:
        before = strays.epoch(strays.orphan)
        remover = strays.verifying.remover()
        outcome = await remover.execute(await remover.plan())
        assert outcome.removed == 2
        assert strays.epoch(strays.orphan) == before + 1
        assert strays.cell.db.read_now(
            lambda c: may_receive(
                c, strays.orphan_node, strays.orphan.volume, strays.orphan.slot, 0.0
            )
        )

    on_cell(main)


def test_a_delete_without_an_answer_stays_marked_so_that_no_move_begins_there(
    monkeypatch: Any,
) -> None:
    async def no_answer(self: FaultyPort, *_args: object) -> Any:
        raise UnknownOutcome(f"{self.node_id}: no answer")

    async def main(strays: Strays) -> None:
        remover = strays.verifying.remover()
        plan = await remover.plan()
        monkeypatch.setattr(FaultyPort, "delete", no_answer)
        outcome = await remover.execute(plan)
        assert outcome.unknown == 2
        key, node, now = strays.stale, strays.stale_node, strays.cell.clock.wall()

        def free(fade_after: float) -> bool:
            return strays.cell.db.read_now(
                lambda c: may_receive(c, node, key.volume, key.slot, fade_after)
            )

        assert not free(now - 30)
        assert free(now + 1), "after a while it was carried out or lost"

    on_cell(main)
