"""Read the store of a node that does not run, without changing a byte of its directory.

Used by `cluster.fsck` on a stopped cell.  The node's own `RocksStore` would not do: opening it
indexes extents again, flushes the WAL and takes the lock.  Here RocksDB opens read-only and
replays the WAL into memory.

rocksdict rewrites a small file of its own at every open, whatever the access.  So RocksDB is shown
a directory of symbolic links, in the system's place for temporary files: what is written goes
there, and a disk mounted read-only can be read.

What a crash left for the next open to index (`roll_forward`) is laid over the index in memory: a
check sees what the node will see once it runs.
"""

from __future__ import annotations

import heapq
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from rocksdict import AccessType, Rdict

from protocol.errors import DirectoryForeign
from protocol.ids import VolumeId
from protocol.messages import ItemStatus
from storage_node import identity
from storage_node.extents import Family, Place, record_key, unpack_place
from storage_node.identity import STORE_DIRECTORY
from storage_node.interface import StoredRecord
from storage_node.rocks_errors import open_error, reading
from storage_node.rocks_options import (
    EXTENTS_FAMILY,
    INDEX_FAMILY,
    SMALL_FAMILY,
    StoreOptions,
    family_options,
)
from storage_node.rocks_read import fetch_each, verified
from storage_node.roll_forward import unindexed_groups
from storage_node.totals import TOTALS_KEY, Totals

_CONFIG_FILE: Final = "rocksdict-config.json"
_NOT_LINKED: Final = frozenset({_CONFIG_FILE, "LOCK", "LOG"})
_STATE: Final = b"state/"
_EPOCH: Final = b"state/epoch/"


class NodeState(NamedTuple):
    """What a node had written down about itself."""

    store_id: str
    incarnation: int
    """The highest it ever adopted; zero if it never had a lease."""
    volume_epochs: dict[VolumeId, int]
    """The highest epoch of each volume of which it was ever given a record."""


class OfflineStore:
    """One node directory, opened for reading.  Not for use by several threads."""

    def __init__(self, directory: Path) -> None:
        """Raises `DirectoryForeign` without an identity or a store, `DirectoryCorrupt` for a store
        that RocksDB cannot open, `FormatUnsupported` for a newer version's."""
        self.directory = directory
        self.identity = identity.load(directory)
        self._shown = Path(tempfile.mkdtemp(prefix="haversack-fsck-"))
        try:
            self._open(directory / STORE_DIRECTORY)
        except BaseException:
            self.close()
            raise

    def _open(self, path: Path) -> None:
        if not (path / "CURRENT").exists():
            raise DirectoryForeign(
                f"{self.directory} holds no store", {"directory": str(self.directory)}
            )
        for entry in path.iterdir():
            if entry.name == _CONFIG_FILE:
                shutil.copyfile(entry, self._shown / entry.name)
            elif entry.name not in _NOT_LINKED:
                (self._shown / entry.name).symlink_to(entry.absolute())
        families = family_options(StoreOptions(), create=False)
        try:
            self._database = Rdict(
                str(self._shown), families.database, families.families, AccessType.read_only(False)
            )
        except Exception as error:
            raise open_error(error, self.directory) from error
        self._index = self._database.get_column_family(INDEX_FAMILY)
        extents = self._database.get_column_family(EXTENTS_FAMILY)
        self._bulk = {
            Family.EXTENTS: extents,
            Family.SMALL: self._database.get_column_family(SMALL_FAMILY),
        }
        with reading(self.directory):
            row = self._database.get(TOTALS_KEY)
            self.totals = Totals() if row is None else Totals.unpack(row)
            found = unindexed_groups(
                self._database.live_files(), extents, self.totals.last_sequence
            )
        latest = dict(item for group in found.groups for item in group)
        self.unindexed = len(latest)
        """Records that the next start of the node will index again."""
        self.tables_unreadable = found.unreadable
        self._unindexed = sorted(latest.items())

    def places(
        self, start: bytes = b"", stop: bytes | None = None
    ) -> Iterator[tuple[bytes, Place]]:
        """Packed fragment keys from `start` up to `stop`, in order, each with its place.

        Raises `DirectoryCorrupt` where the index cannot be read; it is never shortened.
        """
        late = [
            item
            for item in self._unindexed
            if start <= item[0] and (stop is None or item[0] < stop)
        ]
        if not late:
            yield from self._indexed(start, stop)
            return
        again = {key for key, _ in late}
        indexed = (item for item in self._indexed(start, stop) if item[0] not in again)
        yield from heapq.merge(indexed, late)

    def _indexed(self, start: bytes, stop: bytes | None) -> Iterator[tuple[bytes, Place]]:
        with reading(self.directory):
            entries = self._index.iter()
            entries.seek(start)
        while entries.valid():
            key = entries.key()
            if stop is not None and key >= stop:
                return
            with reading(self.directory):
                place = unpack_place(entries.value())
            yield key, place
            entries.next()
        with reading(self.directory):
            entries.status()

    def read(self, wanted: Sequence[tuple[bytes, Place]]) -> list[StoredRecord]:
        """The records of index entries, in order, each compared with the checksum of its entry.

        NOT_FOUND: nothing lies where the entry says.
        """
        answers = [StoredRecord(ItemStatus.NOT_FOUND, None)] * len(wanted)
        by_family: dict[Family, list[int]] = {}
        for number, (_, place) in enumerate(wanted):
            by_family.setdefault(place.family, []).append(number)
        for family, numbers in by_family.items():
            keys = [record_key(family, wanted[n][1].sequence, wanted[n][0]) for n in numbers]
            for number, record in zip(numbers, fetch_each(self._bulk[family], keys), strict=True):
                if record is not None:
                    answers[number] = verified(record, wanted[number][1])
        return answers

    def node_state(self) -> NodeState:
        """What the node keeps besides fragments.  Raises `DirectoryCorrupt`."""
        with reading(self.directory):
            owner = self._database.get(_STATE + b"store_id")
            incarnation = self._database.get(_STATE + b"incarnation")
            epochs: dict[VolumeId, int] = {}
            entries = self._database.iter()
            entries.seek(_EPOCH)
            while entries.valid() and entries.key().startswith(_EPOCH):
                volume = VolumeId.parse(entries.key()[len(_EPOCH) :].decode("ascii"))
                epochs[volume] = int.from_bytes(entries.value(), "big")
                entries.next()
            entries.status()
        return NodeState(
            "" if owner is None else owner.decode("ascii", "replace"),
            0 if incarnation is None else int.from_bytes(incarnation, "big"),
            epochs,
        )

    def close(self) -> None:
        """Let go of the files.  Idempotent."""
        for name in ("_index", "_bulk"):
            self.__dict__.pop(name, None)
        database: Any = self.__dict__.pop("_database", None)
        if database is not None:
            database.close()
        shutil.rmtree(self._shown, ignore_errors=True)
