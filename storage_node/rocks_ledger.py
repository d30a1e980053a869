"""What a node's index says, and the counts that go with it: written in one batch, always.

Step "write the index entries" of a put, a delete and a merge: `RocksStore` and `rocks_upkeep` fill
a batch and commit it here, under the store's lock.  Records that lose their index entry are marked
as dead until their space has come back (`storage_node/merge.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rocksdict import ColumnFamily, Rdict, WriteBatch

from storage_node import merge
from storage_node.extents import Place, pack_place, record_key, unpack_place
from storage_node.rocks_options import synced
from storage_node.rocks_read import fetch
from storage_node.totals import TOTALS_KEY, Totals

_UNSYNCED_GROUPS_MAX = 64
"""Bounds what an open after a power cut has to index again."""


class Ledger:
    """Index, totals and marks of one open store.  Raises what rocksdict raises."""

    def __init__(
        self, database: Rdict, index: Rdict, index_handle: ColumnFamily, counters: dict[str, int]
    ) -> None:
        """`counters` are the store's."""
        self.totals = Totals()
        self._database = database
        self._index = index
        self._index_handle = index_handle
        self._counters = counters
        self._synced = synced()
        self._unsynced_groups = 0

    def load(self) -> None:
        """Begin with the totals that were written last."""
        row = self._database.get(TOTALS_KEY)
        if row is not None:
            self.totals = Totals.unpack(row)

    def let_go(self) -> None:
        """RocksDB keeps its LOCK while any object still refers to it."""
        del self._database, self._index, self._index_handle

    @property
    def must_sync(self) -> bool:
        """Whether the next commit has to be synced whatever it holds."""
        return self._unsynced_groups >= _UNSYNCED_GROUPS_MAX

    def places(self, keys: list[bytes]) -> dict[bytes, Place]:
        """Index entries of those keys that have one."""
        entries = fetch(self._index, keys)
        return {
            key: unpack_place(entry)
            for key, entry in zip(keys, entries, strict=True)
            if entry is not None
        }

    def add_places(
        self, batch: WriteBatch, placed: Sequence[tuple[bytes, Place]], old: Mapping[bytes, Place]
    ) -> Totals:
        """Put index entries into `batch`, and marks for the `old` ones that they replace."""
        for key, place in placed:
            batch.put(key, pack_place(place), self._index_handle)
        for key, place in old.items():
            _add_dead(batch, key, place)
        return self.totals.died(len(old), _length(old)).stored(
            len(placed), sum(place.length for _, place in placed)
        )

    def remove(self, batch: WriteBatch, known: Mapping[bytes, Place]) -> Totals:
        """Put the end of index entries into `batch`."""
        for key, place in known.items():
            batch.delete(key, self._index_handle)
            _add_dead(batch, key, place)
        return self.totals.died(len(known), _length(known))

    def commit(self, batch: WriteBatch, totals: Totals, *, sync: bool) -> None:
        """Write `batch` together with the totals that hold after it."""
        batch.put(TOTALS_KEY, totals.pack())
        if sync:
            self._database.write(batch, self._synced)
            self._unsynced_groups = 0
            self._counters["batches_synced"] += 1
        else:
            self._database.write(batch)
            self._unsynced_groups += 1
            self._counters["extents_written"] += 1
        self.totals = totals

    def sync(self) -> None:
        """Make durable what was committed without a sync."""
        self._database.flush_wal(True)
        self._unsynced_groups = 0

    def settle(self, gone: list[bytes]) -> None:
        """Take the marks of records away that are gone now."""
        marks = [merge.dead_key(key) for key in gone]
        values = fetch(self._database, marks)
        known = {
            mark: value for mark, value in zip(marks, values, strict=True) if value is not None
        }
        if not known:
            return
        batch = WriteBatch(raw_mode=True)
        for mark in known:
            batch.delete(mark)
        length = sum(map(merge.unpack_dead, known.values()))
        self.commit(batch, self.totals.reclaimed(len(known), length), sync=True)


def _add_dead(batch: WriteBatch, key: bytes, place: Place) -> None:
    mark = merge.dead_key(record_key(place.family, place.sequence, key))
    batch.put(mark, merge.pack_dead(place.length))


def _length(places: Mapping[bytes, Place]) -> int:
    return sum(place.length for place in places.values())
