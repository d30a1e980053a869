"""How many blocks could lose how many more fragments: the redundancy debt of a cell, in SQL.

Read by `status` and `explain.why`.  Costs one pass over the volume rows, one over the slots of
nodes that are away (an index), and one over the debts; nothing grows with blocks that are whole.
`explain.what_if` counts the same from arrays; a property test holds the two to each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, Select, Table, func, or_, select, union

from cluster import map_rows
from cluster.block_index import count_debts
from cluster.schema import debts, slot_moves, unrepairable, volume_slots, volumes
from cluster.topology import SERVES_READS, NodeView
from erasure.scheme import Scheme
from protocol.ids import NodeId

_NODES_PER_QUERY: Final = 500


@dataclass(frozen=True, slots=True)
class Redundancy:
    """What is not as it should be, and how near to loss that is."""

    blocks_by_spare: dict[int, int]
    """Blocks by the fragments that each could still lose; below zero: unreadable now."""
    debts: int
    """Fragments known to be missing where a node of the map should hold them."""
    oldest_debt: float | None
    """Wall-clock seconds since when the oldest of them has been owed."""
    unrepairable: int
    """Blocks that repair gave up on until something changes."""
    moves: int
    """Slots that are being made on another node now."""

    def to_json(self) -> dict[str, Any]:
        """JSON-ready; the histogram from the worst class to the best."""
        histogram = self.blocks_by_spare
        return {
            "blocks_by_spare": {str(spare): histogram[spare] for spare in sorted(histogram)},
            "debts": self.debts,
            "oldest_debt": self.oldest_debt,
            "unrepairable": self.unrepairable,
            "moves": self.moves,
        }


def read_redundancy(connection: Connection, nodes: Iterable[NodeView] | None = None) -> Redundancy:
    """One snapshot; `nodes` are read unless given."""
    oldest: float | None = connection.execute(select(func.min(debts.c.since))).scalar_one()
    return Redundancy(
        blocks_by_spare=blocks_by_spare(connection, nodes),
        debts=count_debts(connection),
        oldest_debt=oldest,
        unrepairable=_count_rows(connection, unrepairable),
        moves=_count_rows(connection, slot_moves),
    )


def volumes_by_spare(connection: Connection, nodes: Iterable[NodeView]) -> dict[int, int]:
    """Volumes by the fragments that they could still lose: -1 and below is unreadable now.  A slot
    is lost while it is vacant, its node does not serve, or any block has a debt in it.

    Counts whole schemes first, then only volumes that lost something.
    """
    by_scheme = select(volumes.c.scheme, func.count()).group_by(volumes.c.scheme)
    counts: dict[tuple[str, int], int] = {
        (scheme, 0): count for scheme, count in connection.execute(by_scheme)
    }
    lost = union(
        _lost_slots(_away(nodes)), select(debts.c.volume_id, debts.c.slot).distinct()
    ).subquery()
    per_volume = _per_volume(lost)
    query = (
        select(volumes.c.scheme, per_volume.c.lost, func.count())
        .join(per_volume, per_volume.c.volume_id == volumes.c.volume_id)
        .group_by(volumes.c.scheme, per_volume.c.lost)
    )
    for scheme, lost_slots, count in connection.execute(query):
        counts[scheme, lost_slots] = counts.get((scheme, lost_slots), 0) + count
        counts[scheme, 0] -= count
    return _by_spare(counts)


def blocks_by_spare(
    connection: Connection, nodes: Iterable[NodeView] | None = None
) -> dict[int, int]:
    """Blocks by the fragments that each could still lose; a debt counts for its own block."""
    away = _away(map_rows.read_nodes(connection) if nodes is None else nodes)
    by_scheme = select(volumes.c.scheme, func.sum(volumes.c.blocks)).group_by(volumes.c.scheme)
    counts: dict[tuple[str, int], int] = {
        (scheme, 0): int(count) for scheme, count in connection.execute(by_scheme)
    }
    lost = _lost_slots(away).subquery()
    per_volume = _per_volume(lost)
    query = (
        select(volumes.c.scheme, per_volume.c.lost, func.sum(volumes.c.blocks))
        .join(per_volume, per_volume.c.volume_id == volumes.c.volume_id)
        .group_by(volumes.c.scheme, per_volume.c.lost)
    )
    for scheme, slots, count in connection.execute(query).fetchall():
        _move(counts, scheme, 0, slots, int(count))
    for scheme, slots, owed, count in connection.execute(_blocks_owing(lost, per_volume)):
        _move(counts, scheme, slots, slots + owed, count)
    return _by_spare(counts)


def _count_rows(connection: Connection, table: Table) -> int:
    count: int = connection.execute(select(func.count()).select_from(table)).scalar_one()
    return count


def _blocks_owing(lost: Any, per_volume: Any) -> Select[Any]:
    """Blocks with debts in slots that are not lost anyway: (scheme, slots lost, owed, blocks)."""
    per_block = (
        select(debts.c.volume_id, debts.c.hash, func.count().label("owed"))
        .outerjoin(lost, (lost.c.volume_id == debts.c.volume_id) & (lost.c.slot == debts.c.slot))
        .where(lost.c.slot.is_(None))
        .group_by(debts.c.volume_id, debts.c.hash)
        .subquery()
    )
    lost_slots = func.coalesce(per_volume.c.lost, 0)
    return (
        select(volumes.c.scheme, lost_slots, per_block.c.owed, func.count())
        .select_from(per_block)
        .join(volumes, volumes.c.volume_id == per_block.c.volume_id)
        .outerjoin(per_volume, per_volume.c.volume_id == per_block.c.volume_id)
        .group_by(volumes.c.scheme, lost_slots, per_block.c.owed)
    )


def _per_volume(lost: Any) -> Any:
    return (
        select(lost.c.volume_id, func.count().label("lost")).group_by(lost.c.volume_id).subquery()
    )


def _away(nodes: Iterable[NodeView]) -> list[NodeId]:
    return [node.node_id for node in nodes if node.state not in SERVES_READS]


def _lost_slots(away: Sequence[NodeId]) -> Select[Any]:
    """Slots without a node that serves."""
    conditions = [volume_slots.c.node_id.is_(None)]
    for start in range(0, len(away), _NODES_PER_QUERY):
        conditions.append(volume_slots.c.node_id.in_(away[start : start + _NODES_PER_QUERY]))
    return select(volume_slots.c.volume_id, volume_slots.c.slot).where(or_(*conditions))


def _move(
    counts: dict[tuple[str, int], int], scheme: str, before: int, after: int, count: int
) -> None:
    counts[scheme, before] = counts.get((scheme, before), 0) - count
    counts[scheme, after] = counts.get((scheme, after), 0) + count


def _by_spare(counts: dict[tuple[str, int], int]) -> dict[int, int]:
    spare: dict[int, int] = {}
    for (scheme, lost_slots), count in counts.items():
        if count > 0:
            left = Scheme.parse(scheme).m - lost_slots
            spare[left] = spare.get(left, 0) + count
    return spare
