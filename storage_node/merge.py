"""Upkeep of extents: many short neighbouring files become one long one, without their dead records.

Called by `RocksStore.tidy`, which the node runs when it is idle.  One group commit leaves one
file; RocksDB's work per ingestion and its memory grow with their number.

    plan      which run of neighbours to merge                    (pure, `plan_merge`)
    survey    read the whole run; list the records no index entry points to
    drop      tombstones for these, in one synced batch            (`RocksStore`)
    compact   RocksDB rewrites the run: new file durable, then the old ones go

A crash between any two leaves the same records readable: a tombstone only ever covers a record
that no index entry names, and RocksDB swaps files in one manifest write.  The survey comes first
because a checksum error met by a compaction would stop all writes of the store; a file that
cannot be read is left alone for the scrubber.

Room for reclaiming by live share (a plan of one long file with many dead bytes, by the `dead/`
marks): such a plan goes through the same four steps.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rocksdict import BottommostLevelCompaction, CompactOptions, Rdict

from protocol.limits import MIB
from storage_node.extents import (
    Family,
    family_of,
    fragment_of,
    is_table,
    sequence_of,
    unpack_place,
)
from storage_node.rocks_read import fetch

_DEAD_PREFIX = b"dead/"
_LENGTH = struct.Struct("<I")

SHORT_FILE_BYTES = 32 * MIB
"""Files from this size on are not merged again, so a record is rewritten once."""

RUN_BYTES_MIN = 128 * MIB
RUN_FILES_MIN = 128
"""A run is merged when it reaches either: many tiny files cost as much as few longer ones."""

_LOOKUPS_AT_ONCE = 512


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


class ExtentFile(NamedTuple):
    """One SST file of `extents` or `small`."""

    family: Family
    first_key: bytes
    last_key: bytes
    size: int
    name: str


@dataclass(frozen=True, slots=True)
class MergePlan:
    """Neighbours to be rewritten as one."""

    family: Family
    files: tuple[ExtentFile, ...]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def first_key(self) -> bytes:
        return self.files[0].first_key

    @property
    def last_key(self) -> bytes:
        return max(file.last_key for file in self.files)


class Survey(NamedTuple):
    """What reading a run showed."""

    dead: list[bytes]
    """Keys of records without an index entry, and of the marks of groups that hold no other."""


def extent_files(live_files: Sequence[Mapping[str, Any]]) -> list[ExtentFile]:
    """The files of `extents` and `small` among RocksDB's live files, in key order."""
    found = []
    for file in live_files:
        family = family_of(file["start_key"])
        if family is not None:
            found.append(
                ExtentFile(family, file["start_key"], file["end_key"], file["size"], file["name"])
            )
    return sorted(found, key=lambda file: file.first_key)


def plan_merge(
    files: Sequence[ExtentFile], budget_bytes: int, *, skip: frozenset[str] | set[str]
) -> MergePlan | None:
    """The first run of short neighbours worth merging within the budget; None if there is none.

    `files` are in key order.  A run never crosses a long file, another family, or one in `skip`.
    """
    run: list[ExtentFile] = []
    for file in [*files, None]:
        ends = (
            file is None
            or file.size >= SHORT_FILE_BYTES
            or file.name in skip
            or (run and run[-1].family is not file.family)
        )
        full = (
            file is not None and run and sum(item.size for item in run) + file.size > budget_bytes
        )
        if (ends or full) and _worth(run, full=bool(full)):
            return MergePlan(run[0].family, tuple(run))
        if ends or full:
            run = []
        if file is not None and file.size < SHORT_FILE_BYTES and file.name not in skip:
            run.append(file)
    return None


def _worth(run: Sequence[ExtentFile], *, full: bool) -> bool:
    if len(run) < 2:
        return False
    size = sum(file.size for file in run)
    if full and size >= SHORT_FILE_BYTES:
        return True  # as much as the budget allows, and what comes out is not short any more
    return len(run) >= RUN_FILES_MIN or size >= RUN_BYTES_MIN


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

    def plan(self, budget_bytes: int) -> MergePlan | None:
        """What to merge now; no put may be between its extent and its index entries."""
        files = extent_files(self.database.live_files())
        self.counters["files"] = len(files)
        return plan_merge(files, budget_bytes, skip=self.skip)

    def survey(self, plan: MergePlan) -> Survey | None:
        """Read every record of the run.  None if a file cannot be read: it is skipped from now
        on, and the next plan goes around it."""
        dead: list[bytes] = []
        for file in plan.files:
            try:
                dead += self._dead_in(plan.family, file)
            except Exception as error:
                if "Corruption" not in str(error) and "IO error" not in str(error):
                    raise
                self.skip.add(file.name)
                self.counters["merges_failed"] += 1
                return None
        return Survey(dead)

    def _dead_in(self, family: Family, file: ExtentFile) -> list[bytes]:
        keys: list[tuple[bytes, bool]] = []
        entries = self.families[family].iter()
        entries.seek(file.first_key)
        while entries.valid() and entries.key() <= file.last_key:
            key = entries.key()
            table = fragment_of(key) is None and is_table(entries.value())
            keys.append((key, table))
            entries.next()
        entries.status()
        live = self._live([key for key, _ in keys])
        return _without_empty_groups(keys, live)

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

    def compact(self, plan: MergePlan) -> None:
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
            return
        self.counters["merges"] += 1
        self.counters["merged_bytes"] += plan.size


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
