"""Where every block of a cell lies, as arrays: what `what-if` computes on.

Read from `cell.db` in one snapshot; pure apart from that.  Imports NumPy, so import it where a
question is asked, not at the start of a gateway.

A *row* is a group of blocks that have the same slots in place.  A volume without debts is one row;
one in which some blocks lack fragments has one more row for each distinct set of missing slots,
in which those slots are vacant.  So a loss is judged with the same array operations for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
from sqlalchemy import Connection, func, literal, select

from cluster import map_rows
from cluster.schema import debts, volume_slots, volumes
from cluster.topology import NodeView
from erasure.scheme import Scheme

Int64s: TypeAlias = npt.NDArray[np.int64]
Int32s: TypeAlias = npt.NDArray[np.int32]

VACANT: Final = -1
"""In `SlotTable.slots`: no node holds it, or the blocks of this row are known to lack it."""

NO_SLOT: Final = -2
"""In `SlotTable.slots`: the row's scheme has fewer slots than the widest."""


@dataclass(frozen=True, slots=True)
class SlotTable:
    """R rows over N nodes; rows of one volume are neighbours, volumes in id order."""

    nodes: tuple[NodeView, ...]
    schemes: tuple[Scheme, ...]
    volume_ids: Int64s
    """[R]"""
    scheme_of: Int32s
    """[R] index into `schemes`"""
    slots: Int32s
    """[R, widest scheme] index into `nodes`, `VACANT` or `NO_SLOT`"""
    blocks: Int64s
    """[R]"""
    stored_bytes: Int64s
    """[R] before coding; of a row with debts the mean of its volume's blocks is taken"""

    def per_row(self, values: Sequence[int]) -> Int32s:
        """[R] one value per scheme, spread over the rows."""
        return np.asarray(values, np.int32)[self.scheme_of]

    def volume_starts(self) -> Int64s:
        """First row of each volume."""
        if len(self.volume_ids) == 0:
            return np.empty(0, np.int64)
        changes = np.flatnonzero(np.diff(self.volume_ids)) + 1
        return np.concatenate((np.zeros(1, np.int64), changes))


def read_slot_table(connection: Connection) -> SlotTable:
    """All volumes.  Costs one row of SQL per slot and one per debt: about a second per hundred
    thousand volumes of nine slots."""
    nodes = tuple(map_rows.read_nodes(connection))
    query = select(
        volumes.c.volume_id, volumes.c.scheme, volumes.c.blocks, volumes.c.stored_bytes
    ).order_by(volumes.c.volume_id)
    rows = connection.execute(query).fetchall()
    names = sorted({row.scheme for row in rows})
    schemes = tuple(Scheme.parse(name) for name in names)
    number = {name: index for index, name in enumerate(names)}
    table = SlotTable(
        nodes=nodes,
        schemes=schemes,
        volume_ids=np.fromiter((row.volume_id for row in rows), np.int64, len(rows)),
        scheme_of=np.fromiter((number[row.scheme] for row in rows), np.int32, len(rows)),
        slots=np.full((len(rows), max((s.n for s in schemes), default=1)), NO_SLOT, np.int32),
        blocks=np.fromiter((row.blocks for row in rows), np.int64, len(rows)),
        stored_bytes=np.fromiter((row.stored_bytes for row in rows), np.int64, len(rows)),
    )
    _fill_slots(connection, table)
    return _split_by_debts(connection, table)


def _fill_slots(connection: Connection, table: SlotTable) -> None:
    index = {str(node.node_id): number for number, node in enumerate(table.nodes)}
    query = select(volume_slots.c.node_id).order_by(volume_slots.c.volume_id, volume_slots.c.slot)
    found = connection.execute(query).scalars()
    flat = np.fromiter((VACANT if name is None else index[name] for name in found), np.int32)
    used = np.arange(table.slots.shape[1]) < table.per_row([s.n for s in table.schemes])[:, None]
    # Every volume has all of its slot rows, so row-major order is the order of the query.
    table.slots[used] = flat


def _split_by_debts(connection: Connection, table: SlotTable) -> SlotTable:
    """Move blocks with debts into rows of their own."""
    mask = func.sum(literal(1).op("<<")(debts.c.slot)).label("mask")
    per_block = select(debts.c.volume_id, mask).group_by(debts.c.volume_id, debts.c.hash).subquery()
    query = select(per_block.c.volume_id, per_block.c.mask, func.count()).group_by(
        per_block.c.volume_id, per_block.c.mask
    )
    owed = connection.execute(query).fetchall()
    if not owed:
        return table
    masks = np.array([row[1] for row in owed], np.int64)
    rows = np.searchsorted(table.volume_ids, np.array([row[0] for row in owed], np.int64))
    found = rows < len(table.volume_ids)
    found &= table.volume_ids[np.minimum(rows, len(table.volume_ids) - 1)] == [r[0] for r in owed]
    rows, masks = rows[found], masks[found]
    counts = np.array([row[2] for row in owed], np.int64)[found]
    share = table.stored_bytes[rows] * counts // np.maximum(table.blocks[rows], 1)
    slots = table.slots[rows].copy()
    missing = (masks[:, None] >> np.arange(slots.shape[1])) & 1 == 1
    slots[missing & (slots >= 0)] = VACANT
    blocks, stored = table.blocks.copy(), table.stored_bytes.copy()
    np.subtract.at(blocks, rows, counts)
    np.subtract.at(stored, rows, share)
    joined: dict[str, Any] = {
        "volume_ids": np.concatenate((table.volume_ids, table.volume_ids[rows])),
        "scheme_of": np.concatenate((table.scheme_of, table.scheme_of[rows])),
        "slots": np.concatenate((table.slots, slots)),
        "blocks": np.concatenate((np.maximum(blocks, 0), counts)),
        "stored_bytes": np.concatenate((np.maximum(stored, 0), share)),
    }
    order = np.argsort(joined["volume_ids"], kind="stable")
    return SlotTable(
        nodes=table.nodes,
        schemes=table.schemes,
        **{name: array[order] for name, array in joined.items()},
    )
