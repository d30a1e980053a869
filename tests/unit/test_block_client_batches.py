"""Many blocks at once: one frame for each node, and each block its own answer."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest
from bad_records import flip, lie
from block_cell import OWNER, REPLICA, BlockCell, data_of, simulate

from cluster.block_client_settings import PutResult
from protocol.errors import (
    BlockNotFound,
    BlockUnreadable,
)
from protocol.hashing import hash_block
from protocol.ids import BlockHash
from protocol.messages import ItemStatus


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


async def put_all(cell: BlockCell, blocks: list[bytes]) -> None:
    await cell.client.put_many(OWNER, [(hash_block(block), block) for block in blocks])
    cell.calls.clear()


async def get_all(cell: BlockCell, blocks: list[bytes]) -> list[Any]:
    found = await cell.client.get_many([hash_block(block) for block in blocks])
    return [item if isinstance(item, Exception) else bytes(item) for item in found]


def test_many_blocks_are_one_frame_from_each_node() -> None:
    async def main(cell: BlockCell) -> None:
        small = [data_of(number, 1_000) for number in range(200)]
        large = [data_of(number, 140_000) for number in range(10)]
        await put_all(cell, small + large)
        assert await get_all(cell, large + small) == large + small
        assert len(cell.calls) == len(set(cell.calls)) <= 9

    simulate(main, volumes=1)


def test_repeated_and_unknown_blocks_of_a_batch_each_get_their_answer() -> None:
    async def main(cell: BlockCell) -> None:
        blocks = [data_of(number, 1_000) for number in range(3)]
        await put_all(cell, blocks)
        answers = await get_all(cell, [blocks[2], b"unknown", blocks[0], blocks[2]])
        assert [answers[0], answers[2], answers[3]] == [blocks[2], blocks[0], blocks[2]]
        assert isinstance(answers[1], BlockNotFound)

    simulate(main)


@pytest.mark.parametrize("dead", [1, 2, 3])
def test_a_batch_survives_dead_nodes(dead: int) -> None:
    async def main(cell: BlockCell) -> None:
        blocks = [data_of(number, 900 if number % 10 else 150_000) for number in range(100)]
        await put_all(cell, blocks)
        cell.kill(*cell.rng.sample(cell.node_ids, dead))
        assert await get_all(cell, blocks) == blocks

    simulate(main)


def test_a_batch_gives_what_it_can_and_an_error_for_the_rest() -> None:
    async def main(cell: BlockCell) -> None:
        cell.open_volume(REPLICA, cell.node_ids[:4])
        lost = [data_of(number, 1_000) for number in range(5)]
        await put_all(cell, lost)
        cell.seal_volume(cell.volumes_opened[-1])
        cell.open_volume(REPLICA, cell.node_ids[4:8])
        await asyncio.sleep(2 * cell.settings.map_age_s)
        good = [data_of(number, 1_000) for number in range(5, 10)]
        await put_all(cell, good)
        cell.kill(*cell.node_ids[:4])
        answers = await get_all(cell, lost + good)
        assert answers[5:] == good
        assert [type(answer) for answer in answers[:5]] == [BlockUnreadable] * 5

    simulate(main, nodes=8, volumes=0)


@pytest.mark.parametrize("tamper", [lie, flip(0.5)], ids=["lie", "flip"])
def test_a_batch_with_bad_fragments_is_read_around_them_and_reports_them(
    tamper: Callable[[bytes], bytes],
) -> None:
    async def main(cell: BlockCell) -> None:
        blocks = [data_of(number, 900 if number % 4 else 150_000) for number in range(40)]
        await put_all(cell, blocks)
        bad = cell.node_ids[0]
        cell.faults[bad].tamper = tamper
        for _ in range(3):
            assert await get_all(cell, blocks) == blocks
        assert {problem.node_id for problem in cell.problems} == {bad}

    simulate(main)


def test_a_slow_node_does_not_hold_a_batch_up() -> None:
    async def main(cell: BlockCell) -> None:
        blocks = [data_of(number, 900 if number % 10 else 150_000) for number in range(100)]
        await put_all(cell, blocks)
        cell.faults[cell.node_ids[5]].delay_s = lambda: 4.0
        started = cell.clock.monotonic()
        assert await get_all(cell, blocks) == blocks
        assert cell.clock.monotonic() - started < 1.5

    simulate(main)


def test_lengths_of_known_blocks_without_reading_them() -> None:
    async def main(cell: BlockCell) -> None:
        blocks = [data_of(number, 1_000 + number) for number in range(3)]
        await put_all(cell, blocks)
        hashes = [hash_block(block) for block in blocks]
        lengths = await cell.client.lengths([*hashes, hash_block(b"unknown")])
        assert lengths == dict(zip(hashes, (1_000, 1_001, 1_002), strict=True))
        assert cell.calls == []

    simulate(main)


def test_one_seed_gives_one_history() -> None:
    def history() -> list[str]:
        calls: list[str] = []

        async def main(cell: BlockCell) -> None:
            for faults in cell.faults.values():
                faults.delay_s = lambda: cell.rng.expovariate(20)
            blocks = [data_of(number, 900 if number % 2 else 150_000) for number in range(12)]
            await asyncio.gather(*(cell.put(block) for block in blocks))
            cell.kill(cell.node_ids[1])
            await asyncio.gather(*(cell.get(block) for block in blocks))
            await cell.client.get_many([hash_block(block) for block in blocks])
            calls.extend(
                f"{at:.9f} {call}" for at, call in zip(cell.call_times, cell.calls, strict=True)
            )

        simulate(main, seed=random.Random(3).randrange(1000))
        return calls

    assert history() == history()
