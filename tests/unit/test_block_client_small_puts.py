"""Small blocks put one by one at the same time: shared frames, and each its own answer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from block_cell import OWNER, REPLICA, BlockCell, data_of, simulate

from cluster.block_client import GROUPED_BYTES_MAX, PUT_LANES, PUT_LATE_S
from cluster.block_client_settings import PutResult
from protocol.errors import NotEnoughNodes
from protocol.hashing import hash_block
from protocol.messages import ItemStatus


def small(*numbers: int) -> list[bytes]:
    return [data_of(number, 1_000) for number in numbers]


def start(cell: BlockCell, blocks: Sequence[bytes], owner: int = OWNER) -> list[asyncio.Task[Any]]:
    return [asyncio.ensure_future(cell.put(block, owner)) for block in blocks]


def test_puts_of_one_moment_are_one_frame_to_each_node() -> None:
    async def main(cell: BlockCell) -> None:
        blocks = small(*range(40))
        results = await asyncio.gather(*start(cell, blocks))
        assert all(result == PutResult(True, result.stored_bytes, False) for result in results)
        assert len(cell.calls) == REPLICA.n
        for block in blocks:
            assert await cell.get(block) == block
            assert await cell.slots_held(block) == list(range(REPLICA.n))

    simulate(main)


def test_larger_blocks_are_put_alone() -> None:
    async def main(cell: BlockCell) -> None:
        blocks = [data_of(number, GROUPED_BYTES_MAX + 1) for number in range(3)]
        await asyncio.gather(*start(cell, blocks))
        assert len(cell.calls) == 3 * REPLICA.n

    simulate(main)


def test_each_owner_of_a_shared_group_gets_the_claims_to_its_own_blocks() -> None:
    async def main(cell: BlockCell) -> None:
        mine, theirs, both = small(1, 2, 3)
        results = await asyncio.gather(
            *start(cell, [mine, both], 1), *start(cell, [theirs, both], 2)
        )
        assert len(cell.calls) == REPLICA.n
        assert sorted(result.new for result in results) == [False, True, True, True]
        hashes = [hash_block(block) for block in (mine, theirs, both)]
        assert await cell.index.claimed(1, hashes) == {hashes[0], hashes[2]}
        assert await cell.index.claimed(2, hashes) == {hashes[1], hashes[2]}

    simulate(main)


def test_a_block_that_its_volume_refuses_does_not_delay_the_others_of_its_group() -> None:
    async def main(cell: BlockCell) -> None:
        blocks = small(*range(20))
        cell.open_volume(REPLICA, cell.node_ids[:4])
        cell.faults[cell.node_ids[2]].put_statuses = {hash_block(blocks[7]): ItemStatus.IO_ERROR}
        tasks = start(cell, blocks)
        await asyncio.sleep(0.5)
        assert [number for number, task in enumerate(tasks) if not task.done()] == [7]
        second = cell.open_volume(REPLICA, cell.node_ids[4:8])
        await asyncio.gather(*tasks)
        row = await cell.row_of(blocks[7])
        assert row is not None
        assert row.volume == second

    simulate(main, nodes=8, volumes=0)


def test_a_stopped_node_holds_up_only_what_is_written_to_it() -> None:
    async def main(cell: BlockCell) -> None:
        cell.open_volume(REPLICA, cell.node_ids[:4])
        await asyncio.gather(*start(cell, small(0)))  # a connection, and the map, are there
        cell.faults[cell.node_ids[1]].is_stopped = True
        stuck: list[asyncio.Task[Any]] = []
        for number in range(PUT_LANES + 1):
            stuck += start(cell, small(10 + number))
            await asyncio.sleep(0.01)
        cell.seal_volume(cell.volumes_opened[0])
        cell.open_volume(REPLICA, cell.node_ids[4:8])
        await cell.map.refresh()
        await asyncio.sleep(cell.settings.map_age_s)
        started = asyncio.get_running_loop().time()
        await asyncio.gather(*start(cell, small(*range(20, 30))))
        assert asyncio.get_running_loop().time() - started <= 2 * PUT_LATE_S
        assert not stuck[0].done()
        results = await asyncio.gather(*stuck)
        assert all(result.new for result in results)

    simulate(main, nodes=8, volumes=0)


def test_a_caller_that_leaves_a_group_leaves_the_others_their_answers() -> None:
    async def main(cell: BlockCell) -> None:
        for faults in cell.faults.values():
            faults.delay_s = lambda: 1.0
        blocks = small(1, 2, 3)
        tasks = start(cell, blocks)
        await asyncio.sleep(0.5)
        tasks[1].cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(result, PutResult) for result in results] == [True, False, True]
        again = await cell.put(blocks[1])
        assert not again.new, "its group wrote it all the same"

    simulate(main)


def test_a_group_that_everybody_leaves_ends_and_its_blocks_can_be_put_again() -> None:
    async def main(cell: BlockCell) -> None:
        for faults in cell.faults.values():
            faults.delay_s = lambda: 1.0
        blocks = small(1, 2, 3)
        tasks = start(cell, blocks)
        await asyncio.sleep(0.5)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert await cell.index.lookup([hash_block(block) for block in blocks]) == {}
        assert all(result.new for result in await asyncio.gather(*start(cell, blocks)))

    simulate(main)


def test_what_no_volume_takes_fails_for_each_caller_with_an_error_of_its_own() -> None:
    async def main(cell: BlockCell) -> None:
        cell.kill(*cell.node_ids)
        tasks = start(cell, small(1, 2, 3))
        errors = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(error) for error in errors] == [NotEnoughNodes] * 3
        assert len({id(error) for error in errors}) == 3

    simulate(main)


@pytest.mark.parametrize("seed", range(10))
def test_puts_and_batches_of_the_same_blocks_agree_on_who_was_first(seed: int) -> None:
    async def main(cell: BlockCell) -> None:
        for faults in cell.faults.values():
            faults.delay_s = lambda: cell.rng.random() / 50
        blocks = small(*range(12))
        named = [(hash_block(block), block) for block in blocks]

        async def later(awaitable: Any) -> Any:
            await asyncio.sleep(cell.rng.random() / 20)
            return await awaitable

        singles = [later(cell.put(block, owner)) for block in blocks for owner in (1, 2)]
        batches = [later(cell.client.put_many(owner, named)) for owner in (3, 4)]
        results = await asyncio.gather(*singles, *batches)
        flat = [*results[:24], *results[24], *results[25]]
        assert sum(result.new for result in flat) == len(blocks)
        for owner in (1, 2, 3, 4):
            hashes = [name for name, _ in named]
            assert await cell.index.claimed(owner, hashes) == set(hashes)

    simulate(main, seed=seed)
