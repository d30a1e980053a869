"""What nodes' scrubs set aside becomes a debt, once, and only where it belongs."""

from __future__ import annotations

from block_cell import BlockCell, data_of, simulate
from verifying import Verifying

from cluster.debts import DebtReason, read_debts
from cluster.verify.findings_collector import FindingsCollector
from protocol.errors import NodeUnavailable

DATA = [data_of(seed) for seed in range(3)]


async def prepared(cell: BlockCell) -> tuple[Verifying, FindingsCollector]:
    for data in DATA:
        await cell.put(data)
    verifying = Verifying(cell)
    collector = FindingsCollector(
        cell.db, cell.clock, cell._connect, lambda: verifying.epoch, verifying.settings
    )
    return verifying, collector


def test_a_fragment_that_a_scrub_set_aside_becomes_a_debt_once() -> None:
    async def main(cell: BlockCell) -> None:
        verifying, collector = await prepared(cell)
        node, key = await verifying.key_of(DATA[0], 4)
        cell.stores[node]._disk.corrupt(key)
        assert await collector.step() == 0, "nobody has read it yet"
        cell.stores[node].set_aside([key], cell.clock.wall())
        assert await collector.step() == 1
        (debt,) = cell.db.read_now(lambda c: read_debts(c, key.volume, 10))
        assert (debt.slot, debt.hash, debt.reason) == (4, key.block, DebtReason.CORRUPT)
        await cell.clock.sleep(60)
        assert await collector.step() == 0
        assert "debt found" in verifying.events()

    simulate(main, nodes=10)


def test_findings_of_strays_and_of_silent_nodes_are_no_debts() -> None:
    async def main(cell: BlockCell) -> None:
        verifying, collector = await prepared(cell)
        holder, key = await verifying.key_of(DATA[0], 0)
        other = await verifying.bystander(DATA[0])
        verifying.plant(other, key, verifying.record(holder, key))
        cell.stores[other]._disk.corrupt(key)
        cell.stores[other].set_aside([key], cell.clock.wall())
        node, silent = await verifying.key_of(DATA[1], 2)
        cell.stores[node]._disk.corrupt(silent)
        cell.stores[node].set_aside([silent], cell.clock.wall())
        cell.faults[node].refuses = NodeUnavailable("gone")
        assert await collector.step() == 0
        cell.heal()
        assert await collector.step() == 1
        assert {slot for _, slot, _ in cell.all_debts()} == {2}

    simulate(main, nodes=10)
