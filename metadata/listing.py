"""Pages of a listing: names in order, or a whole subtree in pre-order.

Called by `metadata.tree` in a read transaction.  The order is that of the name keys, by code point;
a folder comes before what is in it.  A cursor holds the keys on the way to the last entry sent,
not row numbers or offsets: entries that exist during the whole listing come exactly once, whatever
is made or deleted meanwhile.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from typing import NamedTuple

import msgspec
from sqlalchemy import Connection

from metadata.entries import Entry, EntryKind, EntryRow, rows_on_path, select_rows
from metadata.paths import Names
from protocol.errors import InvalidRequest
from protocol.hashing import checksum64
from protocol.limits import LISTING_PAGE_BYTES_MAX, PATH_DEPTH_MAX

_CURSOR_VERSION = 1
_CHECKSUM_BYTES = 8


class Page(NamedTuple):
    """A part of a listing."""

    entries: list[Entry]
    cursor: str | None
    """Where the next page starts; None: this was the last."""


class Cursor(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Position in one listing.  Printed as base64url(MessagePack + XXH3-64), opaque to callers.

    The checksum catches damage and guessing hands; it grants nothing: a cursor is only ever used
    on the folder that its own caller may list.
    """

    version: int
    folder: int
    recursive: bool
    after: list[str]
    """Name keys from below the folder to the last entry sent."""

    def print(self) -> str:
        """The opaque text."""
        packed = msgspec.msgpack.encode(self)
        checksum = checksum64(packed).to_bytes(_CHECKSUM_BYTES)
        return base64.urlsafe_b64encode(packed + checksum).decode().rstrip("=")


def parse_cursor(printed: str, folder: int, *, recursive: bool) -> list[str]:
    """Keys of the last entry sent.  Raises `InvalidRequest` unless it is of this very listing."""
    try:
        data = base64.b64decode(
            printed.encode("ascii") + b"=" * (-len(printed) % 4), altchars=b"-_", validate=True
        )
        packed, checksum = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
        if checksum64(packed).to_bytes(_CHECKSUM_BYTES) != checksum:
            raise ValueError("checksum")
        cursor = msgspec.msgpack.decode(packed, type=Cursor)
        if cursor.version != _CURSOR_VERSION or not 0 < len(cursor.after) <= PATH_DEPTH_MAX:
            raise ValueError("version or depth")
        if any("\0" in key for key in cursor.after):
            raise ValueError("NUL")
    except (binascii.Error, ValueError, msgspec.MsgspecError) as error:
        raise InvalidRequest("the cursor is not one of ours: start the listing again") from error
    if (cursor.folder, cursor.recursive) != (folder, recursive):
        raise InvalidRequest("the cursor belongs to another listing: start this one again")
    return cursor.after


def list_page(
    connection: Connection,
    folder: EntryRow,
    names: Names,
    cursor: str | None,
    limit: int,
    *,
    recursive: bool,
) -> Page:
    """Up to `limit` entries below `folder`, whose displayed path is `names`.

    A page ends early, after one entry at least, when block lists and inline contents exceed
    `LISTING_PAGE_BYTES_MAX`.
    """
    after = None if cursor is None else parse_cursor(cursor, folder.id, recursive=recursive)
    frames = _resume(connection, folder, names, after, recursive=recursive)
    entries: list[Entry] = []
    last: tuple[str, ...] = ()
    budget = LISTING_PAGE_BYTES_MAX
    for keys, entry in _walk(connection, frames, limit + 1, recursive=recursive):
        budget -= len(entry.packed_blocks or b"") + len(entry.content or b"")
        if entries and (len(entries) == limit or budget < 0):
            following = Cursor(_CURSOR_VERSION, folder.id, recursive, list(last))
            return Page(entries, following.print())
        entries.append(entry)
        last = keys
    return Page(entries, None)


class _Frame(NamedTuple):
    """A folder whose children with keys above `after` are still to come."""

    folder: int
    names: Names
    keys: tuple[str, ...]
    """Of this folder, from below the listed one."""
    after: str


def _resume(
    connection: Connection,
    folder: EntryRow,
    names: Names,
    after: list[str] | None,
    *,
    recursive: bool,
) -> list[_Frame]:
    """The folders that are open after the entry `after`, the innermost last."""
    frames = [_Frame(folder.id, names, (), "")]
    if after is None:
        return frames
    if not recursive:
        return [frames[0]._replace(after=after[-1])]
    for key, row in zip(after, rows_on_path(connection, folder.id, tuple(after))[1:], strict=False):
        top = frames.pop()
        frames.append(top._replace(after=key))
        if row.kind != EntryKind.FOLDER:
            return frames
        frames.append(_Frame(row.id, (*top.names, row.name), (*top.keys, key), ""))
    depth = len(frames) - 1
    if depth < len(after):  # the rest of the way is gone: go on where it would be
        frames.append(frames.pop()._replace(after=after[depth]))
    return frames


def _walk(
    connection: Connection, frames: list[_Frame], most: int, *, recursive: bool
) -> Iterator[tuple[tuple[str, ...], Entry]]:
    """Entries in order with their keys, reading about `most` of them ahead at the utmost."""
    stack = [(frame, _children(connection, frame, most)) for frame in frames]
    while stack:
        frame, rows = stack[-1]
        row = next(rows, None)
        if row is None:
            stack.pop()
            continue
        keys = (*frame.keys, row.name_key)
        yield keys, row.entry(frame.names)
        if recursive and row.kind == EntryKind.FOLDER:
            below = _Frame(row.id, (*frame.names, row.name), keys, "")
            stack.append((below, _children(connection, below, most)))


def _children(connection: Connection, frame: _Frame, most: int) -> Iterator[EntryRow]:
    """Live children above `frame.after` in order; at most `most`, which ends the page anyway."""
    parameters = {"folder": frame.folder, "after": frame.after, "most": most}
    for row in connection.execute(_CHILDREN, parameters):
        yield EntryRow(*row)


_CHILDREN = select_rows(
    "entries e",
    "WHERE e.parent_id = :folder AND e.name_key > :after AND e.deleted IS NULL"
    " ORDER BY e.name_key LIMIT :most",
)
