"""Keys and values inside a node's RocksDB, byte by byte, and the writing of one extent.

Step "make the fragments durable" of a put: `rocks_store` calls `write_extent` for the large
records of a group and indexes them with `pack_place`.  Imports no store, holds no state.

A *sequence* number names a stored record; it only grows and is never used again, so that each new
extent lies beyond all others and is never compacted to make room.

| family  | key                                           | value                              |
|---------|-----------------------------------------------|------------------------------------|
| index   | fragment key (41 bytes)                       | place (21 bytes)                   |
| extents | "E", sequence (8 bytes, big), fragment key    | record                             |
| extents | "E", sequence alone, at the start of a group  | group table                        |
| extents | "E", sequence alone, at the end of a group    | end mark                           |
| small   | "S", sequence, fragment key                   | record                             |
| default | "totals"                                      | `Totals`                           |
| default | "dead/", record key of a deleted record       | its length (4 bytes)               |
| default | "finding/", fragment key                   | status, when (`findings`)          |
| default | "state/", name                                | the node's own state               |

The letter tells the files of the families apart in RocksDB's list of files, which does not.

Place (index value), little-endian:

    offset  size  field
    0       1     family: 1 extents, 2 small
    1       8     sequence
    9       4     length of the record, bytes
    13      8     XXH3-64 of the record

Group table: what the group holds, readable without reading its records, so that an extent whose
index entries were lost with the tail of the WAL is indexed again at the next open.

    offset  size  field
    0       4     magic, b"HVXT"
    4       1     version
    5       3     reserved, zero
    8       4     number of records; their sequences follow the table's own
    12      53 n  fragment key (41), length (4), XXH3-64 of the record (8)

The two marks also make a file's first and last block short: ingestion reads both from the disk.

History: version 1, first.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rocksdict import Options, SstFileWriter

from protocol.errors import CorruptFragment

_MARK_KEY_BYTES = 1 + 8
_FRAGMENT_KEY_BYTES = 41
_RECORD_KEY_BYTES = _MARK_KEY_BYTES + _FRAGMENT_KEY_BYTES

_PLACE = struct.Struct("<BQIQ")
_TABLE = struct.Struct("<4sB3xI")
_ITEM = struct.Struct("<41sIQ")
_TABLE_MAGIC = b"HVXT"
_TABLE_VERSION = 1
_END_MARK = b"HVXE".ljust(64, b"\0")


class Family(enum.IntEnum):
    """Where a record lies.  Append-only: written to disk."""

    EXTENTS = 1
    SMALL = 2


_LETTERS = {Family.EXTENTS: b"E", Family.SMALL: b"S"}
_FAMILIES = {letter: family for family, letter in _LETTERS.items()}


class Place(NamedTuple):
    """An index entry: where a record is and what it must be."""

    family: Family
    sequence: int
    length: int
    checksum: int


class Item(NamedTuple):
    """A record about to be stored."""

    key: bytes
    """Packed `FragmentKey`."""
    record: bytes
    checksum: int


def pack_place(place: Place) -> bytes:
    """21 bytes."""
    return _PLACE.pack(*place)


def unpack_place(data: bytes) -> Place:
    """Inverse of `pack_place`.  Raises `CorruptFragment` for bytes that are no place."""
    try:
        family, sequence, length, checksum = _PLACE.unpack(data)
        return Place(Family(family), sequence, length, checksum)
    except (struct.error, ValueError) as error:
        raise CorruptFragment(f"an index entry of {len(data)} bytes is not a place") from error


def mark_key(family: Family, sequence: int) -> bytes:
    """Key of a mark, and a prefix of the record key of the same sequence."""
    return _LETTERS[family] + sequence.to_bytes(8, "big")


def record_key(family: Family, sequence: int, fragment: bytes) -> bytes:
    """Key of a record in `extents` or `small`; `fragment` is a packed `FragmentKey`."""
    return _LETTERS[family] + sequence.to_bytes(8, "big") + fragment


def family_of(key: bytes) -> Family | None:
    """Which family a key belongs to; None for keys of `index` and `default`."""
    if len(key) not in (_MARK_KEY_BYTES, _RECORD_KEY_BYTES):
        return None
    return _FAMILIES.get(key[:1])


def sequence_of(key: bytes) -> int:
    """The sequence in a key of `extents` or `small`."""
    return int.from_bytes(key[1:_MARK_KEY_BYTES], "big")


def fragment_of(key: bytes) -> bytes | None:
    """The packed fragment key in a record key; None for a mark."""
    return key[_MARK_KEY_BYTES:] if len(key) == _RECORD_KEY_BYTES else None


def write_extent(options: Options, path: Path, sequence: int, items: Sequence[Item]) -> int:
    """Write a complete, synced SST file of one group, to be ingested.

    The table takes `sequence`, the records the numbers after it, the end mark the last one.
    Returns the first number not used.  Raises what rocksdict raises.
    """
    writer = SstFileWriter(options)
    writer.open(str(path))
    writer[mark_key(Family.EXTENTS, sequence)] = pack_table(items)
    for item in items:
        sequence += 1
        writer[record_key(Family.EXTENTS, sequence, item.key)] = item.record
    sequence += 1
    writer[mark_key(Family.EXTENTS, sequence)] = _END_MARK
    writer.finish()
    return sequence + 1


def pack_table(items: Sequence[Item]) -> bytes:
    """The value under a group's first sequence."""
    head = _TABLE.pack(_TABLE_MAGIC, _TABLE_VERSION, len(items))
    return head + b"".join(_ITEM.pack(item.key, len(item.record), item.checksum) for item in items)


def places_of_table(sequence: int, table: bytes) -> Iterator[tuple[bytes, Place]]:
    """Fragment keys and places of a group whose table is at `sequence`.

    Raises `CorruptFragment` for bytes that are not a table of a version this program reads.
    """
    try:
        magic, version, count = _TABLE.unpack_from(table)
    except struct.error as error:
        raise CorruptFragment("a group table is cut") from error
    expected = _TABLE.size + count * _ITEM.size
    if (magic, version, len(table)) != (_TABLE_MAGIC, _TABLE_VERSION, expected):
        raise CorruptFragment(f"the group table at sequence {sequence} is not one")
    for number, (key, length, checksum) in enumerate(_ITEM.iter_unpack(table[_TABLE.size :])):
        yield key, Place(Family.EXTENTS, sequence + 1 + number, length, checksum)


def is_table(value: bytes) -> bool:
    """True for the mark at the start of a group, False for the one at its end."""
    return value.startswith(_TABLE_MAGIC)
