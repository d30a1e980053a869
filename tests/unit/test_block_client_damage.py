"""Fragments that are damaged, missing, foreign or forged: never served, always reported."""

from __future__ import annotations

import pytest
from bad_records import flip, forge, lie
from block_cell import RS, BlockCell, data_of, simulate

from cluster.block_client_settings import ProblemKind
from cluster.node_pool import Direction
from erasure.fragment import FRAGMENT_HEADER_BYTES
from protocol.errors import (
    BlockUnreadable,
)
from protocol.hashing import hash_block
from protocol.messages import ItemStatus
from storage_node.interface import FragmentKey

TAMPERS = {
    "first byte": flip(0.0),
    "header": flip(0.0001),
    "middle": flip(0.5),
    "last byte": flip(1.0),
    "truncated by one": lambda record: record[:-1],
    "empty": lambda record: b"",
    "one more byte": lambda record: record + b"\0",
    "zeros": lambda record: bytes(len(record)),
    "header only": lambda record: record[:FRAGMENT_HEADER_BYTES],
}


@pytest.mark.parametrize("size", [1_000, 200_000])
@pytest.mark.parametrize("name", TAMPERS)
def test_a_damaged_fragment_is_replaced_and_reported(name: str, size: int) -> None:
    async def main(cell: BlockCell) -> None:
        data = data_of(11, size)
        await cell.put(data)
        slots = await cell.slots_of(data)
        for node_id in slots[: len(slots) // 3]:
            cell.faults[node_id].tamper = TAMPERS[name]
        for _ in range(12):
            assert await cell.get(data) == data
        assert {problem.kind for problem in cell.problems} == {ProblemKind.CORRUPT}
        assert {problem.node_id for problem in cell.problems} == set(slots[: len(slots) // 3])

    simulate(main)


def test_fragments_of_another_block_or_slot_are_refused() -> None:
    async def main(cell: BlockCell) -> None:
        data, other = data_of(12), data_of(13)
        volume = cell.open_volume(RS, cell.node_ids)
        await cell.put(data)
        await cell.put(other)
        keys = [FragmentKey(volume, hash_block(block), 2) for block in (data, other)]
        cell.exchange(cell.node_ids[2], keys[0], keys[1])
        elsewhere = FragmentKey(volume, hash_block(data), 5)
        (foreign,) = cell.stores[cell.node_ids[5]].get_many([elsewhere])
        assert foreign.record is not None
        own = FragmentKey(volume, hash_block(data), 4)
        cell.stores[cell.node_ids[4]].put_group([(own, foreign.record)])
        assert await cell.get(data) == data
        found = [(problem.kind, problem.slot) for problem in cell.problems]
        assert sorted(found) == [(ProblemKind.CORRUPT, 2), (ProblemKind.CORRUPT, 4)]

    simulate(main, volumes=0)


@pytest.mark.parametrize("size", [1_000, 200_000])
@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (ItemStatus.NOT_FOUND, ProblemKind.MISSING),
        (ItemStatus.CORRUPT, ProblemKind.CORRUPT),
        (ItemStatus.IO_ERROR, ProblemKind.IO_ERROR),
    ],
)
def test_what_a_node_says_about_a_fragment_reaches_repair(
    status: ItemStatus, kind: ProblemKind, size: int
) -> None:
    async def main(cell: BlockCell) -> None:
        data = data_of(14, size)
        await cell.put(data)
        bad = (await cell.slots_of(data))[0]
        cell.faults[bad].get_status = status
        for _ in range(20):
            assert await cell.get(data) == data
        assert {(problem.kind, problem.node_id) for problem in cell.problems} == {(kind, bad)}
        assert cell.pool.suspected(Direction.READ) == ()

    simulate(main)


@pytest.mark.parametrize("size", [1_000, 200_000])
@pytest.mark.parametrize("liars", [1, 2])
def test_a_node_that_lies_consistently_is_found_out_and_named(liars: int, size: int) -> None:
    async def main(cell: BlockCell) -> None:
        data = data_of(15, size)
        await cell.put(data)
        slots = await cell.slots_of(data)
        for node_id in slots[:liars]:
            cell.faults[node_id].tamper = lie
        for _ in range(10):
            assert await cell.get(data) == data
        assert {problem.kind for problem in cell.problems} == {ProblemKind.LIAR}
        assert {problem.node_id for problem in cell.problems} == set(slots[:liars])

    simulate(main)


def test_a_perfect_forgery_of_a_small_block_fails_its_hash() -> None:
    async def main(cell: BlockCell) -> None:
        data = data_of(26, 936)
        await cell.put(data)
        slots = await cell.slots_of(data)
        for node_id in slots[:3]:
            cell.faults[node_id].tamper = forge
        for _ in range(10):
            assert await cell.get(data) == data
            (batched,) = await cell.client.get_many([hash_block(data)])
            assert batched == data
        assert {problem.node_id for problem in cell.problems} == set(slots[:3])
        cell.faults[slots[3]].tamper = forge
        with pytest.raises(BlockUnreadable):
            await cell.get(data)

    simulate(main)


def test_when_every_node_lies_nothing_is_served() -> None:
    async def main(cell: BlockCell) -> None:
        data = data_of(16)
        await cell.put(data)
        for faults in cell.faults.values():
            faults.tamper = lie
        with pytest.raises(BlockUnreadable):
            await cell.get(data)

    simulate(main)


def test_a_lie_and_a_lost_node_together_are_survived() -> None:
    async def main(cell: BlockCell) -> None:
        data = data_of(17)
        await cell.put(data)
        slots = await cell.slots_of(data)
        cell.kill(slots[0])
        cell.faults[slots[1]].tamper = lie
        assert await cell.get(data) == data
        assert [problem.slot for problem in cell.problems] == [1]

    simulate(main)
