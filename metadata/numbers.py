"""Numbers of entries and versions: the journal position that made them, and their namespace.

Every change takes the next position of its namespace's journal, so a position names at most one
new entry and at most one new version for ever.  Packed with the namespace it is unique in the whole
cell without a counter of its own, grows with time (index inserts append), and stays valid when an
entry later moves to another namespace.

    bits 40..62   namespace number
    bits 0..39    journal position

Printed: an entry id is `id:` and 16 hex digits, a rev is 16 hex digits.  Callers treat both as
opaque.  Called by `metadata.batch`, `metadata.entries` and `metadata.namespaces`.
"""

from __future__ import annotations

_POSITION_BITS = 40
"""A trillion changes per namespace: a thousand a second for 34 years."""

POSITIONS = 1 << _POSITION_BITS
"""A number is `namespace * POSITIONS + position`."""

_NAMESPACE_BITS = 23
"""Eight million namespaces; together 63 bits, a signed SQL integer."""

ROOT_POSITION = 1
"""The change that makes a namespace's root folder."""


def number(namespace_id: int, position: int) -> int:
    """Number of the entry or version that a change made."""
    assert 0 < namespace_id < 1 << _NAMESPACE_BITS
    assert 0 < position < POSITIONS
    return namespace_id * POSITIONS + position


def root_entry(namespace_id: int) -> int:
    """Number of a namespace's root folder."""
    return number(namespace_id, ROOT_POSITION)


def entry_id(entry: int) -> str:
    """Printed form of an entry's number."""
    return f"id:{entry:016x}"


def rev(version: int) -> str:
    """Printed form of a version's number."""
    return f"{version:016x}"
