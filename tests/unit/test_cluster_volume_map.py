"""The cached map: what it reads, what it keeps, and what it must never keep."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from cell_rows import (
    RS,
    SMALL,
    HandClock,
    Rows,
    empty_database,
    new_block,
    new_cell,
    node_ids,
    node_spec,
)
from sqlalchemy import Connection

from cluster.block_index import BlockIndex
from cluster.cell import add_nodes
from cluster.topology import NodeState, VolumeState
from cluster.volume_map import VolumeMap
from protocol.errors import DatabaseBusy, NeedsRepair, NodeUnavailable
from protocol.ids import NodeId, VolumeId
from sql.database import Database

T = TypeVar("T")


class SlowDatabase:
    """Counts reads, and holds back the answers of reads that began while `gate` was closed."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self.reads = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: DatabaseBusy | None = None

    async def read(self, work: Callable[[Connection], T]) -> T:
        self.reads += 1
        gate = self.gate
        answer = self._db.read_now(work)
        await gate.wait()
        if self.error is not None:
            raise self.error
        return answer


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def db(tmp_path: Path, clock: HandClock) -> Iterator[Database]:
    database = empty_database(tmp_path)
    new_cell(database, clock)
    yield database
    database.close()


@pytest.fixture
def rows(db: Database) -> Rows:
    rows = Rows(db)
    rows.register_all()
    return rows


@pytest.fixture
def slow(db: Database) -> SlowDatabase:
    return SlowDatabase(db)


@pytest.fixture
def held(slow: SlowDatabase, clock: HandClock) -> VolumeMap:
    return VolumeMap(slow, clock)  # type: ignore[arg-type]


async def test_a_new_map_is_empty_until_it_is_refreshed(rows: Rows, held: VolumeMap) -> None:
    volume = rows.open_volume(SMALL, node_ids(4))
    assert (held.version, held.nodes(), held.open_volumes(SMALL)) == (0, (), ())
    assert await held.refresh()
    assert [node.node_id for node in held.nodes()] == list(node_ids(9))
    assert held.open_volumes(SMALL) == (volume,)
    assert held.open_volumes(RS) == ()
    assert held.node(NodeId.numbered(3)) == rows.node(3)
    assert await held.volume(volume.volume_id) == volume


async def test_a_node_that_the_map_does_not_know_is_unavailable(held: VolumeMap) -> None:
    await held.refresh()
    with pytest.raises(NodeUnavailable, match="node-77"):
        held.node(NodeId.numbered(77))


async def test_a_refresh_without_changes_says_so(rows: Rows, held: VolumeMap) -> None:
    assert await held.refresh()
    assert not await held.refresh()


async def test_a_young_map_is_not_read_again(
    rows: Rows, held: VolumeMap, slow: SlowDatabase, clock: HandClock
) -> None:
    await held.refresh()
    rows.set_state(1, NodeState.DOWN)
    clock.now += 0.9
    assert not await held.refresh(max_age_s=1.0)
    assert slow.reads == 1
    clock.now += 0.2
    assert await held.refresh(max_age_s=1.0)
    assert held.node(NodeId.numbered(1)).state is NodeState.DOWN


async def test_a_new_incarnation_and_endpoint_arrive_with_the_next_refresh(
    rows: Rows, held: VolumeMap
) -> None:
    await held.refresh()
    rows.register(4)
    await held.refresh()
    assert held.node(NodeId.numbered(4)).incarnation == 2


async def test_an_added_node_appears(
    rows: Rows, held: VolumeMap, db: Database, clock: HandClock
) -> None:
    await held.refresh()
    add_nodes(db, clock, [node_spec(10)])
    await held.refresh()
    assert len(held.nodes()) == 10


async def test_a_sealed_volume_leaves_the_open_ones_and_is_still_found(
    rows: Rows, held: VolumeMap, db: Database, clock: HandClock
) -> None:
    volume = rows.open_volume(SMALL, node_ids(4))
    await BlockIndex(db, clock).record_puts([new_block("a", volume)])
    await held.refresh()
    rows.seal(volume.volume_id)
    await held.refresh()
    assert held.open_volumes(SMALL) == ()
    assert (await held.volume(volume.volume_id)).state is VolumeState.SEALED


async def test_a_volume_that_was_removed_empty_is_forgotten(rows: Rows, held: VolumeMap) -> None:
    volume = rows.open_volume(SMALL, node_ids(4))
    await held.refresh()
    assert await held.volume(volume.volume_id) == volume
    rows.seal(volume.volume_id)
    await held.refresh()
    assert await held.volumes([volume.volume_id]) == {}
    with pytest.raises(NeedsRepair, match=str(volume.volume_id)):
        await held.volume(volume.volume_id)


async def test_sealed_volumes_are_loaded_in_one_query_and_kept(
    rows: Rows, held: VolumeMap, slow: SlowDatabase, db: Database, clock: HandClock
) -> None:
    volumes = [rows.open_volume(SMALL, node_ids(4, first)) for first in (1, 2, 3)]
    await BlockIndex(db, clock).record_puts([new_block(v, v) for v in volumes])
    for volume in volumes:
        rows.seal(volume.volume_id)
    await held.refresh()
    before = slow.reads
    wanted = [volume.volume_id for volume in volumes]
    found = await held.volumes([*wanted, VolumeId(99)])
    assert {view.slots for view in found.values()} == {volume.slots for volume in volumes}
    assert slow.reads == before + 1
    assert set(await held.volumes(wanted)) == set(wanted)
    assert slow.reads == before + 1


async def test_a_load_that_was_overtaken_by_a_refresh_is_not_kept(
    rows: Rows, held: VolumeMap, slow: SlowDatabase, db: Database, clock: HandClock
) -> None:
    volume = rows.open_volume(SMALL, node_ids(4))
    await held.refresh()
    late_volume = rows.open_volume(SMALL, node_ids(4, 5))
    await BlockIndex(db, clock).record_puts([new_block("a", late_volume)])
    slow.gate.clear()
    loading = asyncio.create_task(held.volume(late_volume.volume_id))
    await asyncio.sleep(0)  # it has read the volume as open, and waits for its answer
    rows.seal(late_volume.volume_id)
    closed, slow.gate = slow.gate, asyncio.Event()
    slow.gate.set()
    assert await held.refresh()
    closed.set()
    assert (await loading).state is VolumeState.OPEN, "what it asked for, as it was then"
    assert (await held.volume(late_volume.volume_id)).state is VolumeState.SEALED
    assert held.open_volumes(SMALL) == (volume,)


async def test_concurrent_refreshes_share_one_query(
    rows: Rows, held: VolumeMap, slow: SlowDatabase
) -> None:
    slow.gate.clear()
    calls = [asyncio.create_task(held.refresh()) for _ in range(10)]
    await asyncio.sleep(0)
    slow.gate.set()
    assert all(await asyncio.gather(*calls))
    assert slow.reads == 1


async def test_a_refresh_never_returns_with_a_query_from_before_it_was_asked_for(
    rows: Rows, held: VolumeMap, slow: SlowDatabase, clock: HandClock
) -> None:
    slow.gate.clear()
    early = asyncio.create_task(held.refresh())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    clock.now += 0.1
    rows.register(2)
    late = asyncio.create_task(held.refresh())
    await asyncio.sleep(0)
    slow.gate.set()
    await asyncio.gather(early, late)
    assert held.node(NodeId.numbered(2)).incarnation == 2
    assert slow.reads == 2


async def test_a_refresh_that_fails_leaves_the_map_usable_and_fails_its_callers(
    rows: Rows, held: VolumeMap, slow: SlowDatabase, clock: HandClock
) -> None:
    await held.refresh()
    slow.error = DatabaseBusy("locked by the test")
    clock.now += 5
    outcomes = await asyncio.gather(held.refresh(), held.refresh(), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [DatabaseBusy] * 2
    assert len(held.nodes()) == 9
    slow.error = None
    assert not await held.refresh()


async def test_a_cancelled_caller_does_not_stop_the_refresh_of_others(
    rows: Rows, held: VolumeMap, slow: SlowDatabase
) -> None:
    slow.gate.clear()
    calls = [asyncio.create_task(held.refresh()) for _ in range(2)]
    await asyncio.sleep(0)
    calls[0].cancel()
    await asyncio.sleep(0)
    slow.gate.set()
    assert await calls[1]
    assert len(held.nodes()) == 9


async def test_writable_slots_are_those_of_nodes_that_are_up_or_only_suspected(
    rows: Rows, held: VolumeMap
) -> None:
    volume = rows.open_volume(RS, (*node_ids(8), None))
    for number, state in ((2, NodeState.SUSPECT), (3, NodeState.DOWN), (4, NodeState.DRAINING)):
        rows.set_state(number, state)
    await held.refresh()
    assert held.writable_slots(volume) == (0, 1, 4, 5, 6, 7)
    assert held.healthy_domains() == 7


async def test_the_cache_is_bounded_and_open_volumes_stay(
    rows: Rows, slow: SlowDatabase, clock: HandClock, db: Database
) -> None:
    held = VolumeMap(slow, clock, cached_volumes_max=3)  # type: ignore[arg-type]
    opened = rows.open_volume(SMALL, node_ids(4))
    sealed = [rows.open_volume(SMALL, node_ids(4)) for _ in range(5)]
    await BlockIndex(db, clock).record_puts([new_block(v, v) for v in sealed])
    for volume in sealed:
        rows.seal(volume.volume_id)
    await held.refresh()
    for volume in sealed:
        assert (await held.volume(volume.volume_id)).slots == volume.slots
    before = slow.reads
    await held.volume(sealed[-1].volume_id)
    await held.volume(opened.volume_id)
    assert slow.reads == before
    await held.volume(sealed[0].volume_id)
    assert slow.reads == before + 1, "the first one loaded was the first one forgotten"


class TickingClock(HandClock):
    """A clock on which no two readings are equal."""

    def monotonic(self) -> float:
        self.now += 0.001
        return self.now


@pytest.mark.timeout(20)
async def test_a_caller_between_the_end_of_a_read_and_its_callback_does_not_spin(
    rows: Rows, db: Database
) -> None:
    volume_map = VolumeMap(db, TickingClock())

    async def a_moment_later() -> bool:
        await asyncio.sleep(0)
        return await volume_map.refresh()

    first = asyncio.ensure_future(volume_map.refresh())
    second = asyncio.ensure_future(a_moment_later())
    assert await asyncio.gather(first, second) == [True, False]
