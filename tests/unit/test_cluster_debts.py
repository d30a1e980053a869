"""Debts: idempotent, of live blocks only, repaid only under the epoch they were verified in."""

from __future__ import annotations

from pathlib import Path

import pytest
from cell_rows import (
    RS,
    START,
    HandClock,
    Rows,
    block_named,
    empty_database,
    new_block,
    new_cell,
    node_ids,
)
from sqlalchemy import text

from cluster.block_index import BlockIndex, RecordOutcome
from cluster.block_sql import Debt
from cluster.debts import (
    DebtReason,
    OwedFragment,
    VolumeDebts,
    read_debts,
    read_volume_debts,
    record_debts,
    repay_debts,
)
from cluster.topology import VolumeView
from sql.database import Database


class Cell:
    """A cell with two blocks; the second was put without slot 8."""

    def __init__(self, db: Database, volume: VolumeView) -> None:
        self.db = db
        self.volume = volume

    def owe(self, name: object, slot: int) -> Debt:
        return Debt(self.volume.volume_id, slot, block_named(name))

    def record(self, *rows: Debt, since: float, reason: DebtReason) -> None:
        self.db.transact(lambda c: record_debts(c, rows, since, reason))

    def debts(self) -> list[OwedFragment]:
        return self.db.read_now(lambda c: read_debts(c, self.volume.volume_id, 100))


@pytest.fixture
async def cell(tmp_path: Path) -> Cell:
    db, clock = empty_database(tmp_path), HandClock()
    new_cell(db, clock)
    rows = Rows(db)
    rows.register_all()
    volume = rows.open_volume(RS, node_ids(9))
    index = BlockIndex(db, clock)
    outcomes = await index.record_puts(
        [new_block("a", volume), new_block("b", volume, missing=(8,))]
    )
    assert outcomes == [RecordOutcome.NEW, RecordOutcome.NEW]
    return Cell(db, volume)


def test_a_debt_of_a_put_is_called_not_written(cell: Cell) -> None:
    (owed,) = cell.debts()
    assert (owed.hash, owed.slot, owed.reason) == (block_named("b"), 8, DebtReason.NOT_WRITTEN)


def test_a_debt_that_is_found_again_keeps_its_age_and_reason(cell: Cell) -> None:
    cell.record(cell.owe("b", 8), since=START + 60, reason=DebtReason.MISSING)
    (owed,) = cell.debts()
    assert (owed.since, owed.reason) == (START, DebtReason.NOT_WRITTEN)


def test_a_lie_is_remembered_over_what_was_known_before(cell: Cell) -> None:
    cell.record(cell.owe("b", 8), since=START + 60, reason=DebtReason.LYING)
    cell.record(cell.owe("b", 8), since=START + 90, reason=DebtReason.CORRUPT)
    (owed,) = cell.debts()
    assert (owed.since, owed.reason) == (START, DebtReason.LYING)


def test_only_live_blocks_of_the_volume_can_owe(cell: Cell) -> None:
    other = Debt(type(cell.volume.volume_id)(99), 1, block_named("a"))
    cell.record(cell.owe("nobody", 1), other, since=START, reason=DebtReason.CORRUPT)
    assert len(cell.debts()) == 1


def test_debts_are_counted_by_volume_and_slot(cell: Cell) -> None:
    cell.record(cell.owe("a", 8), cell.owe("a", 2), since=START + 5, reason=DebtReason.MISSING)
    volume = cell.volume.volume_id
    assert cell.db.read_now(read_volume_debts) == [
        VolumeDebts(volume, 2, 1, START + 5),
        VolumeDebts(volume, 8, 2, START),
    ]


def test_a_debt_is_repaid_under_the_volumes_epoch_only(cell: Cell) -> None:
    volume, owed = cell.volume, cell.owe("b", 8)
    cell.db.transact(lambda c: repay_debts(c, [owed], {volume.volume_id: volume.epoch + 1}))
    assert len(cell.debts()) == 1
    cell.db.transact(lambda c: repay_debts(c, [owed], {volume.volume_id: volume.epoch}))
    assert cell.debts() == []


def test_the_reasons_in_the_schema_are_those_of_the_enum(cell: Cell) -> None:
    found = cell.db.read_now(lambda c: c.execute(text("SELECT reason FROM debts")).scalars().all())
    assert [DebtReason(reason) for reason in found] == [DebtReason.NOT_WRITTEN]
