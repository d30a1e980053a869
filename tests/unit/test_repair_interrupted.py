"""Repair killed at every one of its steps: the next life goes on, and nothing gets worse."""

from __future__ import annotations

import asyncio
import gc
from typing import cast

from block_cell import BlockCell, data_of, simulate
from repair_cell import assert_whole, good_slots, lose, moves, new_repair, volumes_of

from chaos.sim.loop import SimLoop
from chaos.sim.process import ProcessDied, SimProcess
from cluster.repair.service import RepairService
from protocol.ids import NodeId

LIVES_MAX = 400


async def _one_life(cell: BlockCell, steps: int) -> bool:
    """A repair process that dies after so many scheduling points; True if it came to rest first."""
    loop = cast(SimLoop, asyncio.get_running_loop())
    process = SimProcess(loop, "repair")
    service = process.run(new_repair, cell, steps)
    process.light_fuse(steps, process.kill)
    try:
        return await process.ask(_work(service), "work")
    except ProcessDied:
        return False
    finally:
        process.kill()


async def _work(service: RepairService) -> bool:
    await service.start()
    while await service.step():
        pass
    await service._pool.aclose()
    return not service.counters.left_volumes


def _assert_no_worse(cell: BlockCell, floors: dict[bytes, int]) -> None:
    """No block has fewer good fragments, where the map says, than it had."""
    for row in cell.all_rows():
        good = len(good_slots(cell, row))
        assert good >= floors.get(row.hash, 0), f"block {row.hash}"
        floors[row.hash] = good


def _most_used(cell: BlockCell, gone: set[NodeId]) -> NodeId:
    volumes = volumes_of(cell, cell.all_rows()).values()
    left = [node for node in cell.node_ids if node not in gone]
    return max(left, key=lambda node: sum(node in volume.slots for volume in volumes))


def test_a_repair_that_is_killed_at_every_step_goes_on_where_it_was() -> None:
    async def main(cell: BlockCell) -> None:
        for seed in range(6):
            await cell.put(data_of(seed, 140_000))
            await cell.put(data_of(50 + seed, 2_000))
        gone: set[NodeId] = set()
        lives = 0
        for first, stride in ((1, 1), (60, 7)):
            victim = _most_used(cell, gone)
            gone.add(victim)
            lose(cell, victim)
            cell.stores[victim].delete_group(
                [key for key, _ in cell.stores[victim].inventory(None, 10_000)[0]]
            )
            floors: dict[bytes, int] = {}
            _assert_no_worse(cell, floors)
            steps = first
            while not await _one_life(cell, steps):
                _assert_no_worse(cell, floors)
                steps += stride
                lives += 1
                assert lives < LIVES_MAX, f"repair gets nowhere in {steps} steps: {moves(cell)}"
            assert_whole(cell)
        assert lives > 30, "it was hardly ever killed"

    simulate(main, nodes=13, volumes=1)
    gc.collect()  # what the dead were doing ends here, and not in the middle of somebody's import
