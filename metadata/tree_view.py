"""The part of a tree that a batch of changes looks at, in memory.

Step 2 of a commit.  Called by `metadata.tree`; `metadata.batch` reads it and adds to it, so that
each change of a batch sees those before it.
"""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import Connection

from metadata.entries import Entry, EntryRow, rows_named, rows_on_path
from metadata.paths import Names

Keys = tuple[str, ...]


class Node:
    """One entry, and those below it that were looked up and exist."""

    __slots__ = ("children", "depth", "names", "parent", "row")

    def __init__(self, row: EntryRow, parent: Node | None) -> None:
        self.row = row
        self.parent = parent
        self.children: dict[str, Node] = {}
        self.names: Names = () if parent is None else (*parent.names, row.name)
        self.depth = len(self.names)

    def add(self, row: EntryRow) -> Node:
        """Hang `row` below this folder."""
        assert row.parent_id == self.row.id
        node = Node(row, self)
        self.children[row.name_key] = node
        return node

    def deepest(self, keys: Keys) -> Node:
        """The last node on the path `keys` from here that exists."""
        node = self
        for key in keys:
            below = node.children.get(key)
            if below is None:
                break
            node = below
        return node

    def entry(self) -> Entry:
        """This node as callers see it."""
        return self.row.entry(() if self.parent is None else self.parent.names)


def load(connection: Connection, root: int, paths: Collection[Keys]) -> Node:
    """The tree under the entry `root`, complete on each of `paths`.

    One query for one path, else one query for each level of the deepest.
    """
    if len(paths) == 1:
        (path,) = paths
        first, *below = rows_on_path(connection, root, path)
        top = node = Node(first, None)
        for row in below:
            node = node.add(row)
        return top
    (first,) = rows_on_path(connection, root, ())
    top = Node(first, None)
    level = [(top, path) for path in paths if path]
    while level:
        level = _descend(connection, level)
    return top


def _descend(connection: Connection, level: list[tuple[Node, Keys]]) -> list[tuple[Node, Keys]]:
    """Look up the next segment of every path; those that go on from there."""
    folders = {node.row.id: node for node, _ in level}
    wanted = dict.fromkeys((node.row.id, keys[node.depth]) for node, keys in level)
    for row in rows_named(connection, list(wanted)):
        assert row.parent_id is not None
        folders[row.parent_id].add(row)
    found = ((node.children.get(keys[node.depth]), keys) for node, keys in level)
    return [(node, keys) for node, keys in found if node is not None and node.depth < len(keys)]
