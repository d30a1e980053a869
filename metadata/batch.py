"""Life of a commit, steps 4 and 5: decide each change against the tree as it stands, then write.

    1. `changes.check_commit`      what is refused without looking at the tree
    2. `tree_view.load`            the entries on the paths, in a few queries
    3. `references.referenced`     which unclaimed blocks the namespace vouches for
    4. `Batch.commit`              compare and swap; earlier changes of the batch are seen
    5. `Batch.write`               entries, versions, counts, journal: one statement for each table
    6. COMMIT                      by `sql.Database`, shared with neighbours

Called by `metadata.tree` inside one transaction that holds the namespace's lock.  Nothing is
written before every change of the batch is decided, and a refusal is a value, not an exception: a
bad change must not roll back its neighbours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple

from sqlalchemy import Connection, bindparam, insert, update

from metadata import numbers
from metadata.changes import Change
from metadata.entries import Entry, EntryKind, EntryRow, unpack_blocks
from metadata.namespaces import ChangeKind, JournalLine, append_journal
from metadata.paths import Names, join_path
from metadata.references import add_references
from metadata.schema import entries, versions
from metadata.tree_view import Node
from protocol.errors import HaversackError, MissingBlocks, RevConflict
from protocol.hashing import hash_block
from protocol.ids import BlockHash


class CommitResult(NamedTuple):
    """A commit that succeeded."""

    entry: Entry
    created: bool
    """False: the server had this content at this path already."""


class Batch:
    """Changes of one namespace in one transaction."""

    def __init__(
        self,
        namespace_id: int,
        position: int,
        root: Node,
        vouched: AbstractSet[BlockHash],
        now: float,
    ) -> None:
        """`position` is the journal's end; `vouched` are blocks the namespace references."""
        self._namespace_id = namespace_id
        self._position = position
        self._root = root
        self._vouched = vouched
        self._now = now
        self._lines: list[JournalLine] = []
        self._created: list[Node] = []
        self._modified: dict[int, Node] = {}
        self._versions: list[dict[str, Any]] = []
        self._blocks: Counter[BlockHash] = Counter()

    def commit(self, change: Change) -> CommitResult | HaversackError:
        """Decide one change of a file or symlink; `RevConflict` or `MissingBlocks` if refused."""
        at = self._root.deepest(change.keys)
        if at.depth == len(change.keys):
            return self._replace(at, change)
        if at.row.kind != EntryKind.FOLDER:
            return _conflict(change.names, at, "lies below something that is no folder")
        if change.parent_rev is not None:
            return _conflict(change.names, None, "is not there, so it has no rev to replace")
        if refusal := self._unauthorised(change):
            return refusal
        parent = self._make_folders(at, change.names[:-1], change.keys[:-1])
        row = self._new_row(parent, change.names[-1], change.keys[-1], change.kind)
        node = self._create(parent, self._with_version(row, row.rev, change))
        return CommitResult(node.entry(), created=True)

    def make_folder(self, names: Names, keys: tuple[str, ...]) -> CommitResult | HaversackError:
        """Make a folder and those above it; success if it is there."""
        at = self._root.deepest(keys)
        if at.row.kind != EntryKind.FOLDER:
            return _conflict(names, at, "is, or lies below, something that is no folder")
        made = at.depth < len(keys)
        return CommitResult(self._make_folders(at, names, keys).entry(), created=made)

    def write(self, connection: Connection) -> None:
        """Carry out what was decided."""
        if self._created:
            connection.execute(insert(entries), [self._entry_values(n) for n in self._created])
        if self._versions:
            connection.execute(insert(versions), self._versions)
        if self._modified:
            connection.execute(
                _UPDATE,
                [
                    {"entry": node.row.id, "rev": node.row.rev, "kind": node.row.kind}
                    for node in self._modified.values()
                ],
            )
        add_references(connection, self._namespace_id, self._blocks)
        append_journal(connection, self._namespace_id, self._lines, self._now)

    # -- deciding ------------------------------------------------------------------------------

    def _replace(self, node: Node, change: Change) -> CommitResult | HaversackError:
        """The compare and swap on something that is there."""
        row = node.row
        if row.kind == EntryKind.FOLDER:
            return _conflict(change.names, node, "is a folder")
        current = change.parent_rev == numbers.rev(row.rev)
        if not _same_content(row, change):
            if not current:
                return _conflict(change.names, node, "has another rev on the server")
            if refusal := self._unauthorised(change):
                return refusal
            self._modify(node, change)
            return CommitResult(node.entry(), created=True)
        if current and (row.mtime, bool(row.executable)) != (change.mtime, change.executable):
            self._modify(node, _with_stored_content(change, row))
        return CommitResult(node.entry(), created=False)

    def _unauthorised(self, change: Change) -> MissingBlocks | None:
        missing = [block for block in change.unclaimed if block not in self._vouched]
        return MissingBlocks(missing) if missing else None

    # -- changing ------------------------------------------------------------------------------

    def _make_folders(self, at: Node, names: Names, keys: tuple[str, ...]) -> Node:
        for depth in range(at.depth, len(names)):
            row = self._new_row(at, names[depth], keys[depth], EntryKind.FOLDER)
            at = self._create(at, row)
        return at

    def _new_row(self, parent: Node, name: str, key: str, kind: EntryKind) -> EntryRow:
        new = numbers.number(self._namespace_id, self._position + 1)
        return EntryRow(new, parent.row.id, name, key, kind.value, new, self._now, *([None] * 7))

    def _create(self, parent: Node, row: EntryRow) -> Node:
        self._log(row.id, ChangeKind.CREATED)
        node = parent.add(row)
        self._created.append(node)
        return node

    def _modify(self, node: Node, change: Change) -> None:
        rev = numbers.number(self._namespace_id, self._position + 1)
        self._log(node.row.id, ChangeKind.MODIFIED)
        node.row = self._with_version(node.row, rev, change)
        self._modified[node.row.id] = node

    def _log(self, entry: int, kind: ChangeKind) -> None:
        self._position += 1
        self._lines.append(JournalLine(self._position, entry, kind))

    def _with_version(self, row: EntryRow, rev: int, change: Change) -> EntryRow:
        """`row` with the content of `change`; the version that holds it is to be written."""
        self._blocks.update(change.blocks)
        self._versions.append(
            {
                "id": rev,
                "entry_id": row.id,
                "size": change.size,
                "mtime": change.mtime,
                "executable": change.executable,
                "block_list": change.packed_blocks,
                "content": change.content,
                "symlink": change.symlink,
                "created": self._now,
            }
        )
        return row._replace(
            kind=change.kind.value,
            rev=rev,
            size=change.size,
            mtime=change.mtime,
            executable=change.executable,
            block_list=change.packed_blocks,
            content=change.content,
            symlink=change.symlink,
            modified=self._now,
        )

    def _entry_values(self, node: Node) -> dict[str, Any]:
        row = node.row
        return {
            "id": row.id,
            "namespace_id": self._namespace_id,
            "parent_id": row.parent_id,
            "name": row.name,
            "name_key": row.name_key,
            "kind": row.kind,
            "rev": row.rev,
            "created": row.created,
            "deleted": None,
        }


def _same_content(row: EntryRow, change: Change) -> bool:
    """Whether the server has these bytes, or this target, at this path already."""
    if row.kind != change.kind or row.size != change.size:
        return False
    if change.packed_blocks is not None and row.content is not None:
        return change.packed_blocks == hash_block(row.content)
    if change.content is not None and row.block_list is not None:
        return row.block_list == hash_block(change.content)
    return (
        row.block_list == change.packed_blocks
        and row.content == change.content
        and row.symlink == change.symlink
    )


def _with_stored_content(change: Change, row: EntryRow) -> Change:
    """`change` naming its content the way `row` does: inline stays inline, blocks stay blocks."""
    packed = row.block_list
    return change._replace(
        blocks=() if packed is None else unpack_blocks(packed),
        packed_blocks=packed,
        content=row.content,
    )


def _conflict(names: Names, server: Node | None, why: str) -> RevConflict:
    path = join_path(names)
    state = None if server is None else server.entry().as_json()
    return RevConflict(f"{path!r} {why}", {"path": path, "server": state})


_UPDATE = (
    update(entries)
    .where(entries.c.id == bindparam("entry"))
    .values(rev=bindparam("rev"), kind=bindparam("kind"))
)
