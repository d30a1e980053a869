"""The fragment store on a real directory: what survives, what is refused, what is repaired."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from node_parts import IDENTITY, LARGE, formatted, fragment_key, noise, rocks
from rocksdict import Rdict, WriteBatch

from protocol.errors import (
    DirectoryCorrupt,
    DirectoryForeign,
    DirectoryInUse,
    NodeFull,
    NodeRefuses,
)
from protocol.ids import NodeId
from protocol.limits import KIB, MIB
from protocol.messages import ItemStatus
from storage_node import extents, merge, merge_plan, rocks_store
from storage_node.identity import Identity, initialise
from storage_node.interface import FragmentKey
from storage_node.rocks_options import StoreOptions
from storage_node.rocks_store import RocksStore, open_store

OK, CORRUPT, NOT_FOUND = ItemStatus.OK, ItemStatus.CORRUPT, ItemStatus.NOT_FOUND


def put(store: RocksStore, *numbers: int, size: int = LARGE) -> None:
    store.put_group([(fragment_key(number), noise(number, size)) for number in numbers])


def statuses(store: RocksStore, *numbers: int) -> list[ItemStatus]:
    return [answer.status for answer in store.get_many([fragment_key(n) for n in numbers])]


def assert_holds(store: RocksStore, *numbers: int, size: int = LARGE) -> None:
    for number in numbers:
        (answer,) = store.get_many([fragment_key(number)])
        assert answer.record == noise(number, size), number


def assert_counts_exact(store: RocksStore) -> None:
    stats = store.stats()
    assert (stats.fragments, stats.fragment_bytes) == store.recount()


def crash(store: RocksStore, directory: Path, copy: Path) -> Path:
    """What a SIGKILL now would leave: a copy of the files of the open store."""
    shutil.copytree(directory, copy)
    store.close()
    return copy


def flip_byte(path: Path, needle: bytes) -> None:
    data = bytearray(path.read_bytes())
    position = data.find(needle)
    assert position >= 0
    data[position + len(needle) // 2] ^= 1
    path.write_bytes(data)


def file_holding(directory: Path, needle: bytes) -> Path:
    (found,) = [path for path in directory.glob("store/*.sst") if needle in path.read_bytes()]
    return found


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return formatted(tmp_path / "node")


@pytest.fixture
def eager_merges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_plan, "RUN_FILES_MIN", 2)


# -- whose directory ---------------------------------------------------------------------------


def test_an_empty_directory_is_refused_and_stays_empty(tmp_path: Path) -> None:
    with pytest.raises(DirectoryForeign):
        open_store(tmp_path, IDENTITY)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_directory_is_refused_and_not_created(tmp_path: Path) -> None:
    with pytest.raises(DirectoryForeign):
        open_store(tmp_path / "gone", IDENTITY)
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize(
    "other",
    [
        Identity("cluster-2", IDENTITY.node_id, IDENTITY.store_id),
        Identity(IDENTITY.cluster_id, NodeId("node-02"), IDENTITY.store_id),
        Identity(IDENTITY.cluster_id, IDENTITY.node_id, "store-2"),
    ],
)
def test_a_foreign_directory_is_refused(tmp_path: Path, other: Identity) -> None:
    initialise(tmp_path / "node", other)
    with pytest.raises(DirectoryForeign):
        open_store(tmp_path / "node", IDENTITY)
    assert not (tmp_path / "node" / "store").exists()


def test_a_directory_whose_store_was_removed_is_refused_and_not_created_anew(
    directory: Path,
) -> None:
    rocks(directory).close()
    shutil.rmtree(directory / "store")
    with pytest.raises(DirectoryForeign):
        rocks(directory)
    assert not (directory / "store").exists()


def test_a_store_moved_in_from_another_directory_is_refused(
    directory: Path, tmp_path: Path
) -> None:
    other = Identity(IDENTITY.cluster_id, NodeId("node-02"), "store-2")
    initialise(tmp_path / "other", other)
    open_store(tmp_path / "other", other).close()
    rocks(directory).close()
    shutil.rmtree(directory / "store")
    shutil.move(tmp_path / "other" / "store", directory / "store")
    with pytest.raises(DirectoryForeign):
        rocks(directory)


def test_a_crash_while_the_store_is_first_created_does_not_lock_the_node_out(
    directory: Path, tmp_path: Path
) -> None:
    store = rocks(directory)
    shutil.copytree(directory, tmp_path / "copy")
    store.close()
    (tmp_path / "copy" / "fresh").touch()  # the crash came before the permission was withdrawn
    rocks(tmp_path / "copy").close()


def test_a_second_opener_is_told_that_the_directory_is_in_use(directory: Path) -> None:
    store = rocks(directory)
    with pytest.raises(DirectoryInUse):
        rocks(directory)
    put(store, 1)
    store.close()


@pytest.mark.parametrize("name", ["MANIFEST", "CURRENT"])
def test_a_damaged_catalogue_is_reported_as_a_corrupt_directory(directory: Path, name: str) -> None:
    store = rocks(directory)
    put(store, 1)
    store.close()
    (path,) = list((directory / "store").glob(f"{name}*"))
    path.write_bytes(os.urandom(200))
    with pytest.raises(DirectoryCorrupt):
        rocks(directory)


def test_a_missing_extent_is_reported_as_a_corrupt_directory(directory: Path) -> None:
    store = rocks(directory)
    put(store, 1)
    store.close()
    file_holding(directory, noise(1, LARGE)[:100]).unlink()
    with pytest.raises(DirectoryCorrupt):
        rocks(directory)


# -- crashes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [500, LARGE])
def test_every_acknowledged_record_is_there_after_a_crash(
    directory: Path, tmp_path: Path, size: int
) -> None:
    store = rocks(directory)
    for number in range(6):
        put(store, number, 100 + number, size=size)
    store.delete_group([fragment_key(3)])
    store = rocks(crash(store, directory, tmp_path / "copy"))
    assert_holds(store, *(n for n in range(6) if n != 3), *range(100, 106), size=size)
    assert statuses(store, 3) == [NOT_FOUND]
    assert_counts_exact(store)
    store.close()


def test_extents_whose_index_entries_were_lost_are_indexed_again(
    directory: Path, tmp_path: Path
) -> None:
    store = rocks(directory)
    put(store, 1)
    put(store, 2, 3)
    put(store, 2)  # replaces
    copy = crash(store, directory, tmp_path / "copy")
    for log in (copy / "store").glob("*.log"):
        log.write_bytes(b"")  # the power failed before any of the WAL reached the disk
    store = rocks(copy)
    assert_holds(store, 1, 2, 3)
    assert store.stats().counters["rolled_forward"] == 4
    assert store.stats().counters["dead_records"] == 1
    assert_counts_exact(store)
    store.close()


def test_a_crash_between_the_extent_and_its_index_entries_leaves_both_or_more(
    directory: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store = rocks(directory)
    put(store, 1)

    def power_cut(*_: object, **__: object) -> None:
        shutil.copytree(directory, tmp_path / "copy")
        raise RuntimeError("the machine is gone")

    monkeypatch.setattr(store._ledger, "commit", power_cut)
    with pytest.raises(DirectoryCorrupt):
        put(store, 2, 3)
    store.close()
    store = rocks(tmp_path / "copy")
    assert_holds(store, 1, 2, 3)
    assert_counts_exact(store)
    put(store, 4)
    assert_holds(store, 1, 2, 3, 4)
    store.close()


def test_a_crash_before_the_extent_is_taken_in_leaves_nothing(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = rocks(directory)
    put(store, 1)
    store.close()
    (directory / "incoming" / "0000000000000009.sst").write_bytes(b"half an extent")
    store = rocks(directory)
    assert list((directory / "incoming").iterdir()) == []
    assert_holds(store, 1)
    store.close()


def test_sequences_are_never_used_again(directory: Path, eager_merges: None) -> None:
    store = rocks(directory)
    put(store, 1)
    put(store, 2)
    put(store, 3, size=100)
    last = store._ledger.totals.last_sequence
    store.delete_group([fragment_key(n) for n in (1, 2, 3)])
    assert store.tidy(64 * MIB) > 0  # the highest extents are gone from the disk
    store.close()
    store = rocks(directory)
    assert store._ledger.totals.last_sequence >= last
    store.close()


def test_a_lost_wal_leaves_one_earlier_moment_and_no_acknowledged_extent_missing(
    directory: Path, tmp_path: Path
) -> None:
    store = rocks(directory)
    put(store, 1)
    put(store, 11, size=100)
    store.close()  # flushed
    store = rocks(directory)
    put(store, 2)
    put(store, 12, size=100)
    copy = crash(store, directory, tmp_path / "copy")
    for log in (copy / "store").glob("*.log"):
        log.unlink()
    store = rocks(copy)
    assert_holds(store, 1, 2)
    assert statuses(store, 11, 12) == [OK, NOT_FOUND]
    assert_counts_exact(store)
    put(store, 12, size=100)
    assert_holds(store, 11, 12, size=100)
    store.close()


# -- rot ---------------------------------------------------------------------------------------


def test_a_flipped_byte_in_an_extent_is_corrupt_for_its_own_key_only(directory: Path) -> None:
    store = rocks(directory)
    put(store, 1, 2, 3)
    put(store, 4)
    store.close()
    flip_byte(file_holding(directory, noise(2, LARGE)[:100]), noise(2, LARGE)[:100])
    store = rocks(directory)
    assert statuses(store, 1, 2, 3, 4, 5) == [OK, CORRUPT, OK, OK, NOT_FOUND]
    assert_holds(store, 1, 3, 4)
    store.put_group([(fragment_key(2), noise(2, LARGE))])  # repaired by writing it again
    assert_holds(store, 1, 2, 3, 4)
    store.close()


def test_a_flipped_byte_among_small_records_spares_other_blocks_of_the_file(
    directory: Path,
) -> None:
    store = rocks(directory)
    put(store, *range(40), size=5 * KIB)
    store.close()
    needle = noise(20, 5 * KIB)[:100]
    flip_byte(file_holding(directory, needle), needle)
    store = rocks(directory)
    bad = [n for n, status in enumerate(statuses(store, *range(40))) if status is CORRUPT]
    assert 20 in bad
    assert len(bad) <= 2
    assert_holds(store, *(n for n in range(40) if n not in bad), size=5 * KIB)
    store.close()


def test_an_unreadable_index_fails_the_inventory_instead_of_shortening_it(
    directory: Path,
) -> None:
    store = rocks(directory)
    put(store, *range(300), size=10)
    store.flush()
    (file,) = [
        file for file in store._database.live_files() if file["start_key"] == key_of_first(store)
    ]
    store.close()
    path = directory / "store" / file["name"].lstrip("/")
    data = bytearray(path.read_bytes())
    data[8000] ^= 1  # in the second of five blocks
    path.write_bytes(data)
    store = rocks(directory)
    with pytest.raises(DirectoryCorrupt):
        store.inventory(None, 1000)
    with pytest.raises(DirectoryCorrupt):
        store.recount()
    unknown = statuses(store, *range(300)).count(CORRUPT)
    assert 0 < unknown < 150
    assert NOT_FOUND not in statuses(store, *range(300))
    store.close()


def key_of_first(store: RocksStore) -> bytes:
    ((key, _),), _ = store.inventory(None, 1)
    return key.pack()


def test_a_record_in_another_records_place_is_corrupt(directory: Path) -> None:
    store = rocks(directory)
    put(store, 1, 2, size=100)
    places = store._ledger.places([fragment_key(1).pack(), fragment_key(2).pack()])
    swapped = WriteBatch(raw_mode=True)
    one, two = fragment_key(1).pack(), fragment_key(2).pack()
    swapped.put(
        extents.record_key(places[one].family, places[one].sequence, one),
        noise(2, 100),
        store._small_handle,
    )
    store._database.write(swapped)
    assert statuses(store, 1, 2) == [CORRUPT, OK]
    assert two in places
    store.close()


# -- failing writes ----------------------------------------------------------------------------


def test_after_a_failed_write_no_more_are_taken_until_the_store_is_opened_again(
    directory: Path,
) -> None:
    store = rocks(directory)
    put(store, 1)
    shutil.rmtree(directory / "incoming")  # the next extent cannot be written
    with pytest.raises(DirectoryCorrupt):
        put(store, 2)
    for attempt in range(2):
        with pytest.raises(NodeRefuses):
            put(store, 3 + attempt)
    with pytest.raises(NodeRefuses):
        store.delete_group([fragment_key(1)])
    with pytest.raises(NodeRefuses):
        store.put_state({"name": b"value"})
    assert_holds(store, 1)
    store.close()
    store = rocks(directory)
    put(store, 3)
    assert_holds(store, 1, 3)
    assert_counts_exact(store)
    store.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(mount)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(f"mounting a tmpfs needs root: {done.stderr.strip()}")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def fill(store: RocksStore, size: int) -> list[int]:
    """Put until the disk is full; the numbers that were acknowledged."""
    stored: list[int] = []
    try:
        for number in range(10_000):
            put(store, number, size=size)
            stored.append(number)
    except (NodeFull, NodeRefuses):
        assert stored
        return stored
    raise AssertionError("the disk never filled up")


@pytest.mark.parametrize("size", [LARGE, 8 * KIB])
def test_a_disk_that_fills_up_loses_nothing_and_is_used_again_when_there_is_room(
    small_disk: Path, size: int
) -> None:
    directory = small_disk / "node"
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(14 * MIB))
    store = rocks(directory)
    stored = fill(store, size)
    assert_holds(store, *stored, size=size)
    store.close()
    ballast.unlink()
    store = rocks(directory)
    assert_holds(store, *stored, size=size)
    assert store.delete_group([fragment_key(stored[0])]) == [OK]
    put(store, 20_000, size=size)
    assert_holds(store, *stored[1:], 20_000, size=size)
    assert_counts_exact(store)
    store.close()


def test_the_reserve_keeps_room_for_deletes_on_a_real_disk(small_disk: Path) -> None:
    directory = small_disk / "node"
    store = rocks(directory, reserve_bytes=6 * MIB)
    stored = fill(store, LARGE)
    assert store.delete_group([fragment_key(n) for n in stored]) == [OK] * len(stored)
    assert_counts_exact(store)
    store.close()


# -- upkeep ------------------------------------------------------------------------------------


def sst_files(directory: Path) -> int:
    return len(list(directory.glob("store/*.sst")))


def test_merging_leaves_one_file_and_every_record(directory: Path, eager_merges: None) -> None:
    store = rocks(directory)
    for number in range(12):
        put(store, number)
    assert sst_files(directory) >= 12
    assert store.tidy(64 * MIB) > 12 * LARGE
    assert store.tidy(64 * MIB) == 0
    assert sst_files(directory) <= 3
    assert_holds(store, *range(12))
    assert_counts_exact(store)
    store.close()
    store = rocks(directory)
    assert_holds(store, *range(12))
    store.close()


def test_merging_gives_the_space_of_deleted_and_replaced_records_back(
    directory: Path, eager_merges: None
) -> None:
    store = rocks(directory)
    for number in range(10):
        put(store, number)
    put(store, 3)
    store.delete_group([fragment_key(n) for n in range(6, 10)])
    assert store.stats().counters["dead_records"] == 5
    assert store.stats().disk_bytes > 11 * LARGE
    while store.tidy(64 * MIB):
        pass
    assert store.stats().counters["dead_records"] == 0
    assert store.stats().counters["dead_bytes"] == 0
    assert store.stats().disk_bytes < 6 * LARGE + 64 * KIB
    assert_holds(store, *range(6))
    assert statuses(store, 6, 9) == [NOT_FOUND] * 2
    store.close()


def test_small_records_are_merged_as_well(directory: Path, eager_merges: None) -> None:
    store = rocks(directory)
    for number in range(4):
        put(store, number, 10 + number, size=5 * KIB)
        store._small.flush()
    store.delete_group([fragment_key(10)])
    assert store.tidy(64 * MIB) > 0
    assert_holds(store, 0, 1, 2, 3, 11, 12, 13, size=5 * KIB)
    assert store.stats().counters["dead_records"] == 0
    assert_counts_exact(store)
    store.close()


@pytest.mark.parametrize("step", ["survey", "_drop_dead", "compact"])
def test_a_crash_at_any_step_of_a_merge_loses_and_hides_nothing(
    directory: Path,
    eager_merges: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    step: str,
) -> None:
    store = rocks(directory)
    for number in range(8):
        put(store, number)
    store.delete_group([fragment_key(2), fragment_key(7)])
    owner: object = store._upkeep if step == "_drop_dead" else merge.Merger
    copies: list[Path] = []
    real = getattr(owner, step)

    def watched(*arguments: object) -> object:
        shutil.copytree(directory, tmp_path / "before")
        done = real(*arguments)
        shutil.copytree(directory, tmp_path / "after")
        copies.extend((tmp_path / "before", tmp_path / "after"))
        return done

    monkeypatch.setattr(owner, step, watched)
    assert store.tidy(64 * MIB) > 0
    store.close()
    monkeypatch.setattr(owner, step, real)
    assert copies
    for copy in copies:
        store = rocks(copy)
        assert_holds(store, 0, 1, 3, 4, 5, 6)
        assert statuses(store, 2, 7) == [NOT_FOUND] * 2
        while store.tidy(64 * MIB):
            pass
        assert_holds(store, 0, 1, 3, 4, 5, 6)
        assert store.stats().counters["dead_records"] == 0
        assert_counts_exact(store)
        store.close()


def test_a_rotten_extent_is_left_alone_and_the_store_goes_on_writing(
    directory: Path, eager_merges: None
) -> None:
    store = rocks(directory)
    for number in range(6):
        put(store, number)
    store.close()
    needle = noise(2, LARGE)[:100]
    flip_byte(file_holding(directory, needle), needle)
    store = rocks(directory)
    while store.tidy(64 * MIB):
        pass
    assert store.stats().counters["merges_failed"] == 1
    assert statuses(store, *range(6)) == [OK, OK, CORRUPT, OK, OK, OK]
    put(store, 7)
    while store.tidy(64 * MIB):
        pass
    assert_holds(store, 0, 1, 3, 4, 5, 7)
    store.close()


def test_reads_beside_a_merge_always_find_their_records(
    directory: Path, eager_merges: None
) -> None:
    store = rocks(directory)
    for number in range(20):
        put(store, number)
    store.delete_group([fragment_key(5)])
    done = threading.Event()
    wrong: list[object] = []

    def read_on() -> None:
        keys = [fragment_key(number) for number in range(20)]
        expected = [None if number == 5 else noise(number, LARGE) for number in range(20)]
        while not done.is_set():
            answers = store.get_many(keys)
            wrong.extend(
                (number, answer.status)
                for number, answer in enumerate(answers)
                if answer.record != expected[number]
            )

    reader = threading.Thread(target=read_on, daemon=True)
    reader.start()
    try:
        for number in range(100, 106):
            assert store.tidy(64 * MIB) > 0
            put(store, number)
            put(store, number + 100)
    finally:
        done.set()
        reader.join()
    assert wrong == []
    assert_holds(store, *range(100, 106))
    store.close()


def test_a_raw_look_at_the_files_finds_the_documented_keys(directory: Path) -> None:
    store = rocks(directory)
    put(store, 1)
    put(store, 2, size=100)
    store.delete_group([fragment_key(2)])
    store.close()
    options = rocks_store.family_options(StoreOptions(), create=False)
    database = Rdict(str(directory / "store"), options.database, options.families)
    found: dict[str, list[bytes]] = {}
    for name in ("default", "index", "extents", "small"):
        family = database.get_column_family(name)
        entries = family.iter()
        entries.seek_to_first()
        found[name] = []
        while entries.valid():
            found[name].append(entries.key())
            entries.next()
        entries.status()
        del entries, family
    database.close()
    one, two = fragment_key(1).pack(), fragment_key(2).pack()
    sequence = [number.to_bytes(8, "big") for number in range(5)]
    assert found["index"] == [one]
    assert found["extents"] == [b"E" + sequence[1], b"E" + sequence[2] + one, b"E" + sequence[3]]
    assert found["small"] == [b"S" + sequence[4] + two]
    assert found["default"] == [
        b"dead/S" + sequence[4] + two,
        b"state/store_id",
        b"totals",
    ]
    assert FragmentKey.unpack(one) == fragment_key(1)
