"""Which blocks a namespace references, and how often: the authority of a hash.

Step 3 of a commit (may these blocks be named?), the permission check of every block read, and the
base of garbage collection.  Called by `metadata.batch` and `metadata.tree`.

`namespace_blocks.count` is the number of times a block occurs in the block lists of all versions
that the namespace keeps: current ones, superseded ones, and those of entries in the trash.  A list
that names a block twice counts it twice.  So a delete changes no count (what is in the trash can be
restored), and only purging a version lowers it.  A row is gone when its count is zero.  The lists
are the truth and the counts follow them in the same transaction; the property tests recount.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

from sqlalchemy import Connection, TextClause, text

from protocol.ids import BLOCK_HASH_BYTES, BlockHash

_COUNT_BASE = 64
_HASHES_PER_QUERY = _COUNT_BASE**2
"""Bounds one statement's parameter to 128 KiB."""


def referenced(
    connection: Connection, namespace_id: int, hashes: Sequence[BlockHash]
) -> set[BlockHash]:
    """Those of `hashes` that a kept version of the namespace lists."""
    found: set[BlockHash] = set()
    query = _referenced(connection.dialect.name)
    for start in range(0, len(hashes), _HASHES_PER_QUERY):
        part = hashes[start : start + _HASHES_PER_QUERY]
        parameters = {"namespace": namespace_id, "packed": b"".join(part), "count": len(part)}
        positions: str | None = connection.execute(query, parameters).scalar_one()
        if positions:
            found.update(map(part.__getitem__, map(int, positions.split(","))))
    return found


def referring(connection: Connection, block: BlockHash) -> dict[int, int]:
    """How often each namespace that references the block does so.  One look-up per namespace: for
    people who ask, not for a walk."""
    rows = connection.execute(_REFERRING, {"hash": bytes(block)})
    return {row[0]: row[1] for row in rows}


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


@functools.cache
def _referenced(dialect: str) -> TextClause:
    """Positions, as one text, of the hashes in `packed` that have a row.

    Hashes go in as one string of bytes and positions come out as one text: binding 4,096
    parameters and stepping through 4,096 rows would each cost more than the look-ups themselves.
    CROSS JOIN keeps the count's high digit outside, so that few hashes cost little.
    """
    digits = ", ".join(f"({digit})" for digit in range(_COUNT_BASE))
    join = {"sqlite": "group_concat", "postgresql": "string_agg"}[dialect]
    position = f"({_COUNT_BASE} * high.n + low.n)"
    return text(
        f"WITH high(n) AS (VALUES {digits}), low(n) AS (VALUES {digits})"
        f" SELECT {join}(CAST({position} AS TEXT), ',')"
        " FROM high CROSS JOIN low CROSS JOIN namespace_blocks b"
        f" WHERE {_COUNT_BASE} * high.n < :count AND {position} < :count"
        " AND b.namespace_id = :namespace AND b.hash ="
        f" substr(:packed, {BLOCK_HASH_BYTES} * {position} + 1, {BLOCK_HASH_BYTES})"
    )


# The table is kept by namespace.  CROSS JOIN keeps the namespaces outside, so that the inside is a
# look-up by key.
_REFERRING = text(
    "SELECT n.id, b.count FROM namespaces n CROSS JOIN namespace_blocks b"
    " WHERE b.namespace_id = n.id AND b.hash = :hash ORDER BY n.id"
)

# The same text on SQLite and PostgreSQL.
_ADD = text(
    "INSERT INTO namespace_blocks (namespace_id, hash, count) VALUES (:namespace, :hash, :count) "
    "ON CONFLICT (namespace_id, hash) DO UPDATE SET count = namespace_blocks.count + excluded.count"
)
