"""Repair that fails again and again raises an alarm, and one pass that goes well clears it."""

from __future__ import annotations

import pytest
from block_cell import BlockCell, data_of, simulate
from repair_cell import new_repair

from cluster.alarms import FAILURES_MIN, AlarmKind
from cluster.repair.service import RepairService
from cluster.status import status_of
from protocol.errors import DatabaseBusy


def said(cell: BlockCell) -> list[str]:
    """Texts of the alarm."""
    status = cell.db.read_now(lambda c: status_of(c, cell.clock.wall()))
    return [a.text for a in status.alarms if a.kind is AlarmKind.REPAIR_FAILING]


async def run_until_it_ends(cell: BlockCell) -> RepairService:
    """A service of a process of its own, whose passes go wrong in a way that nobody foresaw."""
    service = new_repair(cell)

    async def broken() -> bool:
        raise ZeroDivisionError("a mistake of ours")

    service.step = broken  # type: ignore[method-assign]
    with pytest.raises(ExceptionGroup):
        await service.run()
    return service


def test_failures_are_counted_over_restarts_and_cleared_by_one_pass_that_goes_well() -> None:
    async def main(cell: BlockCell) -> None:
        await cell.put(data_of(1))
        for _ in range(FAILURES_MIN - 1):
            await run_until_it_ends(cell)
        assert said(cell) == []
        await run_until_it_ends(cell)
        (text,) = said(cell)
        assert f"failed {FAILURES_MIN} times in a row" in text
        assert "a mistake of ours" in text
        service = new_repair(cell)
        await service.start()
        assert said(cell), "a start alone is no success"
        await service._noted_step()
        assert said(cell) == []
        await service._pool.aclose()

    simulate(main, nodes=9)


def test_passes_that_are_tried_again_by_the_same_process_count_too() -> None:
    async def main(cell: BlockCell) -> None:
        service = new_repair(cell)
        await service.start()

        async def busy() -> bool:
            raise DatabaseBusy("the database is locked")

        whole = service.step
        service.step = busy  # type: ignore[method-assign]
        for _ in range(FAILURES_MIN):
            assert await service._try(service._noted_step) is None
        assert "the database is locked" in said(cell)[0]
        service.step = whole  # type: ignore[method-assign]
        await service._try(service._noted_step)
        assert said(cell) == []
        await service._pool.aclose()

    simulate(main, nodes=9)
