"""Reading from a node's RocksDB: records by key, pages of the index.

Called by `RocksStore`, on several threads at once.  Every record is checked against the length
and checksum in its index entry, on top of RocksDB's own block checksums: they tell a record that
lies in another's place.  One bad key answers for itself only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from rocksdict import Rdict, RdictIter

from protocol.errors import CorruptFragment
from protocol.hashing import checksum64
from protocol.messages import ItemStatus
from storage_node.extents import Family, Place, record_key, unpack_place
from storage_node.interface import KEY_BYTES, FragmentKey, NewestPage, StoredRecord
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

    def newest(self, before: bytes | None, limit: int) -> NewestPage:
        """Keys and lengths before `before`, in reverse order, up to where the index cannot be
        read; then a page of none that goes on below."""
        found: list[tuple[FragmentKey, int]] = []
        position = before
        entries = self.index.iter()
        try:
            _seek_below(entries, before)
            while entries.valid() and len(found) < limit:
                position = entries.key()
                found.append((FragmentKey.unpack(position), _length_in(entries.value())))
                entries.prev()
            more = bool(entries.valid())
            entries.status()
        except Exception:  # noqa: BLE001  rocksdict raises nothing more precise
            return NewestPage(found, below_gap(self.index, position), damaged=True)
        return NewestPage(found, position if more else None, damaged=False)

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


def _seek_below(entries: RdictIter, before: bytes | None) -> None:
    """To the last key before `before`; to the last of all for None."""
    if before is None:
        entries.seek_to_last()
        return
    entries.seek_for_prev(before)
    if entries.valid() and entries.key() == before:
        entries.prev()


def _length_in(entry: bytes) -> int:
    try:
        return unpack_place(entry).length
    except CorruptFragment:
        return 0


def below_gap(index: Rdict, failed_below: bytes | None) -> bytes | None:
    """Where reading backwards works again, below a part of the index that cannot be read.

    Looks ever further down from `failed_below` (the end, if None), then halves its way back up:
    a bad block is a gap between two keys, and everything below it is to be read.  Returns a bound
    for `newest`, None if nothing below can be read.
    """
    top = _KEYS_END if failed_below is None else int.from_bytes(failed_below, "big")
    step = 1
    while not _readable_below(index, top - step):
        step *= 2
        if step > top:
            return None
    low, high = top - step, top - step // 2  # reads work below `low`, not below `high`
    while high - low > 1:
        middle = (low + high) // 2
        if _readable_below(index, middle):
            low = middle
        else:
            high = middle
    return low.to_bytes(KEY_BYTES, "big")


def _readable_below(index: Rdict, bound: int) -> bool:
    if bound < 0:
        return False
    entries = index.iter()
    try:
        _seek_below(entries, bound.to_bytes(KEY_BYTES, "big"))
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
