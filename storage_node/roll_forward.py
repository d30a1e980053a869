"""Find extents whose index entries did not survive: the recovery step of opening a store.

Called by `rocks_store` before it serves.  An extent is durable when its ingestion returns; its
index entries follow in the WAL, unsynced.  After a power cut the WAL may end earlier than the
extents do: the groups beyond the last indexed sequence are read from their own tables.  Records
are not read.  Decides only; `rocks_store` writes the entries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rocksdict import Rdict

from protocol.errors import CorruptFragment
from storage_node.extents import (
    Family,
    Place,
    family_of,
    is_table,
    mark_key,
    places_of_table,
    sequence_of,
)


class Unindexed(NamedTuple):
    """What lies beyond the index, in order of sequence."""

    groups: list[list[tuple[bytes, Place]]]
    """Per group: packed fragment keys and places."""
    unreadable: int
    """Files in which a table could not be read: their fragments count as lost, and the cell's
    verifier finds them missing."""


def unindexed_groups(
    files: Sequence[Mapping[str, Any]], extents: Rdict, last_indexed: int
) -> Unindexed:
    """Groups with sequences above `last_indexed`; `files` is RocksDB's list of live files."""
    ranges = sorted(
        (sequence_of(file["start_key"]), sequence_of(file["end_key"]))
        for file in files
        if family_of(file["start_key"]) is Family.EXTENTS
    )
    groups: list[list[tuple[bytes, Place]]] = []
    unreadable = 0
    for first, last in ranges:
        if last <= last_indexed:
            continue
        try:
            groups += _groups_between(extents, max(first, last_indexed + 1), last)
        except Exception as error:  # rocksdict raises plain Exception
            if not isinstance(error, CorruptFragment) and "Corruption" not in str(error):
                raise
            unreadable += 1
    return Unindexed(groups, unreadable)


def _groups_between(extents: Rdict, first: int, last: int) -> list[list[tuple[bytes, Place]]]:
    """Tables of one file, jumping from table to table."""
    groups: list[list[tuple[bytes, Place]]] = []
    entries = extents.iter()
    entries.seek(mark_key(Family.EXTENTS, first))
    while entries.valid() and sequence_of(entries.key()) <= last:
        table = entries.value()
        sequence = sequence_of(entries.key())
        if not is_table(table):
            entries.next()
            continue
        group = list(places_of_table(sequence, table))
        groups.append(group)
        entries.seek(mark_key(Family.EXTENTS, sequence + len(group) + 2))
    entries.status()
    return groups
