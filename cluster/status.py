"""What an operator sees of a cell: the data behind `GET /v1/admin/status` and `/metrics`.

Called by `api` in a gateway, which needs no placement service for it.  Reads `cell.db` only, in one
snapshot; its cost grows with nodes, volumes and what is lost, never with blocks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, Select, func, or_, select, union

from cluster import map_rows
from cluster.block_index import Totals, count_debts, read_totals
from cluster.schema import cell, debts, volume_slots, volumes
from cluster.topology import SERVES_READS, NodeView, VolumeState
from erasure.scheme import Scheme
from protocol.errors import ConfigInvalid
from protocol.ids import NodeId
from sql.database import Database

_NODES_PER_QUERY: Final = 500


@dataclass(frozen=True, slots=True)
class CellStatus:
    """One snapshot of a cell."""

    cluster_id: str
    scheme: Scheme
    map_version: int
    nodes: tuple[NodeView, ...]
    open_volumes: int
    sealed_volumes: int
    spare: dict[int, int]
    """Volumes by how many more fragments they could lose: -1 and below is unreadable now.  A slot
    is lost while it is vacant, its node does not serve, or any block has a debt in it."""
    totals: Totals
    debts: int

    def to_json(self) -> dict[str, Any]:
        """The answer of the API, except for what only the API knows."""
        return {
            "cluster_id": self.cluster_id,
            "scheme": self.scheme.name,
            "map_version": self.map_version,
            "nodes": [_node_json(node) for node in self.nodes],
            "volumes": {
                "open": self.open_volumes,
                "sealed": self.sealed_volumes,
                "by_spare": {str(spare): self.spare[spare] for spare in sorted(self.spare)},
            },
            "blocks": self.totals.blocks,
            "logical_bytes": self.totals.plain_bytes,
            "stored_bytes": self.totals.stored_bytes,
            "fragment_bytes": sum(node.used_bytes for node in self.nodes),
            "debts": self.debts,
        }


async def read_status(db: Database) -> CellStatus:
    """A snapshot.  Raises `ConfigInvalid` without a cell, `DatabaseBusy`."""
    return await db.read(status_of)


def status_of(connection: Connection) -> CellStatus:
    """`read_status` on a connection."""
    row = connection.execute(select(cell.c.cluster_id, cell.c.scheme)).one_or_none()
    if row is None:
        raise ConfigInvalid("this database holds no cell yet")
    nodes = map_rows.read_nodes(connection)
    by_state = select(volumes.c.state, func.count()).group_by(volumes.c.state)
    counts: dict[str, int] = {row[0]: row[1] for row in connection.execute(by_state)}
    return CellStatus(
        cluster_id=row.cluster_id,
        scheme=Scheme.parse(row.scheme),
        map_version=map_rows.read_version(connection),
        nodes=tuple(nodes),
        open_volumes=counts.get(VolumeState.OPEN.value, 0),
        sealed_volumes=counts.get(VolumeState.SEALED.value, 0),
        spare=_volumes_by_spare(connection, nodes),
        totals=read_totals(connection),
        debts=count_debts(connection),
    )


def _volumes_by_spare(connection: Connection, nodes: Iterable[NodeView]) -> dict[int, int]:
    """Counts whole schemes first, then only volumes that lost something."""
    by_scheme = select(volumes.c.scheme, func.count()).group_by(volumes.c.scheme)
    counts: dict[tuple[str, int], int] = {
        (scheme, 0): count for scheme, count in connection.execute(by_scheme)
    }
    away = [node.node_id for node in nodes if node.state not in SERVES_READS]
    lost = union(_lost_slots(away), select(debts.c.volume_id, debts.c.slot).distinct()).subquery()
    per_volume = (
        select(lost.c.volume_id, func.count().label("lost")).group_by(lost.c.volume_id).subquery()
    )
    query = (
        select(volumes.c.scheme, per_volume.c.lost, func.count())
        .join(per_volume, per_volume.c.volume_id == volumes.c.volume_id)
        .group_by(volumes.c.scheme, per_volume.c.lost)
    )
    for scheme, lost_slots, count in connection.execute(query):
        counts[scheme, lost_slots] = counts.get((scheme, lost_slots), 0) + count
        counts[scheme, 0] -= count
    spare: dict[int, int] = {}
    for (scheme, lost_slots), count in counts.items():
        if count:
            left = Scheme.parse(scheme).m - lost_slots
            spare[left] = spare.get(left, 0) + count
    return spare


def _lost_slots(away: list[NodeId]) -> Select[Any]:
    """Slots without a node that serves."""
    conditions = [volume_slots.c.node_id.is_(None)]
    for start in range(0, len(away), _NODES_PER_QUERY):
        conditions.append(volume_slots.c.node_id.in_(away[start : start + _NODES_PER_QUERY]))
    return select(volume_slots.c.volume_id, volume_slots.c.slot).where(or_(*conditions))


def _node_json(node: NodeView) -> dict[str, Any]:
    return {
        "id": str(node.node_id),
        "state": str(node.state),
        "since": node.state_since,
        "pid": node.pid,
        "endpoint": node.endpoint,
        "directory": node.directory,
        "host": node.host,
        "rack": node.rack,
        "weight": node.weight,
        "incarnation": node.incarnation,
        "bytes": node.used_bytes,
        "fragments": node.fragments,
        "capacity_bytes": node.capacity_bytes,
        "free_bytes": node.free_bytes,
        "detail": node.detail,
    }
