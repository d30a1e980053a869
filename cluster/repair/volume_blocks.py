"""Which blocks a volume holds: what the index says, found without an index by volume.

Step 3 of a move.  There is no SQL index by volume on `blocks`, on purpose (`docs/design/008`): so
candidates come from the nodes' inventories and are confirmed by hash, and where their number is not
the volume's counter the table is scanned in bounded pages; blocks that left no fragment anywhere
are found then.  May not import Ray.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Sequence
from typing import Final

from sqlalchemy import Connection, select

from cluster.block_index import BlockIndex, BlockRow
from cluster.block_sql import LIVE
from cluster.node_pool import Direction, NodePool
from cluster.schema import blocks
from cluster.topology import VolumeView
from protocol.errors import HaversackError
from protocol.ids import BLOCK_HASH_BYTES, BlockHash, NodeId, VolumeId
from sql.database import Database
from storage_node.interface import FragmentKey

_PAGE_KEYS: Final = 8_192
_SCAN_ROWS: Final = 50_000
"""Rows of the block table looked at in one query."""

_LAST_HASH: Final = BlockHash(b"\xff" * BLOCK_HASH_BYTES)


async def volume_rows(
    index: BlockIndex, db: Database, pool: NodePool, volume: VolumeView, call_s: float
) -> list[BlockRow]:
    """All live blocks of a sealed volume in hash order.

    `volume` was read after the volume's epoch had risen: no block comes after that, some may go.
    Raises `DatabaseBusy`.
    """
    found: dict[BlockHash, BlockRow] = {}
    if volume.blocks == 0:
        return []
    holders = [node_id for node_id in volume.slots if node_id is not None]
    holders.sort(key=lambda node_id: not pool.is_trusted(node_id, Direction.READ))
    for node_id in holders:
        if not pool.is_trusted(node_id, Direction.READ):
            break
        try:
            async for page in _inventory(pool, node_id, volume.volume_id, call_s):
                unknown = [block for block in page if block not in found]
                rows = await index.lookup(unknown) if unknown else {}
                found.update(
                    (row.hash, row) for row in rows.values() if row.volume == volume.volume_id
                )
        except HaversackError:
            continue  # another holder knows, or the table does
        if len(found) == volume.blocks:
            return _sorted(found)
    return _sorted({row.hash: row for row in await _scan(db, volume.volume_id)})


def _sorted(rows: dict[BlockHash, BlockRow]) -> list[BlockRow]:
    return [rows[block] for block in sorted(rows)]


async def _inventory(
    pool: NodePool, node_id: NodeId, volume: VolumeId, call_s: float
) -> AsyncIterator[list[BlockHash]]:
    """Blocks of which a node says that it holds a fragment, page by page."""
    after: FragmentKey | None = None
    if volume > 0:
        after = FragmentKey(VolumeId(volume - 1), _LAST_HASH, 255)
    more = True
    while more:
        reply = await pool.port(node_id).inventory(after, _PAGE_KEYS, call_s)
        keys = [FragmentKey.unpack(key) for key in reply.keys]
        mine = [key.block for key in keys if key.volume == volume]
        if mine:
            yield mine
        more = reply.more and len(mine) == len(keys)
        after = keys[-1] if keys else after


async def _scan(db: Database, volume: VolumeId) -> Sequence[BlockRow]:
    """The whole table, in pages that no other reader waits long for."""
    found: list[BlockRow] = []
    after = b""
    while True:
        page, last = await db.read(functools.partial(_page, volume=volume, after=after))
        found += page
        if last is None:
            return found
        after = last


def _page(
    connection: Connection, volume: VolumeId, after: bytes
) -> tuple[list[BlockRow], bytes | None]:
    """Rows of the volume among the next `_SCAN_ROWS`, and where to go on; None at the end."""
    last: bytes | None = connection.execute(
        select(blocks.c.hash)
        .where(blocks.c.hash > after)
        .order_by(blocks.c.hash)
        .offset(_SCAN_ROWS - 1)
        .limit(1)
    ).scalar_one_or_none()
    query = select(
        blocks.c.hash, blocks.c.volume_id, blocks.c.stored_bytes, blocks.c.plain_bytes
    ).where(blocks.c.hash > after, blocks.c.volume_id == int(volume), blocks.c.state == LIVE)
    if last is not None:
        query = query.where(blocks.c.hash <= last)
    rows = [
        BlockRow(BlockHash(name), VolumeId(number), stored, plain)
        for name, number, stored, plain in connection.execute(query)
    ]
    return rows, last
