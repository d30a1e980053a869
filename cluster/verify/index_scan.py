"""Reads of `cell.db` for a pass, in short transactions that never hold a writer up.

There is no index of `blocks` by volume (`docs/design/008-block-index.md`): one scan of the table,
page by page in key order, gives the rows of a whole section of volumes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Final, NamedTuple

from sqlalchemy import Connection, and_, or_, select

from cluster import map_rows
from cluster.block_sql import LIVE
from cluster.schema import blocks, debts, map_version, slot_moves, volumes
from cluster.topology import NodeState, NodeView, VolumeView
from cluster.verify.section_index import IndexRow
from cluster.verify.settings import VerifierSettings
from protocol.ids import BlockHash, NodeId, VolumeId
from sql.database import Database
from storage_node.interface import FragmentKey

LAST_VOLUME: Final = 2**63 - 1
"""End of the last section: fragments of volumes that were never given out are strays as well."""

_VOLUMES_PER_READ: Final = 5_000
_IDS_PER_QUERY: Final = 500
_DEBTS_PER_READ: Final = 50_000


class VolumeRange(NamedTuple):
    """Volumes after `after`, up to and with `last`."""

    after: int
    last: int
    blocks: int
    """As the volumes count them."""

    @property
    def is_last(self) -> bool:
        """Whether nothing comes after it."""
        return self.last == LAST_VOLUME


class SectionRows(NamedTuple):
    """Everything SQL says of a section."""

    volumes: list[VolumeView]
    nodes: list[NodeView]
    """All that are members."""
    targets: list[tuple[VolumeId, int, NodeId]]
    rows: list[IndexRow]
    lost_rows: list[tuple[VolumeId, BlockHash]]
    """Their volume does not exist."""
    owed: list[tuple[int, int, bytes]]


class LiveRow(NamedTuple):
    """A live row of `blocks`, as fresh as the transaction that read it."""

    volume: VolumeId
    stored_bytes: int
    plain_bytes: int
    created: float


class Truth(NamedTuple):
    """What SQL says of some fragments at one instant."""

    rows: dict[BlockHash, LiveRow]
    known: dict[BlockHash, VolumeId]
    """Rows in any state."""
    volumes: dict[VolumeId, VolumeView]
    moves: dict[tuple[VolumeId, int], NodeId]
    """Targets of moves in these volumes."""
    owed: set[FragmentKey]

    def holder(self, key: FragmentKey) -> NodeId | None:
        """The node of a slot that the block of `key` has now; None if there is none such."""
        row = self.rows.get(key.block)
        volume = self.volumes.get(key.volume)
        if row is None or row.volume != key.volume or volume is None:
            return None
        return volume.slots[key.slot] if key.slot < volume.scheme.n else None


async def next_range(db: Database, after: int, blocks_max: int) -> VolumeRange:
    """The next section: as many volumes as `blocks_max` rows allow, at least one."""

    def work(connection: Connection) -> VolumeRange:
        query = (
            select(volumes.c.volume_id, volumes.c.blocks)
            .where(volumes.c.volume_id > after)
            .order_by(volumes.c.volume_id)
            .limit(_VOLUMES_PER_READ)
        )
        rows = connection.execute(query).all()
        total, last = 0, LAST_VOLUME
        for number, row in enumerate(rows):
            if number and total + row.blocks > blocks_max:
                return VolumeRange(after, last, total)
            total, last = total + row.blocks, row.volume_id
        return VolumeRange(after, last if len(rows) == _VOLUMES_PER_READ else LAST_VOLUME, total)

    return await db.read(work)


async def read_section(db: Database, part: VolumeRange, settings: VerifierSettings) -> SectionRows:
    """Map first, then rows, then debts: what changes in between only makes suspects, and every
    suspect is looked at again."""
    views, nodes, targets, end = await db.read(lambda connection: _read_map(connection, part))
    known = {int(view.volume_id) for view in views}
    rows: list[IndexRow] = []
    lost: list[tuple[VolumeId, BlockHash]] = []
    after: bytes | None = b""
    while after is not None:
        read = partial(_read_page, part=part, after=after, limit=settings.index_page_rows)
        after, page = await db.read(read)
        for row in page:
            if row.volume in known:
                rows.append(row)
            elif row.volume < end:  # else opened since
                lost.append((VolumeId(row.volume), BlockHash(row.block)))
    owed = await _read_owed(db, part)
    return SectionRows(views, nodes, targets, rows, lost, owed)


def read_truth(connection: Connection, keys: Iterable[FragmentKey]) -> Truth:
    """What SQL says now of the blocks, volumes and slots of some fragments."""
    wanted = list(keys)
    names = sorted({bytes(key.block) for key in wanted})
    rows: dict[BlockHash, LiveRow] = {}
    known: dict[BlockHash, VolumeId] = {}
    owed: set[FragmentKey] = set()
    for start in range(0, len(names), _IDS_PER_QUERY):
        part = names[start : start + _IDS_PER_QUERY]
        for row in connection.execute(select(blocks).where(blocks.c.hash.in_(part))):
            block, volume = BlockHash(row.hash), VolumeId(row.volume_id)
            known[block] = volume
            if row.state == LIVE:
                rows[block] = LiveRow(volume, row.stored_bytes, row.plain_bytes, row.created)
    ids = sorted({key.volume for key in wanted})
    views = {view.volume_id: view for view in map_rows.read_volumes(connection, ids)}
    moves: dict[tuple[VolumeId, int], NodeId] = {}
    for start in range(0, len(ids), _IDS_PER_QUERY):
        some = ids[start : start + _IDS_PER_QUERY]
        for move in connection.execute(select(slot_moves).where(slot_moves.c.volume_id.in_(some))):
            moves[VolumeId(move.volume_id), move.slot] = NodeId(move.target)
    slots = sorted({(int(key.volume), key.slot, bytes(key.block)) for key in wanted})
    for start in range(0, len(slots), _IDS_PER_QUERY):
        owed |= _owed_among(connection, slots[start : start + _IDS_PER_QUERY])
    return Truth(rows, known, views, moves, owed)


def _owed_among(
    connection: Connection, slots: Sequence[tuple[int, int, bytes]]
) -> set[FragmentKey]:
    wanted = set(slots)
    query = select(debts.c.volume_id, debts.c.slot, debts.c.hash).where(
        debts.c.volume_id.in_({volume for volume, _, _ in slots}),
        debts.c.hash.in_({block for _, _, block in slots}),
    )
    return {
        FragmentKey(VolumeId(volume), BlockHash(block), slot)
        for volume, slot, block in connection.execute(query)
        if (volume, slot, block) in wanted
    }


def _read_map(
    connection: Connection, part: VolumeRange
) -> tuple[list[VolumeView], list[NodeView], list[tuple[VolumeId, int, NodeId]], int]:
    ids = connection.execute(
        select(volumes.c.volume_id).where(
            volumes.c.volume_id > part.after, volumes.c.volume_id <= part.last
        )
    ).scalars()
    views = map_rows.read_volumes(connection, [VolumeId(number) for number in ids])
    nodes = [node for node in map_rows.read_nodes(connection) if node.state is not NodeState.GONE]
    moves = connection.execute(
        select(slot_moves.c.volume_id, slot_moves.c.slot, slot_moves.c.target).where(
            slot_moves.c.volume_id > part.after, slot_moves.c.volume_id <= part.last
        )
    )
    targets = [(VolumeId(volume), slot, NodeId(node)) for volume, slot, node in moves]
    end: int = connection.execute(select(map_version.c.next_volume)).scalar_one()
    return views, nodes, targets, end


def _read_page(
    connection: Connection, part: VolumeRange, after: bytes, limit: int
) -> tuple[bytes | None, list[IndexRow]]:
    """Rows of the range among the next `limit` rows of the table, and where those end."""
    ahead = select(blocks.c.hash).where(blocks.c.hash > after).order_by(blocks.c.hash)
    bound = connection.execute(ahead.offset(limit - 1).limit(1)).scalar_one_or_none()
    inside = [blocks.c.hash > after, blocks.c.volume_id > part.after]
    if part.last != LAST_VOLUME:
        inside.append(blocks.c.volume_id <= part.last)
    if bound is not None:
        inside.append(blocks.c.hash <= bound)
    query = select(blocks.c.volume_id, blocks.c.hash, blocks.c.stored_bytes, blocks.c.state).where(
        *inside
    )
    found = [
        IndexRow(volume, block, stored, state == LIVE)
        for volume, block, stored, state in connection.execute(query)
    ]
    return bound, found


async def _read_owed(db: Database, part: VolumeRange) -> list[tuple[int, int, bytes]]:
    """Debts of the range, a page at a time."""
    found: list[tuple[int, int, bytes]] = []
    cursor: tuple[int, int, bytes] = (part.after, 2**15 - 1, b"")
    while True:
        page = await db.read(partial(_owed_page, part=part, after=cursor))
        found += page
        if len(page) < _DEBTS_PER_READ:
            return found
        cursor = page[-1]


def _owed_page(
    connection: Connection, part: VolumeRange, after: tuple[int, int, bytes]
) -> list[tuple[int, int, bytes]]:
    volume, slot, block = after
    beyond = or_(
        debts.c.volume_id > volume,
        and_(debts.c.volume_id == volume, debts.c.slot > slot),
        and_(debts.c.volume_id == volume, debts.c.slot == slot, debts.c.hash > block),
    )
    query = (
        select(debts.c.volume_id, debts.c.slot, debts.c.hash)
        .where(beyond, debts.c.volume_id >= volume, debts.c.volume_id <= part.last)
        .order_by(debts.c.volume_id, debts.c.slot, debts.c.hash)
        .limit(_DEBTS_PER_READ)
    )
    return [(row[0], row[1], row[2]) for row in connection.execute(query)]
