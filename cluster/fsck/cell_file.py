"""Read `cell.db` and `metadata.db` of a stopped cell without changing them.

Called by `check`.  SQLite writes beside a database even to read it, if it has a write-ahead log: so
one with a log is copied first, and one without is opened as a file that nobody changes.  Plain
`sqlite3` instead of `sql.Database`, which sets a database up for writing.
"""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from erasure.scheme import Scheme
from protocol.errors import DirectoryCorrupt
from protocol.ids import BlockHash, NodeId, VolumeId

SIDE_FILES: Final = ("-wal", "-shm")
"""What SQLite keeps beside a database; the first holds commits."""

_INTEGRITY_LINES_MAX: Final = 20
_CACHE_KIB: Final = 32 * 1024


class Member(NamedTuple):
    """A row of `nodes`."""

    node_id: NodeId
    store_id: str
    directory: Path
    state: str


class VolumeSlots(NamedTuple):
    """A row of `volumes` with its slots."""

    scheme: Scheme
    epoch: int
    slots: tuple[NodeId | None, ...]


class IndexRow(NamedTuple):
    """A row of `blocks`."""

    stored_bytes: int
    plain_bytes: int


class Relation(NamedTuple):
    """Rows that refer to something that is not there."""

    what: str
    rows: int
    loss: bool
    """Whether a block can no longer be found by it."""


_RELATIONS: Final = (
    (
        "blocks in a volume that has no row",
        "SELECT count(*) FROM blocks WHERE volume_id NOT IN (SELECT volume_id FROM volumes)",
        True,
    ),
    (
        "slots on a node that has no row",
        "SELECT count(*) FROM volume_slots WHERE node_id IS NOT NULL "
        "AND node_id NOT IN (SELECT node_id FROM nodes)",
        False,
    ),
    (
        "slots of a volume that has no row",
        "SELECT count(*) FROM volume_slots WHERE volume_id NOT IN (SELECT volume_id FROM volumes)",
        False,
    ),
    (
        "debts of a block that is not in that volume",
        "SELECT count(*) FROM debts AS d LEFT JOIN blocks AS b "
        "ON b.hash = d.hash AND b.volume_id = d.volume_id WHERE b.hash IS NULL",
        False,
    ),
    (
        "volumes whose count of blocks is wrong",
        "SELECT count(*) FROM volumes AS v LEFT JOIN (SELECT volume_id, count(*) AS blocks "
        "FROM blocks GROUP BY volume_id) AS b USING (volume_id) "
        "WHERE v.blocks <> ifnull(b.blocks, 0)",
        False,
    ),
)
_DANGLING: Final = (
    "SELECT count(DISTINCT hash) FROM namespace_blocks "
    "WHERE hash NOT IN (SELECT hash FROM cell.blocks)"
)


@contextmanager
def opened_untouched(path: Path, attached: Path | None = None) -> Iterator[sqlite3.Connection]:
    """A connection that reads `path`, and `attached` as `cell`.  Raises `DirectoryCorrupt`."""
    with tempfile.TemporaryDirectory(prefix="haversack-fsck-") as scratch:
        try:
            uri = _readable_uri(path, Path(scratch))
            with closing(sqlite3.connect(uri, uri=True)) as connection:
                connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
                connection.execute("PRAGMA temp_store = FILE")
                if attached is not None:
                    second = _readable_uri(attached, Path(scratch))
                    connection.execute("ATTACH ? AS cell", (second,))
                yield connection
        except sqlite3.DatabaseError as error:
            raise _unreadable(path, error) from error


def _readable_uri(path: Path, scratch: Path) -> str:
    if not path.is_file():
        raise DirectoryCorrupt(f"there is no {path}", {"file": str(path)})
    log = path.with_name(path.name + SIDE_FILES[0])
    if not (log.is_file() and log.stat().st_size):
        return f"{path.absolute().as_uri()}?immutable=1"
    try:
        for file in (path, log):
            shutil.copyfile(file, scratch / file.name)
    except OSError as error:
        raise _unreadable(path, error) from error
    return (scratch / path.name).as_uri()


def _unreadable(path: Path, error: Exception) -> DirectoryCorrupt:
    return DirectoryCorrupt(f"{path} cannot be read: {error}", {"file": str(path)})


def integrity(connection: sqlite3.Connection) -> list[str]:
    """What SQLite finds wrong with the file; empty if nothing.  Reads all of it."""
    found = connection.execute(f"PRAGMA main.integrity_check({_INTEGRITY_LINES_MAX})")
    lines = [str(line) for (line,) in found if line != "ok"]
    broken = connection.execute("PRAGMA main.foreign_key_check").fetchmany(_INTEGRITY_LINES_MAX)
    return lines + [f"row of {table} refers to no {other}" for table, _, other, _ in broken]


def relations(connection: sqlite3.Connection) -> list[Relation]:
    """Rows of `cell.db` that refer to nothing."""
    counted = (
        Relation(what, int(connection.execute(query).fetchone()[0]), loss)
        for what, query, loss in _RELATIONS
    )
    return [relation for relation in counted if relation.rows]


def dangling_references(connection: sqlite3.Connection) -> int:
    """Blocks that versions list and the index does not have, on `metadata.db` with `cell.db`
    attached."""
    return int(connection.execute(_DANGLING).fetchone()[0])


def cluster_id(connection: sqlite3.Connection) -> str:
    """Which cell this is; empty if it was never created."""
    row = connection.execute("SELECT cluster_id FROM cell").fetchone()
    return "" if row is None else str(row[0])


def members(connection: sqlite3.Connection) -> list[Member]:
    """The nodes that belong to the cell, those that were removed left out."""
    rows = connection.execute(
        "SELECT node_id, store_id, directory, state FROM nodes WHERE state <> 'gone' ORDER BY 1"
    )
    return [Member(NodeId(row[0]), row[1], Path(row[2]), row[3]) for row in rows]


def volume_slots(connection: sqlite3.Connection, volume: VolumeId) -> VolumeSlots | None:
    """One volume, or None."""
    row = connection.execute(
        "SELECT scheme, epoch FROM volumes WHERE volume_id = ?", (int(volume),)
    ).fetchone()
    if row is None:
        return None
    slots = connection.execute(
        "SELECT node_id FROM volume_slots WHERE volume_id = ? ORDER BY slot", (int(volume),)
    )
    held = tuple(None if node is None else NodeId(node) for (node,) in slots)
    return VolumeSlots(Scheme.parse(row[0]), int(row[1]), held)


def block_rows(connection: sqlite3.Connection) -> Iterator[tuple[VolumeId, BlockHash, IndexRow]]:
    """The block index in the order in which disks list fragments; SQLite sorts in a file."""
    rows = connection.execute(
        "SELECT volume_id, hash, stored_bytes, plain_bytes FROM blocks ORDER BY 1, 2"
    )
    for volume, name, stored, plain in rows:
        yield VolumeId(volume), BlockHash(name), IndexRow(stored, plain)


def debt_rows(connection: sqlite3.Connection) -> Iterator[tuple[VolumeId, BlockHash, int]]:
    """Volume, block and slot of every debt, in that order."""
    rows = connection.execute("SELECT volume_id, hash, slot FROM debts ORDER BY 1, 2, 3")
    for volume, name, slot in rows:
        yield VolumeId(volume), BlockHash(name), int(slot)
