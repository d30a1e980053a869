"""Write a new `cell.db`: the storage side of a rebuild.

Blocks and debts arrive in the order of the disks, volume by volume, and are kept in a scratch file.
At the end SQLite sorts them by hash, in a file as well, and settles which volume a block that was
found in several belongs to.  So memory does not grow with the cell, and the table's tree is written
once from left to right instead of at random.

Nothing here is synced before the end: a file that is not complete is thrown away.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from sqlalchemy import Connection, insert

from cluster import map_rows
from cluster.block_sql import LIVE
from cluster.cell import CELL_FORMAT, fingerprint, open_cell, prepare_schema
from cluster.fsck import cell_file
from cluster.schema import cell, map_version
from cluster.topology import NodeView, VolumeState
from erasure.scheme import Scheme
from protocol.errors import DirectoryCorrupt
from protocol.ids import BlockHash, NodeId, VolumeId
from sql.database import Database
from sql.engine import sqlite_url

OWNER_UNKNOWN: Final = 0
"""No account has this number: nobody holds a claim by having put the block."""

_CACHE_KIB: Final = 64 * 1024
_FIRST_VERSION: Final = 1

_SCRATCH_TABLES: Final = (
    "CREATE TABLE scratch.found (volume INTEGER, hash BLOB, stored INTEGER, plain INTEGER, "
    "readable INTEGER, spare INTEGER)",
    "CREATE TABLE scratch.owed (volume INTEGER, slot INTEGER, hash BLOB, reason TEXT)",
)
_SETTLE_BLOCKS: Final = (
    "INSERT INTO blocks (hash, volume_id, stored_bytes, plain_bytes, state, created, owner) "
    f"SELECT hash, volume, stored, plain, {LIVE}, :now, {OWNER_UNKNOWN} FROM (SELECT *, "
    "row_number() OVER (PARTITION BY hash ORDER BY readable DESC, spare DESC, volume DESC) "
    "AS rank FROM scratch.found) WHERE rank = 1 ORDER BY hash"
)
_SETTLE_REST: Final = (
    "INSERT INTO unrepairable (hash, volume_id, reason, since, tried) "
    "SELECT b.hash, b.volume_id, :reason, :now, :now FROM scratch.found AS f "
    "JOIN blocks AS b ON b.hash = f.hash AND b.volume_id = f.volume "
    "WHERE NOT f.readable ORDER BY b.hash",
    "INSERT INTO debts (volume_id, slot, hash, since, reason) "
    "SELECT o.volume, o.slot, o.hash, :now, o.reason FROM scratch.owed AS o "
    "JOIN blocks AS b ON b.hash = o.hash AND b.volume_id = o.volume ORDER BY 1, 2, 3",
    "UPDATE volumes SET blocks = t.blocks, stored_bytes = t.stored, plain_bytes = t.plain "
    "FROM (SELECT volume_id, count(*) AS blocks, sum(stored_bytes) AS stored, "
    "sum(plain_bytes) AS plain FROM blocks GROUP BY volume_id) AS t "
    "WHERE t.volume_id = volumes.volume_id",
    "DELETE FROM volume_slots WHERE volume_id IN (SELECT volume_id FROM volumes WHERE blocks = 0)",
    "DELETE FROM volumes WHERE blocks = 0",
)
_NOT_SEEN: Final = "fewer fragments than it needs were seen when the index was rebuilt"


class CellIdentity(NamedTuple):
    """What a cell is for life, and when its first disk was formatted."""

    cluster_id: str
    scheme: Scheme
    created: float


class FoundBlock(NamedTuple):
    """A block in one volume."""

    hash: BlockHash
    stored_bytes: int
    plain_bytes: int
    readable: bool
    spare: int
    """Fragments present beyond those that suffice; negative if too few are."""
    owed: tuple[tuple[int, str], ...]
    """Slots without a good fragment, and why."""


class Written(NamedTuple):
    """How much a new index holds."""

    volumes: int
    blocks: int
    debts: int
    unreadable: int
    vacant_slots: int
    elsewhere: int
    """Rows that lost to another volume's."""


class NewIndex:
    """A `cell.db` under construction."""

    def __init__(self, path: Path, nodes: Sequence[NodeView], now: float) -> None:
        """Writes over whatever an interrupted rebuild left at `path`."""
        self._path = path
        self._scratch = path.with_name(path.name + "-scratch")
        self._now = now
        self.discard()
        database = Database(sqlite_url(path), inline=True)
        try:
            prepare_schema(database)
            database.transact(lambda c: map_rows.insert_nodes(c, nodes, _FIRST_VERSION))
        finally:
            database.close()
        self._connection = sqlite3.connect(path, isolation_level=None)
        for pragma in (
            "journal_mode = DELETE",
            "journal_mode = OFF",
            "synchronous = OFF",
            "temp_store = FILE",
            f"cache_size = -{_CACHE_KIB}",
        ):
            self._connection.execute(f"PRAGMA {pragma}")
        self._connection.execute("ATTACH ? AS scratch", (str(self._scratch),))
        self._connection.execute("PRAGMA scratch.journal_mode = OFF")
        self._connection.execute("BEGIN")
        for table in _SCRATCH_TABLES:
            self._connection.execute(table)

    def add_volume(
        self, volume: VolumeId, scheme: Scheme, epoch: int, slots: Sequence[NodeId | None]
    ) -> None:
        """A sealed volume: nothing is ever put into one whose past is known from its disks only."""
        self._connection.execute(
            "INSERT INTO volumes (volume_id, scheme, state, epoch, stored_bytes, plain_bytes, "
            "blocks, created, changed) VALUES (?, ?, ?, ?, 0, 0, 0, ?, ?)",
            (int(volume), scheme.name, VolumeState.SEALED, epoch, self._now, _FIRST_VERSION),
        )
        self._connection.executemany(
            "INSERT INTO volume_slots (volume_id, slot, node_id) VALUES (?, ?, ?)",
            [
                (int(volume), slot, None if node is None else str(node))
                for slot, node in enumerate(slots)
            ],
        )

    def add_blocks(self, volume: VolumeId, blocks: Iterable[FoundBlock]) -> None:
        """Blocks of one volume."""
        rows, owed = [], []
        number = int(volume)
        for found in blocks:
            name = bytes(found.hash)
            rows.append((number, name, *found[1:5]))
            owed += [(number, slot, name, reason) for slot, reason in found.owed]
        self._connection.executemany("INSERT INTO scratch.found VALUES (?, ?, ?, ?, ?, ?)", rows)
        self._connection.executemany("INSERT INTO scratch.owed VALUES (?, ?, ?, ?)", owed)

    def complete(self, identity: CellIdentity, next_volume: VolumeId) -> Written:
        """Settle everything, and check the file as if somebody else had written it.

        Raises `DirectoryCorrupt` if it is not what it should be (a bad disk below it).
        """
        run = self._connection.execute
        run(_SETTLE_BLOCKS, {"now": self._now})
        for statement in _SETTLE_REST:
            run(statement, {"now": self._now, "reason": _NOT_SEEN})
        counts = [
            int(run(f"SELECT count(*) FROM {what}").fetchone()[0])
            for what in (
                "volumes",
                "blocks",
                "debts",
                "unrepairable",
                "volume_slots WHERE node_id IS NULL",
                "scratch.found",
            )
        ]
        counts[-1] -= counts[1]
        run("COMMIT")
        self._connection.close()
        self._scratch.unlink()
        self._name_cell(identity, next_volume)
        self._verify(identity)
        return Written(*counts)

    def _name_cell(self, identity: CellIdentity, next_volume: VolumeId) -> None:
        def work(connection: Connection) -> None:
            connection.execute(
                insert(cell).values(
                    id=1,
                    cluster_id=identity.cluster_id,
                    scheme=identity.scheme.name,
                    format=CELL_FORMAT,
                    fingerprint=fingerprint(identity.cluster_id, identity.scheme),
                    created=identity.created,
                )
            )
            connection.execute(
                insert(map_version).values(
                    id=1, version=_FIRST_VERSION, next_volume=int(next_volume)
                )
            )

        database = Database(sqlite_url(self._path), inline=True)
        try:
            database.transact(work)
            open_cell(database, identity.scheme)
        finally:
            database.close()

    def _verify(self, identity: CellIdentity) -> None:
        with cell_file.opened_untouched(self._path) as connection:
            wrong = cell_file.integrity(connection)
            wrong += [f"{found.rows} {found.what}" for found in cell_file.relations(connection)]
            if cell_file.cluster_id(connection) != identity.cluster_id:
                wrong.append("the cell's row is another one")
        if wrong:
            raise DirectoryCorrupt(
                f"the new index reads back wrong ({wrong[0]}): nothing was replaced; is the disk "
                f"of {self._path.parent} sound?",
                {"file": str(self._path)},
            )

    def discard(self) -> None:
        """Remove what there is of it."""
        for path in (self._path, self._scratch):
            for side in ("", *cell_file.SIDE_FILES, "-journal"):
                path.with_name(path.name + side).unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of the files.  Idempotent."""
        self._connection.close()
