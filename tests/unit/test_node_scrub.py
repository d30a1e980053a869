"""The scrubber over a memory disk and time that moves by hand."""

from __future__ import annotations

import pytest
from node_parts import IDENTITY, HandClock, at_once, fragment_record

from protocol.errors import DirectoryCorrupt, InvalidRequest, NodeRefuses
from protocol.limits import KIB, MIB
from protocol.messages import ItemStatus, ScrubAction
from storage_node.interface import FragmentKey, NewestPage
from storage_node.memory_store import Disk, MemoryStore
from storage_node.node import StorageNode
from storage_node.scrub import LOOK_S, QUIET_S, RATE_MIN, STEP_KEYS, ScrubSettings
from storage_node.service_state import Fault

OK, CORRUPT, NOT_FOUND = ItemStatus.OK, ItemStatus.CORRUPT, ItemStatus.NOT_FOUND
IO_ERROR = ItemStatus.IO_ERROR
PERIOD_S = 14 * 24 * 3600.0


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


def open_node(disk: Disk, clock: HandClock, **settings: float) -> StorageNode:
    disk.power_off()
    scrub = ScrubSettings(**{"period_s": PERIOD_S, **settings})  # type: ignore[arg-type]
    return StorageNode(IDENTITY, MemoryStore(disk), clock, at_once, scrub=scrub)


async def fill(node: StorageNode, count: int, size: int = 1 * KIB) -> list[FragmentKey]:
    await node.lease(1, 1e9)
    records = [fragment_record(number, size) for number in range(count)]
    await node.put(1, [record for _, record in records])
    return [key for key, _ in records]


async def whole_pass(node: StorageNode, clock: HandClock) -> None:
    """Until the pass under way, or the next one, has ended."""
    number = (await node.summary()).scrub.pass_number + (
        0 if (await node.summary()).scrub.running else 1
    )
    for _ in range(100_000):
        scrub = (await node.summary()).scrub
        if scrub.pass_number >= number and not scrub.running:
            return
        await clock.sleep(await node.scrubber.step())
    raise AssertionError("the pass never ended")


async def found(node: StorageNode) -> dict[FragmentKey, ItemStatus]:
    page = await node.findings(None, 1_000)
    assert not page.more
    keys = [FragmentKey.unpack(key) for key in page.keys]
    return dict(zip(keys, map(ItemStatus, page.statuses), strict=True))


async def test_a_pass_finds_exactly_what_is_bad(disk: Disk, clock: HandClock) -> None:
    node = open_node(disk, clock)
    keys = await fill(node, 50)
    disk.corrupt(keys[3])
    disk.lose_record(keys[7])
    disk.replace_undetected(keys[9], fragment_record(10)[1])  # a record in another's place
    await node.scrub(ScrubAction.START, 0)
    await whole_pass(node, clock)
    assert await found(node) == {keys[3]: CORRUPT, keys[7]: NOT_FOUND, keys[9]: CORRUPT}
    scrub = (await node.summary()).scrub
    assert (scrub.findings, scrub.findings_of_pass, scrub.fragments_done) == (3, 3, 50)
    assert scrub.bytes_done == scrub.bytes_total == (await node.summary()).fragment_bytes
    assert not scrub.running
    assert scrub.ended > 0


async def test_what_is_set_aside_is_served_as_corrupt_and_kept(
    disk: Disk, clock: HandClock
) -> None:
    node = open_node(disk, clock)
    keys = await fill(node, 3)
    lie = fragment_record(10)[1]
    disk.replace_undetected(keys[1], lie)
    assert [a.status for a in await node.get(keys)] == [OK, OK, OK]  # the store cannot tell
    await node.scrub(ScrubAction.START, 0)
    await whole_pass(node, clock)
    assert [a.status for a in await node.get(keys)] == [OK, CORRUPT, OK]
    assert [a.status for a in await node.verify(keys)] == [OK, CORRUPT, OK]
    assert disk.entries[keys[1].pack()].record == lie


async def test_findings_outlive_the_process_and_end_with_a_good_put(
    disk: Disk, clock: HandClock
) -> None:
    node = open_node(disk, clock)
    keys = await fill(node, 4)
    for number in (1, 2, 3):
        disk.corrupt(keys[number])
    await node.scrub(ScrubAction.START, 0)
    await whole_pass(node, clock)
    node = open_node(disk, clock)
    await node.lease(1, 1e9)
    assert sorted(await found(node)) == sorted(keys[1:])
    assert (await node.put(1, [fragment_record(2)[1]])).statuses == [OK]
    assert await node.delete(1, [keys[3]]) == [OK]
    assert list(await found(node)) == [keys[1]]
    assert [a.status for a in await node.get(keys)] == [OK, CORRUPT, OK, NOT_FOUND]


async def test_an_error_of_the_disk_that_passes_is_no_finding_any_more(
    disk: Disk, clock: HandClock
) -> None:
    node = open_node(disk, clock)
    keys = await fill(node, 3)
    await node.scrub(ScrubAction.START, 0)
    store = node.store
    assert isinstance(store, MemoryStore)
    disk.unreadable = True
    store.set_aside(keys, clock.wall())
    assert await found(node) == dict.fromkeys(keys, IO_ERROR)
    disk.unreadable = False
    await whole_pass(node, clock)
    assert await found(node) == {}


async def test_a_restart_goes_on_where_the_pass_was(disk: Disk, clock: HandClock) -> None:
    node = open_node(disk, clock)
    await fill(node, 3 * STEP_KEYS, size=10)
    await node.scrub(ScrubAction.START, 1 * MIB)
    await node.scrubber.step()
    clock.now += 31  # past the time after which the position is written
    await node.scrubber.step()
    assert (await node.summary()).scrub.fragments_done == 2 * STEP_KEYS
    node = open_node(disk, clock)
    scrub = (await node.summary()).scrub
    assert (scrub.running, scrub.asked_for, scrub.fragments_done) == (True, True, 2 * STEP_KEYS)
    await whole_pass(node, clock)
    assert (await node.summary()).scrub.fragments_done == 3 * STEP_KEYS


async def test_the_newest_volumes_are_read_first(disk: Disk, clock: HandClock) -> None:
    node = open_node(disk, clock)
    await node.lease(1, 1e9)
    for volume in (1, 2, 3):
        records = [fragment_record(n, 10, volume=volume)[1] for n in range(STEP_KEYS)]
        await node.put(1, records)
    read: list[int] = []
    store = node.store
    assert isinstance(store, MemoryStore)
    examine = store.examine
    store.examine = lambda keys: read.extend(k.volume for k in keys) or examine(keys)  # type: ignore[method-assign, func-returns-value]
    await node.scrub(ScrubAction.START, 0)
    await whole_pass(node, clock)
    assert read == sorted(read, reverse=True)
    assert len(read) == 3 * STEP_KEYS


async def test_every_fragment_is_read_within_the_period(disk: Disk, clock: HandClock) -> None:
    node = open_node(disk, clock, period_s=1000.0)
    await fill(node, 40, size=100 * KIB)
    started = clock.now
    await whole_pass(node, clock)
    assert clock.now - started <= 500
    assert (await node.summary()).scrub.fragments_done == 40
    await whole_pass(node, clock)
    assert clock.now - started <= 1000 + 2 * LOOK_S
    assert (await node.summary()).scrub.pass_number == 2


async def test_an_unhurried_pass_keeps_to_its_rate(disk: Disk, clock: HandClock) -> None:
    node = open_node(disk, clock)
    await fill(node, 20, size=1 * MIB)
    started = clock.now
    await whole_pass(node, clock)
    size = (await node.summary()).fragment_bytes
    assert 0.5 <= size / RATE_MIN / (clock.now - started) <= 2.5
    await node.scrub(ScrubAction.START, 4 * MIB)
    started = clock.now
    await whole_pass(node, clock)
    assert 2 <= clock.now - started <= 2 * size / (4 * MIB)


async def test_live_traffic_goes_first_but_not_for_ever(disk: Disk, clock: HandClock) -> None:
    node = open_node(disk, clock)
    (key, *_) = await fill(node, 40, size=1 * MIB)
    await node.scrubber.step()
    first = (await node.summary()).scrub.bytes_done
    assert first > 0
    started = clock.now
    while (await node.summary()).scrub.bytes_done == first:
        await node.get([key])
        await clock.sleep(min(QUIET_S / 2, await node.scrubber.step() or QUIET_S / 2))
        assert clock.now - started < 2 * first / RATE_MIN
    busy_s = clock.now - started
    assert busy_s > 1.2 * first / RATE_MIN


async def test_paused_it_reads_nothing_until_it_is_resumed(disk: Disk, clock: HandClock) -> None:
    node = open_node(disk, clock)
    await fill(node, 10)
    assert (await node.scrub(ScrubAction.PAUSE, 0)).paused
    node = open_node(disk, clock)
    for _ in range(10):
        await clock.sleep(await node.scrubber.step())
    assert (await node.summary()).scrub.pass_number == 0
    assert not (await node.scrub(ScrubAction.RESUME, 0)).paused
    await whole_pass(node, clock)
    assert (await node.summary()).scrub.fragments_done == 10


async def test_start_begins_anew_and_a_second_start_changes_the_rate_only(
    disk: Disk, clock: HandClock
) -> None:
    node = open_node(disk, clock)
    await fill(node, 3 * STEP_KEYS, size=10)
    await node.scrubber.step()
    assert (await node.summary()).scrub.fragments_done == STEP_KEYS
    begun = await node.scrub(ScrubAction.START, 100)
    assert (begun.pass_number, begun.fragments_done, begun.bytes_per_s) == (2, 0, 100)
    await node.scrubber.step()
    again = await node.scrub(ScrubAction.START, 0)
    assert (again.pass_number, again.fragments_done, again.bytes_per_s) == (2, STEP_KEYS, 0)
    with pytest.raises(InvalidRequest):
        await node.scrub(ScrubAction.START, -1)


async def test_a_fragment_replaced_or_deleted_while_it_was_read_is_not_set_aside(
    disk: Disk, clock: HandClock
) -> None:
    node = open_node(disk, clock)
    keys = await fill(node, 3)
    store = node.store
    assert isinstance(store, MemoryStore)
    disk.corrupt(keys[0])
    disk.corrupt(keys[1])
    await node.put(1, [fragment_record(0)[1]])
    await node.delete(1, [keys[1]])
    assert store.set_aside(keys, clock.wall()) == 0
    assert await found(node) == {}


async def test_a_damaged_index_is_a_fault_of_the_disk_until_a_pass_reads_it_whole(
    disk: Disk, clock: HandClock
) -> None:
    node = open_node(disk, clock)
    await fill(node, 5)
    store = node.store
    assert isinstance(store, MemoryStore)
    newest = store.newest
    store.newest = lambda bound, limit, bytes_max: NewestPage(
        *newest(bound, limit, bytes_max)[:2], damaged=True
    )  # type: ignore[method-assign]
    await node.scrub(ScrubAction.START, 0)
    await whole_pass(node, clock)
    assert (await node.summary()).scrub.index_damaged
    assert (await node.lease(1, 1e9)).fault == Fault.DISK
    store.newest = newest  # type: ignore[method-assign]
    await node.scrub(ScrubAction.START, 0)
    await whole_pass(node, clock)
    assert (await node.lease(1, 1e9)).fault == Fault.NONE


async def test_writes_that_fail_again_and_again_are_a_fault_of_the_disk(
    disk: Disk, clock: HandClock
) -> None:
    node = open_node(disk, clock)
    for life in range(3):
        assert node.fault is Fault.NONE, life
        await node.lease(1, 1e9)
        disk.fail_call(1)
        with pytest.raises(Exception, match="failed"):
            await node.put(1, [fragment_record(life)[1]])
        await node.detach()
        node.attach(MemoryStore(disk))
    assert node.fault is Fault.DISK
    clock.now += 3600
    assert node.fault is Fault.NONE


async def test_a_directory_and_a_disk_are_told_apart(clock: HandClock) -> None:
    node = StorageNode(IDENTITY, None, clock, at_once)
    node.refuse(DirectoryCorrupt("rotten"))
    assert (await node.lease(1, 1)).fault == Fault.DISK
    with pytest.raises(NodeRefuses):
        await node.scrub(ScrubAction.START, 0)


class SettableClock(HandClock):
    """Its wall clock can be set."""

    skew_s = 0.0

    def wall(self) -> float:
        return self.now + self.skew_s


async def test_a_clock_that_is_set_back_puts_no_pass_off(disk: Disk) -> None:
    clock = SettableClock()
    node = open_node(disk, clock, period_s=1000.0)
    first, *_ = await fill(node, 20)
    await whole_pass(node, clock)
    disk.corrupt(first)
    clock.skew_s = -3600.0
    started = clock.now
    while not (await node.summary()).scrub.findings:
        await clock.sleep(await node.scrubber.step())
        assert clock.now - started <= 1000, "longer than a period, as if nothing had been set"
