"""What must hold between the rows of `metadata.db` after any sequence of changes and crashes.

Called by the property tests, the simulation and the reference check of fsck; reads only, on one
snapshot.  It recomputes from the versions, which are the truth, everything that is kept beside
them.  Returns findings as text and repairs nothing: a wrong count is raised by a person's decision,
never lowered by a program's.
"""

from __future__ import annotations

from collections import Counter

from sqlalchemy import Connection, select, text

from metadata import numbers
from metadata.entries import unpack_blocks
from metadata.schema import entries, namespace_blocks, namespaces, versions
from protocol.ids import BlockHash


def audit(connection: Connection) -> list[str]:
    """Everything that is wrong; empty if nothing is."""
    findings = recount(connection)
    for finding, query in _MUST_BE_EMPTY.items():
        rows = connection.execute(text(query)).all()
        findings += [f"{finding}: {tuple(row)}" for row in rows]
    return findings


def recount(connection: Connection) -> list[str]:
    """Where `namespace_blocks` differs from what the kept versions list."""
    findings = []
    for namespace_id in connection.execute(select(namespaces.c.id)).scalars().all():
        listed: Counter[BlockHash] = Counter()
        lists = connection.execute(
            select(versions.c.block_list)
            .join(entries, entries.c.id == versions.c.entry_id)
            .where(entries.c.namespace_id == namespace_id, versions.c.block_list.is_not(None))
        ).scalars()
        for packed in lists:
            listed.update(unpack_blocks(packed))
        rows = connection.execute(
            select(namespace_blocks.c.hash, namespace_blocks.c.count).where(
                namespace_blocks.c.namespace_id == namespace_id
            )
        )
        counted = {BlockHash(block): count for block, count in rows}
        findings += [
            f"namespace {namespace_id} counts block {block} {counted.get(block, 0)} times, "
            f"its versions list it {listed[block]} times"
            for block in sorted(listed.keys() | counted.keys())
            if listed[block] != counted.get(block, 0)
        ]
    return findings


_MUST_BE_EMPTY = {
    "entry without a folder above it": (
        "SELECT e.id FROM entries e LEFT JOIN entries p ON p.id = e.parent_id"
        " WHERE e.parent_id IS NOT NULL AND (p.id IS NULL OR p.kind <> 'folder'"
        " OR p.namespace_id <> e.namespace_id)"
    ),
    "file or symlink without its version": (
        "SELECT e.id FROM entries e LEFT JOIN versions v ON v.id = e.rev AND v.entry_id = e.id"
        " WHERE e.kind <> 'folder' AND (v.id IS NULL OR (e.kind = 'symlink')"
        " <> (v.symlink IS NOT NULL))"
    ),
    "version with no content or two": (
        "SELECT id FROM versions WHERE CASE WHEN block_list IS NULL THEN 0 ELSE 1 END"
        " + CASE WHEN content IS NULL THEN 0 ELSE 1 END"
        " + CASE WHEN symlink IS NULL THEN 0 ELSE 1 END <> 1"
    ),
    "root folders of a namespace": (
        "SELECT n.id, count(e.id) FROM namespaces n LEFT JOIN entries e"
        " ON e.namespace_id = n.id AND e.parent_id IS NULL AND e.deleted IS NULL"
        " GROUP BY n.id HAVING count(e.id) <> 1"
    ),
    "journal with gaps, or that ends elsewhere": (
        "SELECT n.id, n.journal_position, count(*), max(j.position) FROM namespaces n"
        " LEFT JOIN journal j ON j.namespace_id = n.id GROUP BY n.id, n.journal_position"
        " HAVING count(*) <> n.journal_position OR max(j.position) <> n.journal_position"
    ),
    "version without the change that made it": (
        "SELECT v.id FROM versions v LEFT JOIN journal j ON j.entry_id = v.entry_id"
        f" AND j.namespace_id = v.id / {numbers.POSITIONS}"
        f" AND j.position = v.id % {numbers.POSITIONS} WHERE j.position IS NULL"
    ),
}
"""Findings, and the query that lists them.  Written to run on SQLite and PostgreSQL."""
