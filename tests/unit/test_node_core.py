"""`StorageNode`: leases, incarnations, epochs, checks before storing, states after failures."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from node_parts import (
    IDENTITY,
    HandClock,
    at_once,
    fragment_key,
    fragment_record,
    node_on,
    until,
)

from erasure.fragment import parse
from protocol.errors import (
    DirectoryForeign,
    InvalidRequest,
    NodeFull,
    NodeRefuses,
    StaleIncarnation,
    UnknownOutcome,
)
from protocol.ids import VolumeId
from protocol.messages import ItemStatus
from storage_node.interface import FragmentKey
from storage_node.memory_store import Disk, MemoryStore
from storage_node.node import StorageNode
from storage_node.service_state import Fault, ServiceState

OK, INVALID, STALE = ItemStatus.OK, ItemStatus.INVALID, ItemStatus.STALE_EPOCH
LEASE_S = 10.0


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
async def node(disk: Disk, clock: HandClock) -> StorageNode:
    """Serving, with a lease for incarnation 1."""
    made = node_on(MemoryStore(disk), clock)
    await made.lease(1, LEASE_S)
    return made


def stored(disk: Disk) -> set[bytes]:
    return set(disk.entries)


# -- leases and incarnations -------------------------------------------------------------------


async def test_without_a_lease_nothing_is_written_and_everything_is_read(
    disk: Disk, clock: HandClock
) -> None:
    key, record = fragment_record(1)
    store = MemoryStore(disk)
    store.put_group([(key, record)])
    node = node_on(store, clock)
    for write in (node.put(0, [record]), node.delete(0, [key])):
        with pytest.raises(NodeRefuses):
            await write
    assert [answer.record for answer in await node.get([key])] == [record]
    assert (await node.summary()).fragments == 1
    assert len((await node.inventory(None, 10)).keys) == 1


async def test_a_lease_runs_out_by_the_nodes_own_clock(
    node: StorageNode, clock: HandClock, disk: Disk
) -> None:
    key, record = fragment_record(1)
    clock.now += LEASE_S - 0.001
    assert (await node.put(1, [record])).statuses == [OK]
    clock.now += 0.001
    for write in (node.put(1, [fragment_record(2)[1]]), node.delete(1, [key])):
        with pytest.raises(NodeRefuses):
            await write
    assert stored(disk) == {key.pack()}
    await node.lease(1, LEASE_S)
    assert (await node.put(1, [fragment_record(2)[1]])).statuses == [OK]


async def test_a_renewal_never_shortens_a_lease(node: StorageNode, clock: HandClock) -> None:
    await node.lease(1, 0.5)
    clock.now += 5
    assert node.has_lease


async def test_a_write_that_outlives_its_lease_is_not_acknowledged(
    disk: Disk, clock: HandClock
) -> None:
    go = asyncio.Event()

    async def slow(work: Callable[..., Any], *arguments: Any) -> Any:
        done = work(*arguments)
        await go.wait()
        return done

    node = StorageNode(IDENTITY, MemoryStore(disk), clock, slow)
    go.set()
    await node.lease(1, LEASE_S)
    await node.put(1, [fragment_record(0)[1]])
    go.clear()
    put = asyncio.create_task(node.put(1, [fragment_record(1)[1]]))
    await until(lambda: fragment_key(1).pack() in stored(disk))
    clock.now += LEASE_S
    go.set()
    with pytest.raises(UnknownOutcome):
        await put


async def test_a_higher_incarnation_is_adopted_and_the_old_one_is_refused(
    node: StorageNode, disk: Disk
) -> None:
    answer = await node.lease(2, LEASE_S)
    assert (answer.incarnation, answer.state) == (2, "serving")
    assert disk.state["incarnation"] == (2).to_bytes(8, "big")
    record = fragment_record(1)[1]
    with pytest.raises(StaleIncarnation):
        await node.put(1, [record])
    with pytest.raises(StaleIncarnation):
        await node.put(3, [record])
    with pytest.raises(StaleIncarnation):
        await node.lease(1, LEASE_S)
    assert (await node.put(2, [record])).incarnation == 2


async def test_the_incarnation_survives_the_process_and_its_lease_does_not(
    node: StorageNode, disk: Disk, clock: HandClock
) -> None:
    await node.lease(5, LEASE_S)
    disk.power_off()
    again = node_on(MemoryStore(disk), clock)
    assert again.incarnation == 5
    assert not again.has_lease
    with pytest.raises(StaleIncarnation):
        await again.lease(4, LEASE_S)
    await again.lease(6, LEASE_S)
    assert (await again.put(6, [fragment_record(1)[1]])).statuses == [OK]


async def test_an_incarnation_that_cannot_be_written_down_is_not_adopted(
    node: StorageNode, disk: Disk
) -> None:
    disk.fail_call(1)
    with pytest.raises(UnknownOutcome):
        await node.lease(2, LEASE_S)
    assert node.incarnation == 1


# -- what is stored ----------------------------------------------------------------------------


async def test_records_are_checked_one_by_one_before_they_are_stored(
    node: StorageNode, disk: Disk
) -> None:
    good = [fragment_record(number) for number in range(3)]
    flipped = bytearray(good[1][1])
    flipped[-1] ^= 1
    records = [good[0][1], bytes(flipped), b"", b"HVSF", good[1][1][:-1], good[2][1]]
    outcome = await node.put(1, records)
    assert outcome.statuses == [OK, INVALID, INVALID, INVALID, INVALID, OK]
    assert stored(disk) == {good[0][0].pack(), good[2][0].pack()}


async def test_a_put_of_nothing_is_acknowledged(node: StorageNode) -> None:
    assert (await node.put(1, [])).statuses == []


async def test_a_record_of_an_older_epoch_than_seen_is_refused(
    node: StorageNode, disk: Disk
) -> None:
    await node.put(1, [fragment_record(1, epoch=3)[1]])
    outcome = await node.put(
        1,
        [
            fragment_record(2, epoch=2)[1],
            fragment_record(3, epoch=3)[1],
            fragment_record(4, epoch=1, volume=9)[1],
        ],
    )
    assert outcome.statuses == [STALE, OK, OK]
    assert fragment_key(2).pack() not in stored(disk)


async def test_epochs_are_remembered_by_the_disk(
    node: StorageNode, disk: Disk, clock: HandClock
) -> None:
    await node.put(1, [fragment_record(1, epoch=7)[1]])
    disk.power_off()
    again = node_on(MemoryStore(disk), clock)
    await again.lease(2, LEASE_S)
    assert (await again.put(2, [fragment_record(2, epoch=6)[1]])).statuses == [STALE]
    assert (await again.put(2, [fragment_record(2, epoch=7)[1]])).statuses == [OK]


async def test_an_epoch_is_durable_before_the_first_record_of_it(
    node: StorageNode, disk: Disk
) -> None:
    disk.fail_call(2)  # the epoch is the first write, the record the second
    with pytest.raises(UnknownOutcome):
        await node.put(1, [fragment_record(1, epoch=4)[1]])
    assert disk.state["epoch/v1"] == (4).to_bytes(8, "big")
    assert stored(disk) == set()


async def test_an_epoch_met_by_a_refused_put_is_written_down_by_the_next(
    node: StorageNode, disk: Disk
) -> None:
    disk.full = True
    with pytest.raises(NodeFull):
        await node.put(1, [fragment_record(1, epoch=4)[1]])
    disk.full = False
    disk.state.clear()
    await node.put(1, [fragment_record(2, epoch=4)[1]])
    assert (await node.put(1, [fragment_record(3, epoch=3)[1]])).statuses == [STALE]


async def test_delete_answers_for_every_key(node: StorageNode, disk: Disk) -> None:
    key, record = fragment_record(1)
    await node.put(1, [record])
    answers = await node.delete(1, [key, fragment_key(9), key])
    assert answers == [OK, ItemStatus.NOT_FOUND, OK]
    assert stored(disk) == set()


async def test_parallel_writers_share_group_commits(disk: Disk, clock: HandClock) -> None:
    node = node_on(MemoryStore(disk), clock)
    await node.lease(1, LEASE_S)
    before = node.commits.groups
    records = [fragment_record(number)[1] for number in range(50)]
    outcomes = await asyncio.gather(*(node.put(1, [record]) for record in records))
    assert all(outcome.statuses == [OK] for outcome in outcomes)
    assert len(stored(disk)) == 50
    assert node.commits.groups - before <= 3


# -- reads -------------------------------------------------------------------------------------


async def test_a_corrupt_and_a_lost_record_answer_for_themselves(
    node: StorageNode, disk: Disk
) -> None:
    keys = [fragment_record(number)[0] for number in range(3)]
    await node.put(1, [fragment_record(number)[1] for number in range(3)])
    disk.corrupt(keys[0])
    disk.lose(keys[1])
    answers = await node.get(keys)
    assert [answer.status for answer in answers] == [ItemStatus.CORRUPT, ItemStatus.NOT_FOUND, OK]


async def test_an_unreadable_disk_never_says_that_a_record_is_absent(
    node: StorageNode, disk: Disk
) -> None:
    disk.unreadable = True
    answers = await node.get([fragment_key(1), fragment_key(2)])
    assert {answer.status for answer in answers} == {ItemStatus.IO_ERROR}


async def test_a_verify_checks_what_lies_on_the_disk(node: StorageNode, disk: Disk) -> None:
    keys = [fragment_key(number) for number in range(4)]
    records = [fragment_record(number)[1] for number in range(4)]
    await node.put(1, records)
    disk.corrupt(keys[0])
    disk.lose(keys[1])
    disk.replace_undetected(keys[2], records[3])  # whole, and another's
    found = await node.verify(keys)
    assert [item.status for item in found] == [
        ItemStatus.CORRUPT,
        ItemStatus.NOT_FOUND,
        ItemStatus.CORRUPT,
        OK,
    ]
    whole = parse(records[3])
    assert found[3] == (OK, len(records[3]), whole.epoch, whole.stripe_tag)
    disk.unreadable = True
    assert {item.status for item in await node.verify(keys)} == {ItemStatus.IO_ERROR}


async def test_an_inventory_pages_through_everything(node: StorageNode) -> None:
    await node.put(1, [fragment_record(number)[1] for number in range(10)])
    found: list[bytes] = []
    more = True
    while more:
        after = FragmentKey.unpack(found[-1]) if found else None
        page = await node.inventory(after, 3)
        found += page.keys
        more = page.more
    assert found == sorted(fragment_key(number).pack() for number in range(10))
    with pytest.raises(InvalidRequest):
        await node.inventory(None, 0)


# -- states ------------------------------------------------------------------------------------


async def test_a_node_without_a_store_says_so_and_takes_no_lease(clock: HandClock) -> None:
    node = node_on(None, clock)
    node.refuse(DirectoryForeign("the directory belongs to node-07"))
    answer = await node.lease(3, LEASE_S)
    assert (answer.state, answer.detail) == ("refusing", "the directory belongs to node-07")
    assert answer.fault == (await node.summary()).fault == Fault.DIRECTORY
    assert not node.has_lease
    assert (await node.summary()).state == "refusing"
    for call in (node.get([fragment_key(1)]), node.inventory(None, 1), node.put(3, [])):
        with pytest.raises(NodeRefuses, match="belongs to node-07"):
            await call


async def test_after_a_failed_write_a_node_reads_on_and_takes_no_lease(
    node: StorageNode, disk: Disk
) -> None:
    key, record = fragment_record(1)
    await node.put(1, [record])
    disk.fail_call(1)
    with pytest.raises(UnknownOutcome):
        await node.put(1, [fragment_record(2)[1]])
    assert node.state is ServiceState.FAILED
    with pytest.raises(NodeRefuses):
        await node.put(1, [fragment_record(3)[1]])
    assert (await node.get([key]))[0].record == record
    assert (await node.lease(1, LEASE_S)).state == "failed"


async def test_a_failed_node_serves_again_once_its_store_is_opened_again(
    node: StorageNode, disk: Disk
) -> None:
    disk.fail_call(1)
    with pytest.raises(UnknownOutcome):
        await node.put(1, [fragment_record(1)[1]])
    await node.detach()
    assert node.state is ServiceState.OPENING
    node.attach(MemoryStore(disk))
    with pytest.raises(NodeRefuses):
        await node.put(1, [fragment_record(1)[1]])  # the old lease is gone
    await node.lease(1, LEASE_S)
    assert (await node.put(1, [fragment_record(1)[1]])).statuses == [OK]


async def test_a_store_found_dead_by_a_write_makes_the_node_fail(
    node: StorageNode, disk: Disk
) -> None:
    disk.fill_at_call(1)
    with pytest.raises(NodeFull):
        await node.put(1, [fragment_record(1)[1]])
    with pytest.raises(NodeRefuses):
        await node.put(1, [fragment_record(1)[1]])
    assert node.state is ServiceState.FAILED


async def test_a_full_disk_refuses_puts_and_does_not_fail_the_node(
    node: StorageNode, disk: Disk
) -> None:
    key, record = fragment_record(1)
    await node.put(1, [record])
    disk.full = True
    with pytest.raises(NodeFull):
        await node.put(1, [fragment_record(2)[1]])
    assert node.state is ServiceState.SERVING
    assert (await node.summary()).disk_free_bytes == 0
    assert (await node.get([key]))[0].record == record
    assert await node.delete(1, [key]) == [OK]


async def test_closing_finishes_writes_and_closes_the_store(disk: Disk, clock: HandClock) -> None:
    node = node_on(MemoryStore(disk), clock)
    await node.lease(1, LEASE_S)
    puts = [asyncio.create_task(node.put(1, [fragment_record(n)[1]])) for n in range(5)]
    await asyncio.sleep(0)
    await node.close()
    await node.close()
    done = await asyncio.gather(*puts, return_exceptions=True)
    acknowledged = [n for n, outcome in enumerate(done) if not isinstance(outcome, Exception)]
    assert {fragment_key(n).pack() for n in acknowledged} <= stored(disk)
    assert disk.holder is None
    assert (await node.summary()).state == "closing"
    with pytest.raises(NodeRefuses):
        await node.get([fragment_key(1)])


async def test_the_store_is_not_closed_under_a_slow_read(disk: Disk, clock: HandClock) -> None:
    go = asyncio.Event()
    reading = asyncio.Event()

    async def slow(work: Callable[..., Any], *arguments: Any) -> Any:
        if work.__name__ == "get_many":
            reading.set()
            await go.wait()
        return work(*arguments)

    node = StorageNode(IDENTITY, MemoryStore(disk), clock, slow, run_slow=at_once)
    read = asyncio.create_task(node.get([fragment_key(1)]))
    await reading.wait()
    closing = asyncio.create_task(node.close())
    for _ in range(5):
        await asyncio.sleep(0)
    assert disk.holder is not None
    go.set()
    await closing
    assert (await read)[0].status is ItemStatus.NOT_FOUND
    assert disk.holder is None


async def test_a_summary_counts_what_is_there(node: StorageNode) -> None:
    await node.put(1, [fragment_record(number, 100)[1] for number in range(3)])
    summary = await node.summary()
    assert (summary.state, summary.incarnation, summary.fragments) == ("serving", 1, 3)
    assert summary.fragment_bytes == 3 * 196
    assert summary.counters["puts"] == 3
    assert summary.pid > 0


async def test_volumes_are_told_apart_by_their_number(node: StorageNode, disk: Disk) -> None:
    await node.put(1, [fragment_record(1, volume=2**50)[1]])
    assert FragmentKey.unpack(next(iter(disk.entries))).volume == VolumeId(2**50)
