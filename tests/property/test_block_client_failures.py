"""What holds for the block client whatever fails, over many seeds.

Replay one with `python -m pytest tests/property/test_block_client_failures.py -k "seed-17"`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random

import pytest
from block_cell import OWNER, BlockCell, data_of, simulate
from faulty_port import Faults

from cluster.block_client_settings import PutResult
from erasure.fragment import parse
from erasure.scheme import Scheme
from protocol.errors import (
    BlockUnreadable,
    HaversackError,
    NodeFull,
    NodeRefuses,
    NodeUnavailable,
    NotEnoughNodes,
    Overloaded,
    UnknownOutcome,
)
from protocol.hashing import hash_block
from protocol.ids import BlockHash, NodeId
from protocol.limits import SMALL_BLOCK_BYTES
from protocol.messages import ItemStatus
from storage_node.interface import FragmentKey

SCHEMES = ["rs-6-3", "rs-2-1", "rs-4-2", "rs-10-4", "rs-3-6", "replica-1", "replica-2", "replica-4"]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("size", [0, 1, 4_097, SMALL_BLOCK_BYTES, SMALL_BLOCK_BYTES + 1])
def test_get_returns_exact_bytes_with_any_m_nodes_down(scheme: str, size: int) -> None:
    async def main(cell: BlockCell) -> None:
        data = data_of(size, size)
        await cell.put(data)
        row = (await cell.index.lookup([hash_block(data)]))[hash_block(data)]
        await cell.map.refresh()
        volume = await cell.map.volume(row.volume)
        subsets = list(itertools.combinations(range(volume.scheme.n), volume.scheme.m))
        for number, lost in enumerate(cell.rng.sample(subsets, min(len(subsets), 100))):
            for slot in lost:
                node_id = volume.slots[slot]
                assert node_id is not None
                cell.kill(node_id)
            pool, client = cell.new_client(number)
            assert bytes(await client.get(hash_block(data))) == data
            (many,) = await client.get_many([hash_block(data)])
            assert not isinstance(many, Exception)
            assert bytes(many) == data
            await pool.aclose()
            cell.heal()

    simulate(main, scheme=scheme, nodes=Scheme.parse(scheme).n + 1, volumes=1)


@pytest.mark.parametrize("scheme", ["rs-6-3", "rs-2-2", "rs-4-1", "replica-3", "replica-1"])
def test_a_put_is_acknowledged_exactly_when_the_write_minimum_is_healthy(scheme: str) -> None:
    parsed = Scheme.parse(scheme)

    for dead in range(parsed.n + 1):

        async def main(cell: BlockCell, dead: int = dead) -> None:
            cell.kill(*cell.rng.sample(cell.node_ids, dead))
            data = data_of(dead)
            if parsed.n - dead < parsed.write_minimum:
                with pytest.raises(NotEnoughNodes):
                    await cell.put(data)
                assert await cell.index.lookup([hash_block(data)]) == {}
            else:
                result = await cell.put(data)
                assert result == PutResult(True, result.stored_bytes, dead > 0)
                assert await cell.index.debts() == dead
                assert await cell.get(data) == data

        simulate(main, scheme=scheme, nodes=parsed.n, seed=dead)


@pytest.mark.parametrize("seed", [pytest.param(seed, id=f"seed-{seed}") for seed in range(40)])
def test_damage_up_to_m_slots_never_shows_and_more_never_gives_other_bytes(seed: int) -> None:
    """Each slot of a block is intact, missing, flipped, truncated, or another fragment."""

    async def main(cell: BlockCell) -> None:
        rng = cell.rng
        blocks = [data_of(1_000 * seed + n, rng.choice([700, 150_000])) for n in range(6)]
        await asyncio.gather(*(cell.put(block) for block in blocks))
        rows = await cell.index.lookup([hash_block(block) for block in blocks])
        await cell.map.refresh()
        damaged: dict[bytes, int] = {}
        for block in blocks:
            row = rows[hash_block(block)]
            volume = await cell.map.volume(row.volume)
            count = rng.randint(0, volume.scheme.m + 1)
            damaged[block] = count - volume.scheme.m
            for slot in rng.sample(range(volume.scheme.n), count):
                node_id = volume.slots[slot]
                assert node_id is not None
                damage(cell, node_id, FragmentKey(row.volume, row.hash, slot), rng)
        pool, client = cell.new_client(seed)
        for block in blocks * 2:
            try:
                assert bytes(await client.get(hash_block(block))) == block
            except BlockUnreadable:
                assert damaged[block] > 0
        many = await client.get_many([hash_block(block) for block in blocks])
        for block, result in zip(blocks, many, strict=True):
            if isinstance(result, Exception):
                assert isinstance(result, BlockUnreadable)
                assert damaged[block] > 0
            else:
                assert bytes(result) == block
        await pool.aclose()

    simulate(main, seed=seed)


def damage(cell: BlockCell, node_id: NodeId, key: FragmentKey, rng: random.Random) -> None:
    """Do something bad to one record on a disk, past the checks of `StorageNode`."""
    store = cell.stores[node_id]
    (answer,) = store.get_many([key])
    assert answer.record is not None
    record = bytearray(answer.record)
    match rng.randrange(5):
        case 0:
            store.delete_group([key])
            return
        case 1:
            record[rng.randrange(len(record))] ^= 1 << rng.randrange(8)
        case 2:
            del record[rng.randrange(len(record)) :]
        case 3:
            record[:] = bytes(len(record))
        case _:
            others = [other for other, _ in store.inventory(None, 1_000)[0] if other != key]
            if others:
                (foreign,) = store.get_many([rng.choice(others)])
                assert foreign.record is not None
                record[:] = foreign.record
            else:
                record.append(0)
    store.put_group([(key, bytes(record))])


def spoil(faults: Faults, rng: random.Random) -> None:
    """One random condition of one node."""
    faults.__init__()  # type: ignore[misc]
    match rng.randrange(12):
        case 0:
            faults.refuses = NodeUnavailable("connection refused")
        case 1:
            faults.put_refuses = rng.choice(
                [NodeFull("full"), NodeRefuses("no lease"), UnknownOutcome("?"), Overloaded("busy")]
            )
        case 2:
            faults.is_stopped = True
        case 3:
            faults.loses_replies = True
        case 4:
            mean_s = rng.choice([0.01, 0.3])
            faults.delay_s = lambda: rng.expovariate(1 / mean_s)
        case 5:
            faults.get_status = rng.choice(
                [ItemStatus.NOT_FOUND, ItemStatus.IO_ERROR, ItemStatus.CORRUPT]
            )
        case 6:
            faults.tamper = lambda record: record[:-1] + bytes([record[-1] ^ 0xFF])
        case _:
            pass


class Storm:
    """Clients that put, batch, get and give up while nodes fail, restart and come back."""

    def __init__(self, cell: BlockCell) -> None:
        self.cell = cell
        self.rng = cell.rng
        self.acknowledged: dict[BlockHash, bytes] = {}
        self.is_over = False

    async def weather(self) -> None:
        """Something changes every half second."""
        cell, rng = self.cell, self.rng
        while not self.is_over:
            node_id = rng.choice(cell.node_ids)
            if rng.random() < 0.2:
                await cell.start_node(node_id)
            else:
                spoil(cell.faults[node_id], rng)
            if rng.random() < 0.1:
                cell.seal_volume(rng.choice(cell.volumes_opened))
                cell.open_volume(cell.scheme)
                cell.open_volume(cell.scheme.small_twin())
            await cell.clock.sleep(rng.uniform(0.05, 1.0))

    async def client(self, owner: int) -> None:
        """One user, patient or not."""
        for turn in range(12):
            size = self.rng.choice([500, 140_000])
            blocks = [data_of(self.rng.randrange(30), size) for _ in range(self.rng.choice([1, 5]))]
            act = self.rng.choice([self.put_many, self.put_each, self.get_many])
            with contextlib.suppress(HaversackError, TimeoutError):
                async with asyncio.timeout(self.rng.choice([0.2, 60.0])):
                    await act(owner, {hash_block(block): block for block in blocks})
            await self.cell.clock.sleep(self.rng.uniform(0.0, 0.5) * turn)

    async def put_many(self, owner: int, blocks: dict[BlockHash, bytes]) -> None:
        results = await self.cell.client.put_many(owner, list(blocks.items()))
        for (name, block), result in zip(blocks.items(), results, strict=True):
            if isinstance(result, PutResult):
                self.acknowledged[name] = block

    async def put_each(self, owner: int, blocks: dict[BlockHash, bytes]) -> None:
        for name, block in blocks.items():
            await self.cell.put(block, owner)
            self.acknowledged[name] = block

    async def get_many(self, _owner: int, _blocks: dict[BlockHash, bytes]) -> None:
        known = self.rng.sample(sorted(self.acknowledged), min(len(self.acknowledged), 4))
        found = await self.cell.client.get_many(known)
        for name, result in zip(known, found, strict=True):
            assert isinstance(result, Exception) or bytes(result) == self.acknowledged[name]


@pytest.mark.parametrize("seed", [pytest.param(seed, id=f"seed-{seed}") for seed in range(40)])
def test_nothing_acknowledged_is_lost_through_a_storm_of_faults(seed: int) -> None:
    """When it is over and all nodes are back, every acknowledged block is there, on every slot that
    is not on record as a debt."""

    async def main(cell: BlockCell) -> None:
        storm = Storm(cell)
        weather = asyncio.ensure_future(storm.weather())
        await asyncio.gather(*(storm.client(owner) for owner in range(1, 5)))
        storm.is_over = True
        await weather
        cell.heal()
        for node_id in cell.node_ids:
            await cell.start_node(node_id)
        pool, fresh = cell.new_client(seed)
        for name, block in storm.acknowledged.items():
            assert bytes(await fresh.get(name)) == block
        await pool.aclose()
        assert storm.acknowledged
        await check_slots(cell)

    simulate(main, seed=seed, nodes=random.Random(seed).choice([9, 10, 12]))


async def check_slots(cell: BlockCell) -> None:
    """Every slot of every block in the index has its fragment, or a debt says that it has not."""
    await cell.map.refresh()
    debts = cell.all_debts()
    for row in cell.all_rows():
        volume = await cell.map.volume(row.volume)
        for slot, node_id in enumerate(volume.slots):
            owed = (row.volume, slot, row.hash) in debts
            if not owed:
                assert node_id is not None
                assert cell.holds(node_id, row.volume, row.hash, slot), (row, slot)
    for node_id in cell.node_ids:
        store = cell.stores[node_id]
        for key, _ in store.inventory(None, 100_000)[0]:
            (answer,) = store.get_many([key])
            assert answer.record is not None
            assert parse(answer.record).block == key.block


def test_the_owner_of_every_acknowledged_put_has_a_claim() -> None:
    async def main(cell: BlockCell) -> None:
        blocks = [data_of(number % 10, 800) for number in range(40)]
        owners = [1 + number // 10 for number in range(40)]
        await asyncio.gather(
            *(cell.put(block, owner) for block, owner in zip(blocks, owners, strict=True))
        )
        for owner in set(owners):
            hashes = {hash_block(block) for block in blocks}
            assert await cell.index.claimed(owner, list(hashes)) == hashes
        assert await cell.index.claimed(OWNER, [hash_block(blocks[0])]) == set()

    simulate(main)
