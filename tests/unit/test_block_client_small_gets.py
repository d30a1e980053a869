"""Small blocks got one by one at the same time: shared frames, and each its own answer."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from block_cell import BlockCell, data_of, simulate

from cluster.shared_reads import FRAME_READS_MAX, SHARED_RECORD_BYTES_MAX
from protocol.errors import BlockNotFound
from protocol.hashing import hash_block
from protocol.ids import BlockHash, NodeId
from storage_node.interface import FragmentKey


def small(*numbers: int) -> list[bytes]:
    return [data_of(number, 1_000) for number in numbers]


async def store(cell: BlockCell, blocks: list[bytes]) -> None:
    await asyncio.gather(*(cell.put(block) for block in blocks))
    cell.calls.clear()


def test_gets_of_one_moment_from_one_volume_are_one_frame_to_one_node() -> None:
    async def main(cell: BlockCell) -> None:
        blocks = small(*range(40))
        await store(cell, blocks)  # one group, one volume
        assert await asyncio.gather(*map(cell.get, blocks)) == blocks
        assert len(cell.calls) == 1

    simulate(main)


def test_a_frame_is_bounded_however_many_ask() -> None:
    async def main(cell: BlockCell) -> None:
        blocks = small(*range(3 * FRAME_READS_MAX))
        await store(cell, blocks)
        assert await asyncio.gather(*map(cell.get, blocks)) == blocks
        assert len(cell.calls) >= 3

    simulate(main)


def test_moments_choose_their_replicas_anew() -> None:
    async def main(cell: BlockCell) -> None:
        (block,) = small(1)
        await store(cell, [block])
        for _ in range(200):
            assert await cell.get(block) == block
        asked = Counter(cell.calls)
        assert len(asked) == 4
        assert min(asked.values()) > 20

    simulate(main)


def test_larger_records_are_asked_for_alone() -> None:
    async def main(cell: BlockCell) -> None:
        blocks = [data_of(number, SHARED_RECORD_BYTES_MAX + 1) for number in range(3)]
        await asyncio.gather(*(cell.put(block) for block in blocks))
        cell.calls.clear()
        assert await asyncio.gather(*map(cell.get, blocks)) == blocks
        assert len(cell.calls) == 3

    simulate(main)


def test_a_bad_record_costs_its_own_block_one_more_read_and_no_other() -> None:
    async def main(cell: BlockCell) -> None:
        blocks = small(*range(10))
        await store(cell, blocks)
        bad = hash_block(blocks[3])
        assert await cell.get(blocks[3]) == blocks[3]
        (first,) = cell.calls
        await spoil_everywhere_but_one(cell, bad)
        cell.calls.clear()
        assert await asyncio.gather(*map(cell.get, blocks)) == blocks
        others = [call for call in cell.calls if call.startswith("get")]
        assert 1 <= len(others) <= 4, (first, others)
        assert {problem.block for problem in cell.problems} <= {bad}

    simulate(main)


async def spoil_everywhere_but_one(cell: BlockCell, block: BlockHash) -> None:
    """One replica of the four is left."""
    rows = await cell.index.lookup([block])
    await cell.map.refresh()
    volume = await cell.map.volume(rows[block].volume)
    for slot, node_id in list(enumerate(volume.slots))[1:]:
        assert node_id is not None
        cell.stores[node_id].delete_group([FragmentKey(volume.volume_id, block, slot)])


def test_a_node_that_does_not_answer_costs_each_get_a_hedge_or_a_deadline_and_no_answer() -> None:
    async def main(cell: BlockCell) -> None:
        blocks = small(*range(20))
        await store(cell, blocks)
        await cell.get(blocks[0])
        node_id = NodeId(cell.calls[-1].split()[1])
        cell.faults[node_id].is_stopped = True
        for _ in range(5):
            assert await asyncio.gather(*map(cell.get, blocks)) == blocks

    simulate(main)


def test_a_get_that_is_given_up_leaves_the_others_their_answers() -> None:
    async def main(cell: BlockCell) -> None:
        blocks = small(*range(8))
        await store(cell, blocks)
        for faults in cell.faults.values():
            faults.delay_s = lambda: 0.005
        gets = [asyncio.ensure_future(cell.get(block)) for block in blocks]
        await asyncio.sleep(0.001)
        gets[0].cancel()
        results = await asyncio.gather(*gets, return_exceptions=True)
        assert isinstance(results[0], asyncio.CancelledError)
        assert results[1:] == blocks[1:]

    simulate(main)


def test_an_unknown_block_is_not_found_beside_known_ones() -> None:
    async def main(cell: BlockCell) -> None:
        blocks = small(1, 2, 3)
        await store(cell, blocks[:2])
        results = await asyncio.gather(*map(cell.get, blocks), return_exceptions=True)
        assert results[:2] == blocks[:2]
        assert isinstance(results[2], BlockNotFound)
        with pytest.raises(BlockNotFound):
            await cell.get(blocks[2])

    simulate(main)
