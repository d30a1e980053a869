"""The block index in SQLAlchemy Core, for databases that are not SQLite.

See `block_sql` for what each method must do.  It runs on SQLite as well, where the tests hold it
to the same results as `block_sql_sqlite`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final, TypeVar

from sqlalchemy import Connection, Table, and_, func, literal, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite

from cluster.block_sql import LIVE, BlockValues, Debt, Fence, FoundRows, Growth
from cluster.schema import blocks, claims, debts, map_version, nodes, volume_slots, volumes
from protocol.ids import BlockHash, NodeId, VolumeId

T = TypeVar("T")

_IDS_PER_QUERY: Final = 500
"""Values in one IN list: far below every database's limit on parameters."""


class PortableBlockSql:
    """SQLAlchemy Core for any dialect that has ON CONFLICT."""

    def lookup(self, connection: Connection, hashes: Sequence[BlockHash]) -> FoundRows:
        columns = (blocks.c.volume_id, blocks.c.stored_bytes, blocks.c.plain_bytes)
        found = FoundRows([], [], [], [])
        for start, chunk in _chunks(hashes):
            query = select(blocks.c.hash, *columns).where(
                blocks.c.hash.in_(chunk), blocks.c.state == LIVE
            )
            positions = {block: start + index for index, block in enumerate(chunk)}
            for block, *values in connection.execute(query):
                for column, value in zip(found, (positions[block], *values), strict=True):
                    column.append(value)
        return found

    def claim_life(
        self,
        connection: Connection,
        owner: int,
        hashes: Sequence[BlockHash],
        created_after: float,
        expires_after: float,
    ) -> tuple[list[int], list[int]]:
        has_claim = or_(
            and_(blocks.c.owner == owner, blocks.c.created > created_after),
            func.coalesce(claims.c.expires > expires_after, literal(False)),
        )
        source = blocks.outerjoin(
            claims, and_(claims.c.owner == owner, claims.c.hash == blocks.c.hash)
        )
        claimed: list[int] = []
        others: list[int] = []
        for start, chunk in _chunks(hashes):
            query = (
                select(blocks.c.hash, has_claim)
                .select_from(source)
                .where(blocks.c.hash.in_(chunk), blocks.c.state == LIVE)
            )
            positions = {block: start + index for index, block in enumerate(chunk)}
            for block, has in connection.execute(query):
                (claimed if has else others).append(positions[block])
        return claimed, others

    def write_claims(
        self,
        connection: Connection,
        rows: Sequence[tuple[int, BlockHash]],
        created_after: float,
        renew_before: float,
        expires: float,
    ) -> None:
        wanted: list[dict[str, Any]] = []
        for _, chunk in _chunks(rows):
            query = select(blocks.c.hash, blocks.c.owner, blocks.c.created).where(
                blocks.c.hash.in_({block for _, block in chunk}), blocks.c.state == LIVE
            )
            live = {row.hash: row for row in connection.execute(query)}
            for owner, block in chunk:
                row = live.get(block)
                if row is None or (row.owner == owner and row.created > created_after):
                    continue
                wanted.append({"owner": owner, "hash": block, "expires": expires})
        if not wanted:
            return
        statement = _insert(connection, claims)
        statement = statement.on_conflict_do_update(
            index_elements=[claims.c.owner, claims.c.hash],
            set_={"expires": statement.excluded.expires},
            where=claims.c.expires <= renew_before,
        )
        connection.execute(statement, wanted)

    def compare(
        self, connection: Connection, hashes: Sequence[BlockHash], volume_ids: Sequence[VolumeId]
    ) -> tuple[set[int], dict[VolumeId, Fence]]:
        # Holds back every change of the map until this transaction ends, where there are row locks.
        connection.execute(select(map_version.c.version).with_for_update(read=True))
        query = (
            select(
                volumes.c.volume_id,
                volumes.c.epoch,
                volume_slots.c.slot,
                volume_slots.c.node_id,
                nodes.c.incarnation,
            )
            .join(volume_slots, volume_slots.c.volume_id == volumes.c.volume_id)
            .outerjoin(nodes, nodes.c.node_id == volume_slots.c.node_id)
            .where(volumes.c.volume_id.in_([int(volume) for volume in volume_ids]))
        )
        epochs: dict[VolumeId, int] = {}
        slots: dict[VolumeId, list[tuple[int, NodeId | None, int]]] = {}
        for row in connection.execute(query):
            volume = VolumeId(row.volume_id)
            epochs[volume] = row.epoch
            node_id = None if row.node_id is None else NodeId(row.node_id)
            incarnation = -1 if row.incarnation is None else row.incarnation
            slots.setdefault(volume, []).append((row.slot, node_id, incarnation))
        fences = {volume: Fence(epochs[volume], tuple(sorted(slots[volume]))) for volume in epochs}
        return set(self.lookup(connection, hashes).positions), fences

    def insert_blocks(
        self, connection: Connection, rows: Sequence[BlockValues], created: float
    ) -> set[BlockHash]:
        values = [
            {
                "hash": row.hash,
                "volume_id": int(row.volume),
                "stored_bytes": row.stored_bytes,
                "plain_bytes": row.plain_bytes,
                "owner": row.owner,
                "state": LIVE,
                "created": created,
            }
            for row in rows
        ]
        if not values:
            return set()
        statement = _insert(connection, blocks).on_conflict_do_nothing().returning(blocks.c.hash)
        return {BlockHash(found) for found in connection.execute(statement, values).scalars()}

    def grow(self, connection: Connection, growths: Sequence[Growth]) -> None:
        for growth in growths:
            connection.execute(
                update(volumes)
                .where(volumes.c.volume_id == int(growth.volume))
                .values(
                    blocks=volumes.c.blocks + growth.blocks,
                    stored_bytes=volumes.c.stored_bytes + growth.stored_bytes,
                    plain_bytes=volumes.c.plain_bytes + growth.plain_bytes,
                )
            )

    def insert_debts(self, connection: Connection, rows: Sequence[Debt], since: float) -> None:
        values = [
            {"volume_id": int(row.volume), "slot": row.slot, "hash": row.hash, "since": since}
            for row in rows
        ]
        if values:
            connection.execute(_insert(connection, debts).on_conflict_do_nothing(), values)


def _insert(connection: Connection, table: Table) -> postgresql.Insert | sqlite.Insert:
    """INSERT with ON CONFLICT, which SQLAlchemy has per dialect only."""
    if connection.dialect.name == "sqlite":
        return sqlite.insert(table)
    return postgresql.insert(table)


def _chunks(rows: Sequence[T]) -> Iterator[tuple[int, Sequence[T]]]:
    """(start, rows) of at most `_IDS_PER_QUERY` rows each."""
    for start in range(0, len(rows), _IDS_PER_QUERY):
        yield start, rows[start : start + _IDS_PER_QUERY]
