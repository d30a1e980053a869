"""Scrub, findings and reclaimed space of the real store, on real files that rot and fill up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from node_parts import (
    IDENTITY,
    LARGE,
    HandClock,
    at_once,
    formatted,
    fragment_key,
    fragment_record,
    noise,
    rocks,
)

from protocol.errors import DirectoryCorrupt, NodeFull, NodeRefuses
from protocol.limits import KIB, MIB
from protocol.messages import ItemStatus, PutPurpose, ScrubAction
from storage_node.interface import FragmentKey
from storage_node.node import StorageNode
from storage_node.rocks_store import RocksStore
from storage_node.scrub import STEP_KEYS
from storage_node.space import SpaceShares

OK, CORRUPT, NOT_FOUND = ItemStatus.OK, ItemStatus.CORRUPT, ItemStatus.NOT_FOUND


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return formatted(tmp_path / "node")


def put(store: RocksStore, *numbers: int, size: int = LARGE) -> None:
    store.put_group([fragment_record(number, size) for number in numbers])


def assert_holds(store: RocksStore, *numbers: int, size: int = LARGE) -> None:
    for number in numbers:
        key, record = fragment_record(number, size)
        assert store.get_many([key])[0].record == record, number


def tidy_all(store: RocksStore) -> None:
    while store.tidy(64 * MIB):
        pass


async def scrubbed(store: RocksStore) -> dict[FragmentKey, ItemStatus]:
    """Findings after a whole pass by a node on `store`."""
    clock = HandClock()
    node = StorageNode(IDENTITY, store, clock, at_once)
    await node.scrub(ScrubAction.START, 0)
    while (await node.summary()).scrub.running:
        await clock.sleep(await node.scrubber.step())
    return findings(store)


def findings(store: RocksStore) -> dict[FragmentKey, ItemStatus]:
    return {item.key: item.status for item in store.findings(None, 10_000)[0]}


def flip(path: Path, needle: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(needle) + 50] ^= 1
    path.write_bytes(data)


def file_holding(directory: Path, needle: bytes) -> Path:
    (found,) = [path for path in directory.glob("store/*.sst") if needle in path.read_bytes()]
    return found


def start(script: str) -> subprocess.Popen[bytes]:
    """Python in a process of its own, to be killed."""
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)


def file_of(store: RocksStore, directory: Path, number: int) -> Path:
    """The SST file that RocksDB says holds the record."""
    packed = fragment_key(number).pack()
    place = store._ledger.places([packed])[packed]
    for file in store._database.live_files():
        first, last = file["start_key"], file["end_key"]
        if first[:1] == b"E" and first[1:9] <= place.sequence.to_bytes(8, "big") <= last[1:9]:
            return directory / "store" / file["name"].lstrip("/")
    raise AssertionError("no file holds it")


# -- scrub -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1 * KIB, LARGE])
async def test_a_bad_last_block_is_a_finding_and_keeps_no_node_from_opening(
    directory: Path, size: int
) -> None:
    """Where the newest sequence is looked for at each opening."""
    store = rocks(directory)
    put(store, *range(8), size=size)
    store.flush()
    store.close()
    newest = max(file_holding(directory, noise(number, size)) for number in range(8))
    last = max(n for n in range(8) if noise(n, size) in newest.read_bytes())
    flip(newest, noise(last, size)[:100])
    store = rocks(directory)
    found = await scrubbed(store)
    assert fragment_key(last) in found
    assert set(found.values()) == {CORRUPT}
    put(store, 100, size=size)
    store.close()
    store = rocks(directory)
    assert_holds(store, 100, size=size)
    store.close()


async def test_a_flipped_byte_in_an_sst_file_is_a_finding_for_exactly_its_key(
    directory: Path,
) -> None:
    store = rocks(directory)
    put(store, *range(5))
    put(store, *range(5, 10))
    path = file_of(store, directory, 3)
    store.close()
    flip(path, noise(3, LARGE)[:100])
    store = rocks(directory)
    assert await scrubbed(store) == {fragment_key(3): CORRUPT}
    put(store, 3)
    assert findings(store) == {}
    assert_holds(store, *range(10))
    assert await scrubbed(store) == {}
    store.close()


async def test_small_records_are_scrubbed_too(directory: Path) -> None:
    store = rocks(directory)
    put(store, *range(60), size=5 * KIB)
    store.flush()
    store.close()
    flip(file_holding(directory, noise(20, 5 * KIB)), noise(20, 5 * KIB)[:100])
    store = rocks(directory)
    found = await scrubbed(store)
    assert found[fragment_key(20)] is CORRUPT
    assert set(found.values()) == {CORRUPT}
    assert len(found) <= 2  # records that share its block of the file
    store.close()


async def test_a_cut_sst_file_gives_findings_for_its_keys_and_the_rest_is_served(
    directory: Path,
) -> None:
    store = rocks(directory)
    for number in range(6):
        put(store, number)
    path = file_of(store, directory, 2)
    os.truncate(path, 1000)
    (found,) = (await scrubbed(store)).items()
    assert found[0] == fragment_key(2)
    assert_holds(store, 0, 1, 3, 4, 5)
    put(store, 2)
    assert await scrubbed(store) == {}
    store.close()


def test_a_directory_with_a_deleted_sst_file_is_a_bad_disk(directory: Path) -> None:
    store = rocks(directory)
    put(store, 1)
    path = file_of(store, directory, 1)
    store.close()
    path.unlink()
    with pytest.raises(DirectoryCorrupt):
        rocks(directory)


async def test_a_record_that_is_gone_is_told_from_one_that_was_never_there(
    directory: Path,
) -> None:
    store = rocks(directory)
    put(store, *range(4), size=10)
    packed = fragment_key(1).pack()
    place = store._ledger.places([packed])[packed]
    store._small.delete(b"S" + place.sequence.to_bytes(8, "big") + packed)
    assert await scrubbed(store) == {fragment_key(1): NOT_FOUND}
    put(store, 1, size=10)
    assert findings(store) == {}
    store.close()


async def test_a_damaged_index_is_reported_and_all_that_can_be_read_is_scrubbed(
    directory: Path,
) -> None:
    store = rocks(directory)
    put(store, *range(400), size=10)
    store.flush()
    first = store.inventory(None, 1)[0][0][0].pack()
    (name,) = [f["name"] for f in store._database.live_files() if f["start_key"] == first]
    store.close()
    path = directory / "store" / name.lstrip("/")
    data = bytearray(path.read_bytes())
    data[9000] ^= 1
    path.write_bytes(data)
    store = rocks(directory)
    readable = [
        key
        for key in (fragment_key(number) for number in range(400))
        if store.get_many([key])[0].status is OK
    ]
    assert 200 < len(readable) < 400
    clock = HandClock()
    node = StorageNode(IDENTITY, store, clock, at_once)
    await node.scrub(ScrubAction.START, 0)
    while (await node.summary()).scrub.running:
        await clock.sleep(await node.scrubber.step())
    scrub = (await node.summary()).scrub
    assert scrub.index_damaged
    assert scrub.fragments_done == len(readable)
    assert (await node.summary()).fault == "disk"
    store.close()


async def test_killed_in_mid_pass_a_node_goes_on_near_where_it_was(directory: Path) -> None:
    script = f"""
import asyncio, sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
from node_parts import IDENTITY, HandClock, at_once, fragment_record, rocks
from storage_node.node import StorageNode
from protocol.messages import ScrubAction

async def main():
    store = rocks(Path({str(directory)!r}))
    store.put_group([fragment_record(n, 10) for n in range({4 * STEP_KEYS})])
    clock = HandClock()
    node = StorageNode(IDENTITY, store, clock, at_once)
    await node.scrub(ScrubAction.START, 1000)
    for _ in range(3):
        clock.now += 3600
        await node.scrubber.step()
    print((await node.summary()).scrub.fragments_done, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""
    with start(script) as child:
        assert child.stdout is not None
        done = int(child.stdout.readline())
        os.kill(child.pid, signal.SIGKILL)
    assert done == 3 * STEP_KEYS
    store = rocks(directory)
    clock = HandClock()
    node = StorageNode(IDENTITY, store, clock, at_once)
    scrub = (await node.summary()).scrub
    assert (scrub.running, scrub.fragments_done) == (True, done)
    while (await node.summary()).scrub.running:
        clock.now += 3600
        await node.scrubber.step()
    assert (await node.summary()).scrub.fragments_done == 4 * STEP_KEYS
    store.close()


# -- space -------------------------------------------------------------------------------------


def taken(directory: Path) -> int:
    """What `du` says of the store."""
    return sum(path.stat().st_blocks * 512 for path in directory.glob("store/*"))


def test_after_deletes_and_upkeep_the_directory_takes_less(directory: Path) -> None:
    store = rocks(directory)
    for number in range(120):
        put(store, number)
    tidy_all(store)  # long files of live records
    before = taken(directory)
    gone = [number for number in range(120) if number % 5 < 3]
    store.delete_group([fragment_key(number) for number in gone])
    assert taken(directory) >= before
    tidy_all(store)
    assert taken(directory) < 0.45 * before
    counters = store.stats().counters
    assert (counters["dead_records"], counters["dead_bytes"]) == (0, 0)
    kept = [number for number in range(120) if number % 5 >= 3]
    assert_holds(store, *kept)
    store.close()
    store = rocks(directory)
    assert_holds(store, *kept)
    assert (store.stats().fragments, store.stats().fragment_bytes) == store.recount()
    store.close()


def test_what_is_set_aside_is_kept_by_upkeep_until_a_replacement_was_read_back(
    directory: Path,
) -> None:
    store = rocks(directory)
    for number in range(8):
        put(store, number)
    bad = fragment_key(2)
    store.put_group([(bad, noise(99, LARGE))])
    assert store.set_aside([bad], 1.0) == 1
    store.delete_group([fragment_key(number) for number in range(8) if number != 2])
    tidy_all(store)
    assert store.examine([bad])[0].record == noise(99, LARGE)
    put(store, 2)
    assert findings(store) == {}
    tidy_all(store)
    assert store.stats().counters["dead_records"] == 0
    assert_holds(store, 2)
    store.close()


@pytest.mark.parametrize("kill_at", ["survey", "compact", "settle"])
def test_killed_while_space_is_reclaimed_nothing_is_lost_and_the_space_comes_back(
    directory: Path, kill_at: str
) -> None:
    script = f"""
import os, signal, sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
from node_parts import fragment_key, fragment_record, rocks, LARGE
from storage_node.merge import Merger
from storage_node.rocks_ledger import Ledger
store = rocks(Path({str(directory)!r}))
for n in range(40):
    store.put_group([fragment_record(n, LARGE)])
store.delete_group([fragment_key(n) for n in range(40) if n % 4])
owner = Ledger if {kill_at!r} == "settle" else Merger
real = getattr(owner, {kill_at!r})
def watched(*arguments):
    done = real(*arguments) if {kill_at!r} != "settle" else None
    os.kill(os.getpid(), signal.SIGKILL)
setattr(owner, {kill_at!r}, watched)
store.tidy({64 * MIB})
"""
    done = subprocess.run([sys.executable, "-c", script], check=False)
    assert done.returncode == -signal.SIGKILL
    store = rocks(directory)
    assert_holds(store, *range(0, 40, 4))
    tidy_all(store)
    assert_holds(store, *range(0, 40, 4))
    assert store.stats().counters["dead_bytes"] == 0
    assert taken(directory) < 16 * LARGE
    assert (store.stats().fragments, store.stats().fragment_bytes) == store.recount()
    store.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 48 MB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(mount)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(f"this test mounts a tmpfs and needs root: {done.stderr.strip()}")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def test_on_a_disk_without_a_free_byte_reads_deletes_and_upkeep_work_and_puts_come_back(
    small_disk: Path,
) -> None:
    directory = small_disk / "node"
    store = rocks(directory, ballast_bytes=6 * MIB)
    put(store, *range(40))
    for number in range(40, 60):
        put(store, number)
    assert (directory / "ballast").stat().st_blocks * 512 == 6 * MIB
    fill_up(small_disk / "others")
    with pytest.raises(NodeFull):
        put(store, 100)
    assert_holds(store, *range(60))
    assert store.delete_group([fragment_key(n) for n in range(50)]) == [OK] * 50
    assert not (directory / "ballast").exists()
    store.put_state({"name": b"value"})
    tidy_all(store)
    assert os.statvfs(small_disk).f_bavail * 4096 > 10 * MIB
    put(store, 100)
    assert_holds(store, *range(50, 60), 100)
    tidy_all(store)
    store.close()
    store = rocks(directory, ballast_bytes=6 * MIB)
    assert_holds(store, *range(50, 60), 100)
    store.close()


def fill_up(path: Path) -> None:
    """Somebody else takes the rest of the disk."""
    with path.open("wb") as file:
        try:
            while True:
                file.write(bytes(64 * KIB))
                file.flush()
        except OSError:
            pass
        try:
            while True:
                os.write(file.fileno(), bytes(512))
        except OSError:
            return


def test_a_disk_that_was_full_at_the_start_is_opened_and_deletes_make_room(
    small_disk: Path,
) -> None:
    directory = small_disk / "node"
    store = rocks(directory, ballast_bytes=6 * MIB)
    put(store, *range(60), size=20 * KIB)
    for number in range(60, 100):
        put(store, number)
    store.close()
    fill_up(small_disk / "others")
    store = rocks(directory, ballast_bytes=6 * MIB)
    assert_holds(store, *range(60, 100))
    assert_holds(store, *range(60), size=20 * KIB)
    store.delete_group([fragment_key(n) for n in range(60, 100)])
    tidy_all(store)
    put(store, 200)
    assert_holds(store, 200)
    store.close()


def test_thresholds_hold_on_a_real_disk(small_disk: Path) -> None:
    directory = small_disk / "node"
    store = rocks(directory, shares=SpaceShares())
    stored = fill(store, 0, PutPurpose.CLIENT)
    space = store.space()
    assert space.used_bytes <= 0.9 * space.capacity_bytes
    assert space.is_short
    more = fill(store, 1000, PutPurpose.REPAIR)
    assert more
    assert store.delete_group([fragment_key(n) for n in stored[:20]]) == [OK] * 20
    tidy_all(store)
    put(store, 5000)
    assert_holds(store, *stored[20:], *more, 5000)
    store.close()


def fill(store: RocksStore, first: int, purpose: PutPurpose) -> list[int]:
    stored: list[int] = []
    try:
        for number in range(first, first + 1000):
            store.put_group([fragment_record(number, LARGE)], purpose)
            stored.append(number)
    except NodeFull:
        return stored
    except NodeRefuses as error:
        raise AssertionError("the store failed instead of refusing") from error
    raise AssertionError("the disk never filled up")
