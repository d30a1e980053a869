"""What stands at a path: rows of `entries` joined with their current version.

Step 2 of a commit, and the whole of `entry`.  Called by `metadata.batch`, `metadata.listing` and
`metadata.tree`.  The look-ups here take one query for one path, however deep, and one query a level
for any number of paths.
"""

from __future__ import annotations

import base64
import enum
import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import orjson
from sqlalchemy import Connection, TextualSelect, column, text

from metadata import numbers
from metadata.paths import Names, join_path
from protocol.ids import BLOCK_HASH_BYTES, BlockHash


class EntryKind(enum.StrEnum):
    """What an entry is.  The values are stored and sent: append-only."""

    FILE = "file"
    FOLDER = "folder"
    SYMLINK = "symlink"


class Entry(NamedTuple):
    """One file, folder or symlink as callers see it."""

    id: str
    """Opaque; stays the same through every later version."""
    path: str
    """From the root, in the case the names were created with."""
    name: str
    kind: EntryKind
    rev: str
    """Opaque; another one after every change of this entry."""
    size: int
    """Bytes; 0 for folders and symlinks."""
    mtime: float
    """Seconds since 1970 as the committer gave it; of a folder, when it was made."""
    executable: bool
    packed_blocks: bytes | None
    """SHA-256s of a file's blocks, end to end; None if it is inline or no file."""
    content: bytes | None
    """A small file's bytes; None if it is in blocks or no file."""
    symlink: str | None
    """Target text of a symlink."""
    modified: float
    """When the server took this version, seconds since 1970."""

    @property
    def block_list(self) -> tuple[BlockHash, ...] | None:
        """Blocks of the file in order; None if it is inline or no file."""
        return None if self.packed_blocks is None else unpack_blocks(self.packed_blocks)

    def as_json(self) -> dict[str, Any]:
        """The shape of the HTTP API and of `RevConflict.details`."""
        blocks, content = self.packed_blocks, self.content
        return {
            "id": self.id,
            "path": self.path,
            "name": self.name,
            "kind": self.kind.value,
            "rev": self.rev,
            "size": self.size,
            "mtime": self.mtime,
            "executable": self.executable,
            "block_list": None if blocks is None else _hex_blocks(blocks),
            "content": None if content is None else base64.b64encode(content).decode(),
            "symlink": self.symlink,
            "modified": self.modified,
        }


class EntryRow(NamedTuple):
    """One entry with its current version, as SQL gives it (`ROW_COLUMNS`)."""

    id: int
    parent_id: int | None
    name: str
    name_key: str
    kind: str
    rev: int
    created: float
    size: int | None
    mtime: float | None
    executable: bool | None
    block_list: bytes | None
    content: bytes | None
    symlink: str | None
    modified: float | None

    def entry(self, folder: Names) -> Entry:
        """This row as callers see it, in the folder of that displayed path."""
        return Entry(
            numbers.entry_id(self.id),
            join_path((*folder, self.name)) if self.parent_id is not None else "/",
            self.name,
            EntryKind(self.kind),
            numbers.rev(self.rev),
            self.size or 0,
            self.created if self.mtime is None else self.mtime,
            bool(self.executable),
            self.block_list,
            self.content,
            self.symlink,
            self.created if self.modified is None else self.modified,
        )


def pack_blocks(blocks: Iterable[BlockHash]) -> bytes:
    """Hashes end to end."""
    return b"".join(blocks)


def unpack_blocks(packed: bytes) -> tuple[BlockHash, ...]:
    """Inverse of `pack_blocks`."""
    return tuple(
        BlockHash(packed[at : at + BLOCK_HASH_BYTES])
        for at in range(0, len(packed), BLOCK_HASH_BYTES)
    )


def rows_on_path(connection: Connection, root: int, keys: tuple[str, ...]) -> list[EntryRow]:
    """Rows from `root` (included) down the path, as far as it exists.  One query."""
    parameters = {"root": root, "keys": orjson.dumps(keys).decode(), "depth": len(keys)}
    rows = connection.execute(_on_path(connection.dialect.name), parameters)
    return [EntryRow(*row) for row in rows]


def rows_named(connection: Connection, wanted: list[tuple[int, str]]) -> list[EntryRow]:
    """Rows of those (parent, name key) pairs that exist.  One query."""
    parameters = {"wanted": orjson.dumps(wanted).decode()}
    rows = connection.execute(_named(connection.dialect.name), parameters)
    return [EntryRow(*row) for row in rows]


_ROW_COLUMNS = (
    "e.id, e.parent_id, e.name, e.name_key, e.kind, e.rev, e.created, "
    "v.size, v.mtime, v.executable, v.block_list, v.content, v.symlink, v.created"
)


def select_rows(sources: str, rest: str, *, common: str = "") -> TextualSelect:
    """`SELECT` of `EntryRow`s from `sources`, which name the entries `e`.

    The columns are declared, so that SQLAlchemy does not study each result anew.
    """
    query = (
        f"{common} SELECT {_ROW_COLUMNS} FROM {sources} LEFT JOIN versions v ON v.id = e.rev {rest}"
    )
    return text(query).columns(*(column(name) for name in EntryRow._fields))


@functools.cache
def _on_path(dialect: str) -> TextualSelect:
    key = {
        "sqlite": "json_extract(:keys, '$[' || walk.depth || ']')",
        "postgresql": "CAST(:keys AS json) ->> walk.depth",
    }[dialect]
    return select_rows(
        "walk JOIN entries e ON e.id = walk.id",
        "ORDER BY walk.depth",
        common="WITH RECURSIVE walk(depth, id) AS ("
        "  SELECT 0, e.id FROM entries e WHERE e.id = :root"
        "  UNION ALL"
        "  SELECT walk.depth + 1, e.id FROM walk JOIN entries e"
        f"  ON e.parent_id = walk.id AND e.name_key = {key} AND e.deleted IS NULL"
        "  WHERE walk.depth < :depth)",
    )


@functools.cache
def _named(dialect: str) -> TextualSelect:
    # CROSS JOIN keeps SQLite from scanning the entries and searching the wanted pairs.
    wanted, parent, key = {
        "sqlite": (
            "json_each(:wanted) w",
            "json_extract(w.value, '$[0]')",
            "json_extract(w.value, '$[1]')",
        ),
        "postgresql": (
            "json_array_elements(CAST(:wanted AS json)) w",
            "CAST(w.value ->> 0 AS bigint)",
            "w.value ->> 1",
        ),
    }[dialect]
    return select_rows(
        f"{wanted} CROSS JOIN entries e",
        f"WHERE e.parent_id = {parent} AND e.name_key = {key} AND e.deleted IS NULL",
    )


def _hex_blocks(packed: bytes) -> list[str]:
    text_ = packed.hex()
    step = 2 * BLOCK_HASH_BYTES
    return [text_[at : at + step] for at in range(0, len(text_), step)]
