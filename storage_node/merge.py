"""Upkeep of extents: runs of neighbouring files are rewritten as one, without their dead records.

Called by `RocksStore.tidy`, which the node runs when it is idle, or short of space.  Two reasons:
one group commit leaves one file, and RocksDB's work per ingestion grows with their number
(`merge_plan`); and deleted records take space until their file is rewritten (`reclaim`).

    plan      which run of neighbours to rewrite                  (pure, both)
    survey    read the whole run; list the records no index entry points to
    drop      tombstones for these, in one synced batch            (`RocksStore`)
    compact   RocksDB rewrites the run: new file durable, then the old ones go
    settle    remove the `dead/` marks of what is gone, and count  (`RocksStore`)

A crash between any two leaves the same records readable: a tombstone only ever covers a record
that no index entry names, and RocksDB swaps files in one manifest write.  Marks go last, so that
space which did not come back is planned for again; a mark whose record is gone is noticed by the
next survey.  The survey comes first because a checksum error met by a compaction would stop all
writes of the store; a file that cannot be read is left alone.  A record that is set aside, or that
would replace one, counts as live until its finding ends.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from rocksdict import BottommostLevelCompaction, CompactOptions, Rdict

from storage_node.extents import (
    Family,
    family_of,
    fragment_of,
    is_table,
    sequence_of,
    unpack_place,
)
from storage_node.merge_plan import ExtentFile, MergePlan, extent_files, plan_merge
from storage_node.reclaim import (
    DEAD_BYTES_MIN,
    DEAD_SHARE_MIN,
    DEAD_SHARE_MIN_SHORT,
    dead_records,
    plan_reclaim,
)
from storage_node.rocks_read import fetch

_DEAD_PREFIX = b"dead/"
_LENGTH = struct.Struct("<I")

_LOOKUPS_AT_ONCE = 512
_STALE_AT_ONCE = 4_096


def dead_key(record_key: bytes) -> bytes:
    """Where the default family notes that a record is not indexed any more."""
    return _DEAD_PREFIX + record_key


def pack_dead(length: int) -> bytes:
    """Value of a `dead/` mark."""
    return _LENGTH.pack(length)


def unpack_dead(value: bytes) -> int:
    """Length of a dead record, bytes."""
    (length,) = _LENGTH.unpack(value)
    return int(length)


class Survey(NamedTuple):
    """What reading a run showed."""

    dead: list[bytes]
    """Keys of records without an index entry, and of the marks of groups that hold no other."""
    stale: list[bytes]
    """Keys of records that are marked as dead and are not there any more."""


@dataclass(slots=True)
class Merger:
    """Carries merge plans out on one open store."""

    database: Rdict
    families: dict[Family, Rdict]
    index: Rdict
    set_aside: Mapping[bytes, object]
    """Fragment keys with an open finding: no record of theirs is dropped, old or new."""
    counters: dict[str, int] = field(
        default_factory=lambda: {"merges": 0, "merged_bytes": 0, "merges_failed": 0, "files": 0}
    )
    skip: set[str] = field(default_factory=set)
    """Files that could not be read or merged, until the store is opened again."""

    def plan(
        self, budget_bytes: int, *, dead_bytes: int, room_bytes: int, is_short: bool
    ) -> MergePlan | None:
        """What to rewrite now; no put may be between its extent and its index entries.

        `dead_bytes` are those of the whole store, `room_bytes` what a rewrite may take for a while.
        """
        files = extent_files(self.database.live_files())
        self.counters["files"] = len(files)
        if dead_bytes >= DEAD_BYTES_MIN:
            reclaim = plan_reclaim(
                files,
                dead_records(files, self._marks(b"")).bytes_by_file,
                budget_bytes,
                room_bytes=room_bytes,
                share_min=DEAD_SHARE_MIN_SHORT if is_short else DEAD_SHARE_MIN,
                skip=self.skip,
            )
            if reclaim is not None:
                return reclaim
        return plan_merge(files, min(budget_bytes, room_bytes), skip=self.skip)

    def stale_marks(self) -> list[bytes]:
        """Keys of records that are marked as dead, and lie in no file and no memory any more: a
        crash came between their rewriting and the settling of their marks."""
        files = extent_files(self.database.live_files())
        homeless = dead_records(files, self._marks(b"")).homeless[:_STALE_AT_ONCE]
        stale: list[bytes] = []
        for family, records in self.families.items():
            keys = [key for key in homeless if family_of(key) is family]
            found = zip(keys, fetch(records, keys), strict=True)
            stale += [key for key, record in found if record is None]
        return stale

    def _marks(self, first: bytes, last: bytes | None = None) -> Iterator[tuple[bytes, int]]:
        """Record keys and lengths of dead records that may be dropped, from `first` to `last`."""
        rows = self.database.iter()
        rows.seek(dead_key(first))
        while rows.valid() and rows.key().startswith(_DEAD_PREFIX):
            key = rows.key()[len(_DEAD_PREFIX) :]
            if last is not None and key > last:
                break
            if fragment_of(key) not in self.set_aside:
                yield key, unpack_dead(rows.value())
            rows.next()
        rows.status()

    def survey(self, plan: MergePlan) -> Survey | None:
        """Read every record of the run.  None if a file cannot be read: it is skipped from now
        on, and the next plan goes around it."""
        dead: list[bytes] = []
        present: set[bytes] = set()
        for file in plan.files:
            try:
                keys = self._keys_in(plan.family, file)
            except Exception as error:
                if "Corruption" not in str(error) and "IO error" not in str(error):
                    raise
                self.skip.add(file.name)
                self.counters["merges_failed"] += 1
                return None
            present.update(key for key, _ in keys)
            dead += _without_empty_groups(keys, self._live([key for key, _ in keys]))
        marks = self._marks(plan.first_key, plan.last_key)
        return Survey(dead, [key for key, _ in marks if key not in present])

    def _keys_in(self, family: Family, file: ExtentFile) -> list[tuple[bytes, bool]]:
        """All keys of a file in order, True for group tables; reads every byte of it."""
        keys: list[tuple[bytes, bool]] = []
        entries = self.families[family].iter()
        entries.seek(file.first_key)
        while entries.valid() and entries.key() <= file.last_key:
            key = entries.key()
            table = fragment_of(key) is None and is_table(entries.value())
            keys.append((key, table))
            entries.next()
        entries.status()
        return keys

    def _live(self, keys: Sequence[bytes]) -> set[bytes]:
        """Those record keys that an index entry points to."""
        live: set[bytes] = set()
        for start in range(0, len(keys), _LOOKUPS_AT_ONCE):
            part = [
                (key, fragment)
                for key in keys[start : start + _LOOKUPS_AT_ONCE]
                if (fragment := fragment_of(key)) is not None
            ]
            entries = fetch(self.index, [fragment for _, fragment in part])
            for (key, _), entry in zip(part, entries, strict=True):
                named = entry is not None and unpack_place(entry).sequence == sequence_of(key)
                if named or fragment_of(key) in self.set_aside:
                    live.add(key)
        return live

    def compact(self, plan: MergePlan) -> bool:
        """Rewrite the run.  RocksDB reports no error here, so the files are looked at again."""
        force = CompactOptions()
        force.set_bottommost_level_compaction(BottommostLevelCompaction.force())
        force.set_exclusive_manual_compaction(False)
        self.families[plan.family].compact_range(plan.first_key, plan.last_key, force)
        left = {file.name for file in extent_files(self.database.live_files())}
        kept = [file.name for file in plan.files if file.name in left]
        if kept:
            self.skip.update(kept)
            self.counters["merges_failed"] += 1
            return False
        self.counters["merges"] += 1
        self.counters["merged_bytes"] += plan.size
        return True


def _without_empty_groups(keys: Sequence[tuple[bytes, bool]], live: set[bytes]) -> list[bytes]:
    """Dead records of a file, and both marks of each group that has no live record left.

    `keys` are all keys of the file in order, True for group tables.
    """
    dead: list[bytes] = []
    opened: bytes | None = None
    alive = False
    for key, table in keys:
        if table:
            opened, alive = key, False
        elif fragment_of(key) is None:
            if opened is not None and not alive:
                dead += [opened, key]
            opened = None
        elif key in live:
            alive = True
        else:
            dead.append(key)
    return dead
