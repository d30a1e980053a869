"""Which blocks a namespace references, and how often: the authority of a hash.

Step 4 of a commit (may these blocks be named?), the permission check of every block read, and the
base of garbage collection.  Called by `metadata.commit` and `metadata.tree`.

`namespace_blocks.count` is the number of times a block occurs in the block lists of all versions
that the namespace keeps: current ones, superseded ones, and those of entries in the trash.  A list
that names a block twice counts it twice.  So a delete changes no count (what is in the trash can be
restored), and only purging a version lowers it.  A row is gone when its count is zero.  The lists
are the truth and the counts follow them in the same transaction; the property tests recount.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqlalchemy import (
    Connection,
    Integer,
    LargeBinary,
    Text,
    bindparam,
    cast,
    func,
    literal,
    select,
    text,
)

from metadata.schema import namespace_blocks
from protocol.ids import BLOCK_HASH_BYTES, BlockHash

_HASHES_PER_QUERY = 4_096
"""Bounds one statement's parameter to 128 KiB."""


def referenced(
    connection: Connection, namespace_id: int, hashes: Sequence[BlockHash]
) -> set[BlockHash]:
    """Those of `hashes` that a kept version of the namespace lists."""
    found: set[BlockHash] = set()
    for start in range(0, len(hashes), _HASHES_PER_QUERY):
        part = hashes[start : start + _HASHES_PER_QUERY]
        parameters = {"namespace": namespace_id, "packed": b"".join(part), "count": len(part)}
        positions: str | None = connection.execute(_REFERENCED, parameters).scalar_one()
        if positions:
            found.update(part[int(position)] for position in positions.split(","))
    return found


def add_references(
    connection: Connection, namespace_id: int, counts: Mapping[BlockHash, int]
) -> None:
    """Count the occurrences that new versions brought."""
    if not counts:
        return
    # In key order: neighbours in the tree of the table are written together.
    rows = [
        {"namespace": namespace_id, "hash": block, "count": counts[block]}
        for block in sorted(counts)
    ]
    connection.execute(_ADD, rows)


# Hashes go in as one string of bytes and positions come out as one text: binding 4,096 parameters
# and stepping through 4,096 rows would each cost more than the look-ups themselves.
_numbers = select(literal(0, Integer).label("i")).cte("numbers", recursive=True)
_numbers = _numbers.union_all(
    select(_numbers.c.i + 1).where(_numbers.c.i + 1 < bindparam("count", type_=Integer))
)
_nth_hash = func.substr(
    bindparam("packed", type_=LargeBinary),
    _numbers.c.i * BLOCK_HASH_BYTES + 1,
    BLOCK_HASH_BYTES,
    type_=LargeBinary,
)
_REFERENCED = select(func.aggregate_strings(cast(_numbers.c.i, Text), ",")).where(
    select(literal(1))
    .where(
        namespace_blocks.c.namespace_id == bindparam("namespace"),
        namespace_blocks.c.hash == _nth_hash,
    )
    .exists()
)

# The same text on SQLite and PostgreSQL.
_ADD = text(
    "INSERT INTO namespace_blocks (namespace_id, hash, count) VALUES (:namespace, :hash, :count) "
    "ON CONFLICT (namespace_id, hash) DO UPDATE SET count = namespace_blocks.count + excluded.count"
)
