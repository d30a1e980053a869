"""The fragment store of a real node: index and extents in one RocksDB.

Last step of a put on a node, and the only step of a get there: `StorageNode` calls it, through an
executor.  May not import asyncio, ray, or anything above `storage_node`.

A put makes its records durable first (large ones in an extent, `storage_node/extents.py`), then
writes the index entries in one batch with the totals (`rocks_ledger`).  Small records travel in
that batch, which is then synced.  After an extent no sync is needed: were the tail of the WAL
lost, the next open indexes the extent again from its own table (`roll_forward`).

What RocksDB does badly and this file works around: one bad key fails a whole multi-get (asked
again one by one); `keys()` and its kin end silently at a bad record (only `iter()` with `status()`
is used); after a failed sync every write fails (`write_guard` says so and refuses).
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rocksdict import Rdict, WriteBatch

from protocol.errors import (
    DirectoryForeign,
    NodeFull,
    NodeRefuses,
)
from protocol.hashing import Buffer, checksum64
from protocol.limits import FRAME_BODY_BYTES_MAX
from protocol.messages import ItemStatus, PutPurpose
from storage_node import findings as book
from storage_node import identity, merge
from storage_node.extents import (
    Family,
    Item,
    Place,
    family_of,
    record_key,
    sequence_of,
    write_extent,
)
from storage_node.identity import INCOMING_DIRECTORY, STORE_DIRECTORY, Identity
from storage_node.interface import (
    Finding,
    FragmentKey,
    NewestPage,
    StoredRecord,
    StoreStats,
)
from storage_node.rocks_errors import DiskFailure, classify, open_error, reading, write_error
from storage_node.rocks_findings import RocksFindings
from storage_node.rocks_ledger import Ledger
from storage_node.rocks_options import (
    EXTENTS_FAMILY,
    INDEX_FAMILY,
    SMALL_FAMILY,
    StoreOptions,
    family_options,
    move_into_place,
    synced,
)
from storage_node.rocks_read import Reader
from storage_node.rocks_upkeep import Upkeep
from storage_node.roll_forward import unindexed_groups
from storage_node.space import Space, space_of
from storage_node.write_guard import WriteGuard

_STORE_ID = "store_id"


def open_store(
    directory: Path, expected: Identity, options: StoreOptions | None = None
) -> RocksStore:
    """Open the store of `expected`; create it only where it was never created before.

    Raises `DirectoryForeign`, `DirectoryInUse`, `DirectoryCorrupt` or `NodeFull`.
    """
    identity.expect(directory, expected)
    fresh = identity.is_fresh(directory)
    store = RocksStore(directory, options or StoreOptions(), create=fresh)
    try:
        owner = store.get_state(_STORE_ID)
        if owner is None and fresh:
            store.put_state({_STORE_ID: expected.store_id.encode()})
            store.flush()  # whose store it is must outlive a lost WAL
        elif owner != expected.store_id.encode():
            raise DirectoryForeign(
                f"the store in {directory} is that of {owner!r}, not {expected.store_id!r}",
                {"directory": str(directory)},
            )
        if fresh:
            identity.mark_created(directory)
    except BaseException:
        store.close()
        raise
    return store


class RocksStore:
    """`FragmentStore` on a directory.  Writes come one at a time; reads and `tidy` may run beside
    them, on other threads."""

    def __init__(self, directory: Path, options: StoreOptions, *, create: bool = False) -> None:
        self._directory = directory
        self._options = options
        self._incoming = directory / INCOMING_DIRECTORY
        self._families = family_options(options, create=create)
        self._ingest = move_into_place()
        self._synced = synced()
        self._guard = WriteGuard(directory, options)
        self._counters = dict.fromkeys(
            ("extents_written", "batches_synced", "rolled_forward", "tables_unreadable"), 0
        )
        path = directory / STORE_DIRECTORY
        if not create and not (path / "CURRENT").exists():
            raise DirectoryForeign(
                f"{directory} holds no store where one was created before",
                {"directory": str(directory)},
            )
        self._guard.balance()
        try:
            self._open(path)
        except Exception as error:
            raise open_error(error, directory) from error
        self._bulk = {Family.EXTENTS: self._extents, Family.SMALL: self._small}
        self._reader = Reader(self._index, self._bulk)
        self._ledger = Ledger(self._database, self._index, self._index_handle, self._counters)
        self._findings = RocksFindings(self._database, self._index, self._reader)
        # No local variable here may refer to RocksDB: in an error's frame it would hold the LOCK.
        self._upkeep = Upkeep(
            directory,
            merge.Merger(self._database, self._bulk, self._index, self._findings.found),
            self._ledger,
            self._guard,
            {Family.EXTENTS: self._extents_handle, Family.SMALL: self._small_handle},
        )
        try:
            self._recover()
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # its iterators would hold the LOCK
            self.close()
            raise

    def _open(self, path: Path) -> None:
        self._incoming.mkdir(mode=0o700, exist_ok=True)
        self._database = Rdict(str(path), self._families.database, self._families.families)
        self._index = self._database.get_column_family(INDEX_FAMILY)
        self._extents = self._database.get_column_family(EXTENTS_FAMILY)
        self._small = self._database.get_column_family(SMALL_FAMILY)
        self._index_handle = self._database.get_column_family_handle(INDEX_FAMILY)
        self._extents_handle = self._database.get_column_family_handle(EXTENTS_FAMILY)
        self._small_handle = self._database.get_column_family_handle(SMALL_FAMILY)

    # -- opening ---------------------------------------------------------------------------

    def _recover(self) -> None:
        """Read the totals, index what lost its index entries, find the next sequence."""
        for leftover in self._incoming.glob("*.sst"):
            leftover.unlink()  # never ingested: its put was not acknowledged
        with reading(self._directory):
            self._ledger.load()
            self._findings.load()
            found = unindexed_groups(
                self._database.live_files(), self._extents, self._ledger.totals.last_sequence
            )
        self._counters["tables_unreadable"] = found.unreadable
        for group in found.groups:
            with self._guard.writing("indexing an extent again"):
                self._index_again(group)
        with reading(self._directory):
            last = max(
                self._ledger.totals.last_sequence,
                *map(self._last_sequence, self._bulk),
            )
        self._ledger.totals = self._ledger.totals.up_to(last)

    def _last_sequence(self, family: Family) -> int:
        """From the last block of the newest file; where that is bad, from the manifest, which knows
        the last key of each file.  One bad block must not keep all others from being served."""
        try:
            entries = self._bulk[family].iter()
            entries.seek_to_last()
            last = sequence_of(entries.key()) if entries.valid() else 0
            entries.status()
        except Exception as error:  # rocksdict raises plain Exception
            if classify(error) is not DiskFailure.CORRUPT:
                raise
            ends = [file["end_key"] for file in self._database.live_files()]
            return max((sequence_of(key) for key in ends if family_of(key) is family), default=0)
        return last

    def _index_again(self, group: list[tuple[bytes, Place]]) -> None:
        batch = WriteBatch(raw_mode=True)
        here = dict(group)
        known = self._ledger.places(list(here))
        # An entry that is there already was only not counted: a family was flushed by itself.
        old = {key: place for key, place in known.items() if place != here[key]}
        totals = self._ledger.add_places(batch, group, old)
        last = group[-1][1].sequence + 1  # the end mark's
        self._ledger.commit(batch, totals.up_to(max(last, totals.last_sequence)), sync=True)
        self._counters["rolled_forward"] += len(group)

    # -- writing ---------------------------------------------------------------------------

    def put_group(
        self,
        records: Sequence[tuple[FragmentKey, Buffer]],
        purpose: PutPurpose = PutPurpose.CLIENT,
    ) -> None:
        """Store all; durable on return.  Raises `NodeFull`, `NodeRefuses`, `DirectoryCorrupt`."""
        latest = {key.pack(): record for key, record in records}
        if not latest:
            return
        with self._guard.lock:
            self._guard.check_writable()
            size = sum(len(record) for record in latest.values())
            self._check_room(size, purpose)
            with self._guard.writing("storing a group"):
                self._put(
                    [
                        Item(key, record if type(record) is bytes else bytes(record), 0)
                        for key, record in latest.items()
                    ]
                )
                if self._findings.found:
                    self._findings.end_replaced(
                        [key for key in latest if key in self._findings.found]
                    )

    def _put(self, items: list[Item]) -> None:
        items = [item._replace(checksum=checksum64(item.record)) for item in items]
        old = self._ledger.places([item.key for item in items])
        large, small = self._split(items)
        sequence = self._ledger.totals.last_sequence + 1
        placed: list[tuple[bytes, Place]] = []
        batch = WriteBatch(raw_mode=True)
        if large:
            after = self._add_extent(sequence, large)
            placed = [
                (item.key, Place(Family.EXTENTS, sequence + 1 + n, len(item.record), item.checksum))
                for n, item in enumerate(large)
            ]
            sequence = after
        for item in small:
            place = Place(Family.SMALL, sequence, len(item.record), item.checksum)
            batch.put(record_key(Family.SMALL, sequence, item.key), item.record, self._small_handle)
            placed.append((item.key, place))
            sequence += 1
        totals = self._ledger.add_places(batch, placed, old)
        sync = bool(small) or self._ledger.must_sync
        self._ledger.commit(batch, totals.up_to(sequence - 1), sync=sync)

    def _split(self, items: list[Item]) -> tuple[list[Item], list[Item]]:
        """What goes into an extent, and what goes into the batch."""
        floor = self._options.large_record_bytes
        large = [item for item in items if len(item.record) >= floor]
        if sum(len(item.record) for item in large) < self._options.ingest_bytes:
            return [], items
        if len(large) == len(items):
            return large, []
        return large, [item for item in items if len(item.record) < floor]

    def _add_extent(self, sequence: int, items: list[Item]) -> int:
        path = self._incoming / f"{sequence:016x}.sst"
        try:
            after = self._write_extent(path, sequence, items)
            self._extents.ingest_external_file([str(path)], self._ingest)
        except BaseException:
            with suppress(OSError):
                path.unlink(missing_ok=True)
            raise
        return after

    def _write_extent(self, path: Path, sequence: int, items: list[Item]) -> int:
        """A disk that fills up while the file is written has lost nothing: the store goes on."""
        try:
            return write_extent(self._families.extents, path, sequence, items)
        except Exception as error:
            if classify(error) is not DiskFailure.NO_SPACE:
                raise
            raise write_error(error, self._directory) from error

    def delete_group(self, keys: Sequence[FragmentKey]) -> list[ItemStatus]:
        """Take out of the index; durable on return.  Space comes back when extents are merged."""
        packed = [key.pack() for key in keys]
        with self._guard.lock:
            self._guard.check_writable()
            self._guard.make_room()
            with self._guard.writing("deleting a group"):
                known = self._ledger.places(list(dict.fromkeys(packed)))
                if known:
                    batch = WriteBatch(raw_mode=True)
                    totals = self._ledger.remove(batch, known)
                    for key in known:
                        batch.delete(book.finding_row_key(key))
                    self._ledger.commit(batch, totals, sync=True)
                for key in known:
                    self._findings.found.pop(key, None)
        return [ItemStatus.OK if key in known else ItemStatus.NOT_FOUND for key in packed]

    def put_state(self, values: dict[str, bytes]) -> None:
        """Set node state; durable on return."""
        with self._guard.lock:
            self._guard.check_writable()
            self._guard.make_room()
            with self._guard.writing("writing node state"):
                batch = WriteBatch(raw_mode=True)
                for name, value in values.items():
                    batch.put(_state_key(name), value)
                self._database.write(batch, self._synced)

    def flush(self) -> None:
        """Move what is in memory and in the WAL into files."""
        with self._guard.lock, self._guard.writing("flushing"):
            for family in (self._index, self._small, self._database):  # totals last
                family.flush()

    def _check_room(self, size: int, purpose: PutPurpose) -> None:
        space = self.space()
        free = space.free_for(purpose)
        if free < size:
            raise NodeFull(
                f"{self._directory} takes no more {purpose.name.lower()} puts: {free} bytes are "
                f"left for them of a capacity of {space.capacity_bytes}, {space.used_bytes} are "
                "used; reads and deletes go on",
                {"directory": str(self._directory), "needed": size, "free": free},
            )

    # -- reading ---------------------------------------------------------------------------

    def get_many(
        self, keys: Sequence[FragmentKey], bytes_max: int = FRAME_BODY_BYTES_MAX
    ) -> list[StoredRecord]:
        """One answer per key, in order; each record matched the checksum in its index entry."""
        if self._guard.closed:
            raise NodeRefuses(f"{self._directory} is closed")
        answers = self._reader.get_many(keys, bytes_max)
        if self._findings.found:
            for number, key in enumerate(keys):
                finding = self._findings.found.get(key.pack())
                if finding is not None and finding.status is ItemStatus.CORRUPT:
                    answers[number] = StoredRecord(ItemStatus.CORRUPT, None)
        return answers

    def inventory(
        self, after: FragmentKey | None, limit: int
    ) -> tuple[list[tuple[FragmentKey, int]], bool]:
        """A page of the index.  Raises `DirectoryCorrupt` where it cannot be read."""
        with reading(self._directory):
            return self._reader.inventory(after, limit)

    def get_state(self, name: str) -> bytes | None:
        """Node state; None if never set."""
        with reading(self._directory):
            value: bytes | None = self._database.get(_state_key(name))
        return value

    # -- what went bad -------------------------------------------------------------------------

    def newest(self, bound: bytes | None, limit: int, bytes_max: int) -> NewestPage:
        """A page of the index in reverse order; what cannot be read of it is passed over."""
        return self._reader.newest(bound, limit, bytes_max)

    def examine(self, keys: Sequence[FragmentKey]) -> list[StoredRecord]:
        """Read records, also those set aside; one that is gone answers NOT_FOUND."""
        return self._findings.examine(keys)

    def set_aside(self, keys: Sequence[FragmentKey], at: float) -> int:
        """Look once more, and note what is still bad; durable on return."""
        with self._guard.lock:
            self._guard.check_writable()
            self._guard.make_room()
            with self._guard.writing("setting fragments aside"):
                return self._findings.set_aside(keys, at)

    def findings(self, after: FragmentKey | None, limit: int) -> tuple[list[Finding], bool]:
        """A page of open findings in key order."""
        return book.page_of(self._findings.found, after, limit)

    # -- upkeep ----------------------------------------------------------------------------

    def tidy(self, budget_bytes: int) -> int:
        """Rewrite one run of neighbouring extents, dropping what was deleted from them.

        Crash-safe at every step; see `storage_node/merge.py`.
        """
        self._guard.balance()
        return self._upkeep.tidy(
            budget_bytes,
            lambda: self._options.free_bytes(self._directory),
            lambda: self.space().is_short,
        )

    def stats(self) -> StoreStats:
        """Counts as of the last write."""
        totals = self._ledger.totals
        with reading(self._directory):
            disk = sum(
                family.property_int_value("rocksdb.total-sst-files-size") or 0
                for family in (self._index, self._extents, self._small, self._database)
            )
        counters = {
            **self._counters,
            **self._upkeep.merger.counters,
            "dead_records": totals.dead_records,
            "dead_bytes": totals.dead_bytes,
            "findings": len(self._findings.found),
        }
        return StoreStats(totals.fragments, totals.fragment_bytes, disk, counters)

    def space(self) -> Space:
        """What the records take, deleted ones too, and what puts may still take."""
        options = self._options
        return space_of(
            self._ledger.totals.fragment_bytes + self._ledger.totals.dead_bytes,
            options.free_bytes(self._directory),
            options.capacity_bytes,
            options.reserve_bytes,
            options.shares,
        )

    def recount(self) -> tuple[int, int]:
        """Fragments and bytes by reading the whole index (about 1 us an entry): for a check of
        the totals, never at start."""
        with reading(self._directory):
            return self._reader.recount()

    def close(self) -> None:
        """Flush and let go of the directory.  Idempotent."""
        if self._guard.closed:
            return
        with self._guard.lock:
            self._guard.closed = True
            # RocksDB keeps the LOCK while any object still refers to it.
            self._ledger.let_go()
            self._findings.let_go()
            del self._upkeep, self._reader, self._bulk
            del self._index, self._extents, self._small
            del self._index_handle, self._extents_handle, self._small_handle
            try:
                self._database.close()
            except Exception as error:  # noqa: BLE001  rocksdict raises nothing more precise
                # It could not move the WAL's content into files, on a full or failing disk.  What
                # was acknowledged is in the WAL or in extents, and is found there at the next open.
                self._guard.failure = self._guard.failure or f"closing failed: {error}"
            del self._database
        # Errors met while reading hold their frames, and those iterators, until this runs.
        gc.collect()


def _state_key(name: str) -> bytes:
    return b"state/" + name.encode()
