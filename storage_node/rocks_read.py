"""Reading from a node's RocksDB: records by key, pages of the index.

Called by `RocksStore`, on several threads at once.  Every record is checked against the length
and checksum in its index entry, on top of RocksDB's own block checksums: they tell a record that
lies in another's place.  One bad key answers for itself only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from rocksdict import Rdict, RdictIter

from protocol.errors import CorruptFragment
from protocol.hashing import checksum64
from protocol.messages import ItemStatus
from storage_node.extents import Family, Place, record_key, unpack_place
from storage_node.interface import (
    KEY_BYTES,
    FragmentKey,
    NewestPage,
    StoredRecord,
    just_below,
)
from storage_node.rocks_errors import read_status

_ABSENT = StoredRecord(ItemStatus.NOT_FOUND, None)
_CORRUPT = StoredRecord(ItemStatus.CORRUPT, None)
_KEYS_END = (1 << 8 * KEY_BYTES) - 1
_NOT_SENT = StoredRecord(ItemStatus.NOT_SENT, None)


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads beside writes and merges; holds no state of its own."""

    index: Rdict
    families: Mapping[Family, Rdict]

    def get_many(
        self, keys: Sequence[FragmentKey], bytes_max: int, gone: StoredRecord = _CORRUPT
    ) -> list[StoredRecord]:
        """One answer per key, in order.  Records beyond `bytes_max` in all are NOT_SENT; one that
        the index names and that is not there answers `gone`."""
        packed = [key.pack() for key in keys]
        answers = [_ABSENT] * len(packed)
        wanted: dict[Family, list[tuple[int, Place]]] = {}
        budget = bytes_max
        for number, entry in enumerate(fetch_each(self.index, packed)):
            place = _place_or_answer(entry)
            if isinstance(place, StoredRecord):
                answers[number] = place
            elif place.length > budget and budget < bytes_max:
                answers[number] = _NOT_SENT
            else:
                budget -= place.length
                wanted.setdefault(place.family, []).append((number, place))
        for family, items in wanted.items():
            records = fetch_each(
                self.families[family],
                [record_key(family, place.sequence, packed[number]) for number, place in items],
            )
            for (number, place), record in zip(items, records, strict=True):
                answers[number] = self._answer(packed[number], place, record, gone)
        return answers

    def _answer(
        self, key: bytes, place: Place, record: bytes | Exception | None, gone: StoredRecord
    ) -> StoredRecord:
        if record is None:
            return self._read_moved(key, place, gone)
        return verified(record, place)

    def _read_moved(self, key: bytes, place: Place, gone: StoredRecord) -> StoredRecord:
        """A record that was not where the index said: deleted or replaced a moment ago, or lost."""
        now = _place_or_answer(fetch_each(self.index, [key])[0])
        if isinstance(now, StoredRecord):
            return now
        if now == place:
            return gone
        found = fetch_each(self.families[now.family], [record_key(now.family, now.sequence, key)])
        return gone if found[0] is None else verified(found[0], now)

    def inventory(
        self, after: FragmentKey | None, limit: int
    ) -> tuple[list[tuple[FragmentKey, int]], bool]:
        """Keys and lengths in key order after `after`; True if there are more.

        Raises what rocksdict raises where the index cannot be read: a listing that ended early
        would make others call live fragments missing.
        """
        found: list[tuple[FragmentKey, int]] = []
        entries = self.index.iter()
        entries.seek(b"" if after is None else after.pack() + b"\0")
        while entries.valid() and len(found) < limit:
            length = unpack_place(entries.value()).length
            found.append((FragmentKey.unpack(entries.key()), length))
            entries.next()
        more = bool(entries.valid())
        entries.status()
        return found, more

    def newest(self, bound: bytes | None, limit: int, bytes_max: int) -> NewestPage:
        """Keys and lengths at or below `bound`, in reverse order, as far as the index can be read;
        the next page then goes on below what cannot."""
        found: list[tuple[FragmentKey, int]] = []
        rest = bound
        entries = self.index.iter()
        try:
            if bound is None:
                entries.seek_to_last()
            else:
                entries.seek_for_prev(bound)
            while entries.valid() and len(found) < limit:
                key = entries.key()
                length = _length_in(entries.value())
                if found and length > bytes_max:
                    break
                bytes_max -= length
                found.append((FragmentKey.unpack(key), length))
                rest = just_below(key)
                entries.prev()
            more = bool(entries.valid())
            entries.status()
        except Exception:  # noqa: BLE001  rocksdict raises nothing more precise
            return self._around_gap(found, rest)
        return NewestPage(found, rest if more else None, damaged=False)

    def _around_gap(
        self, found: list[tuple[FragmentKey, int]], unreadable: bytes | None
    ) -> NewestPage:
        """The page `found` with the keys at both edges of the gap below it, which only a way
        upwards reaches: going down, RocksDB must see the key before one that it shows."""
        gap = find_gap(self.index, unreadable)
        edges = self._upwards(gap.above, unreadable)
        if gap.below is not None:
            edges += self._upwards(gap.below, gap.above)
        known = {key for key, _ in found}
        more = [entry for entry in edges if entry[0] not in known]
        rest = gap.below
        if rest is not None and more and more[-1][0].pack() == rest:
            rest = just_below(rest)
        return NewestPage(found + more, rest, damaged=True)

    def _upwards(self, start: bytes, end: bytes | None) -> list[tuple[FragmentKey, int]]:
        """Keys from `start` on, up to `end` or to what cannot be read; greatest first."""
        found: list[tuple[FragmentKey, int]] = []
        entries = self.index.iter()
        entries.seek(start)
        while entries.valid() and (end is None or entries.key() <= end):
            found.append((FragmentKey.unpack(entries.key()), _length_in(entries.value())))
            entries.next()
        return found[::-1]

    def recount(self) -> tuple[int, int]:
        """Fragments and bytes, by reading every index entry."""
        fragments, size = 0, 0
        entries = self.index.iter()
        entries.seek_to_first()
        while entries.valid():
            fragments += 1
            size += unpack_place(entries.value()).length
            entries.next()
        entries.status()
        return fragments, size


def _seek(entries: RdictIter, bound: bytes, *, down: bool) -> None:
    """To the last key at or below `bound`, or to the first at or above it."""
    if down:
        entries.seek_for_prev(bound)
    else:
        entries.seek(bound)


def _length_in(entry: bytes) -> int:
    try:
        return unpack_place(entry).length
    except CorruptFragment:
        return 0


class Gap(NamedTuple):
    """A part of the index that cannot be read, between two bounds."""

    below: bytes | None
    """From here downwards it can be read; None if nothing is left."""
    above: bytes
    """From here upwards it can be read."""


def find_gap(index: Rdict, unreadable: bytes | None) -> Gap:
    """The gap below a bound (the end, if None) from which reading downwards fails.

    Looks ever further down, then halves its way back up: a bad block is a gap between two keys,
    and what lies below it can be read.
    """
    top = _KEYS_END if unreadable is None else int.from_bytes(unreadable, "big")
    step = 1
    while step <= top and not _is_readable(index, top - step, down=True):
        step *= 2
    low = max(0, top - step)
    below = None
    if step <= top:
        low = _boundary(index, low, top - step // 2, down=True)
        below = low.to_bytes(KEY_BYTES, "big")
    return Gap(below, _boundary(index, top, low, down=False).to_bytes(KEY_BYTES, "big"))


def _boundary(index: Rdict, good: int, bad: int, *, down: bool) -> int:
    """The bound next to `bad` from which reading in one direction still works."""
    while abs(good - bad) > 1:
        middle = (good + bad) // 2
        if _is_readable(index, middle, down=down):
            good = middle
        else:
            bad = middle
    return good


def _is_readable(index: Rdict, bound: int, *, down: bool) -> bool:
    entries = index.iter()
    try:
        _seek(entries, bound.to_bytes(KEY_BYTES, "big"), down=down)
        entries.status()
    except Exception:  # noqa: BLE001  rocksdict raises nothing more precise
        return False
    return True


def fetch(family: Rdict, keys: Sequence[bytes]) -> list[bytes | None]:
    """Values in order.  Raises what rocksdict raises, for the whole list, if one key fails."""
    values: Any = family.get(cast("list[str | int | float | bytes | bool]", list(keys)))
    return cast("list[bytes | None]", values)


def fetch_each(family: Rdict, keys: Sequence[bytes]) -> Sequence[bytes | Exception | None]:
    """Values in order; where a key fails, its own error and not the whole list's."""
    try:
        return fetch(family, keys)
    except Exception as error:  # noqa: BLE001  rocksdict raises nothing more precise
        if len(keys) == 1:
            return [error]
    return [fetch_each(family, [key])[0] for key in keys]


def _place_or_answer(entry: bytes | Exception | None) -> Place | StoredRecord:
    if entry is None:
        return _ABSENT
    if isinstance(entry, Exception):
        return StoredRecord(read_status(entry), None)
    try:
        return unpack_place(entry)
    except CorruptFragment:
        return _CORRUPT


def verified(record: bytes | Exception, place: Place) -> StoredRecord:
    if isinstance(record, Exception):
        return StoredRecord(read_status(record), None)
    if len(record) != place.length or checksum64(record) != place.checksum:
        return _CORRUPT
    return StoredRecord(ItemStatus.OK, record)
