"""Namespaces: trees with a journal of their own, and the lock that orders their changes.

Called by `metadata.accounts` (every account has a root namespace) and, first of all in each
transaction that changes a tree, by `metadata.batch` and `metadata.tree`.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

from sqlalchemy import Connection, bindparam, insert, select, update

from metadata import numbers
from metadata.entries import EntryKind
from metadata.schema import entries, journal, namespaces


class ChangeKind(enum.StrEnum):
    """What a journal row reports.  The values are stored: append-only."""

    CREATED = "created"
    MODIFIED = "modified"
    """A new version: content, mtime or executable."""
    DELETED = "deleted"
    """The entry, and with a folder everything below it, went to the trash."""


class JournalLine(NamedTuple):
    """One change, before it has been written."""

    position: int
    entry: int
    kind: ChangeKind


def create_namespace(connection: Connection, now: float) -> int:
    """A new namespace with an empty root folder; its number."""
    made = connection.execute(
        insert(namespaces).values(journal_position=numbers.ROOT_POSITION, created=now)
    )
    assert made.inserted_primary_key is not None
    namespace_id: int = made.inserted_primary_key[0]
    root = numbers.root_entry(namespace_id)
    connection.execute(
        insert(entries).values(
            id=root,
            namespace_id=namespace_id,
            parent_id=None,
            name="",
            name_key="",
            kind=EntryKind.FOLDER.value,
            rev=root,
            created=now,
            deleted=None,
        )
    )
    line = JournalLine(numbers.ROOT_POSITION, root, ChangeKind.CREATED)
    _insert_lines(connection, namespace_id, [line], now)
    return namespace_id


def lock_namespace(connection: Connection, namespace_id: int) -> int:
    """Position of the last change; nobody else changes this namespace until the transaction ends.

    SQLite has one writer anyway; on PostgreSQL the row lock is what makes the look-ups that follow
    the current state.
    """
    position: int = connection.execute(_LOCK, {"namespace": namespace_id}).scalar_one()
    return position


def append_journal(
    connection: Connection, namespace_id: int, lines: list[JournalLine], now: float
) -> None:
    """Write the changes of one transaction, in order, and move the journal's end."""
    if not lines:
        return
    _insert_lines(connection, namespace_id, lines, now)
    connection.execute(_ADVANCE, {"namespace": namespace_id, "to": lines[-1].position})


def _insert_lines(
    connection: Connection, namespace_id: int, lines: list[JournalLine], now: float
) -> None:
    rows = [
        {
            "namespace_id": namespace_id,
            "position": line.position,
            "entry_id": line.entry,
            "change": line.kind.value,
            "created": now,
        }
        for line in lines
    ]
    connection.execute(insert(journal), rows)


_LOCK = (
    select(namespaces.c.journal_position)
    .where(namespaces.c.id == bindparam("namespace"))
    .with_for_update()
)
_ADVANCE = (
    update(namespaces)
    .where(namespaces.c.id == bindparam("namespace"))
    .values(journal_position=bindparam("to"))
)
