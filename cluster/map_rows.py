"""SQL of the map: node rows, volume rows with their slots, and the version that announces changes.

Called inside a transaction by `volume_map` (reads), `cell`, `placement_service` and `status`.
Functions over a connection, nothing else: no clock, no event loop, no Ray.

A writer takes `next_version` once and marks every row it changes with it, so a reader at version v
asks for the rows changed after v.  The writers that a client's map need not see say so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, Row, Select, bindparam, case, delete, insert, select, update

from cluster.events import DETAIL_CHARACTERS_MAX
from cluster.schema import cell, map_version, nodes, volume_slots, volumes
from cluster.topology import NodeState, NodeView, VolumeState, VolumeView
from erasure.scheme import Scheme
from protocol.ids import NodeId, VolumeId
from storage_node.interface import NodeRegistration

_IDS_PER_QUERY: Final = 500
"""Ids in one IN list: far below every database's limit on parameters."""


# Statements of every few seconds, built once.
_VERSION: Final = select(map_version.c.version)
_NODES_CHANGED: Final = (
    select(nodes).where(nodes.c.changed > bindparam("changed_after")).order_by(nodes.c.node_id)
)
_VOLUMES: Final = (
    select(
        volumes.c.volume_id,
        volumes.c.scheme,
        volumes.c.state,
        volumes.c.epoch,
        volumes.c.stored_bytes,
        volumes.c.blocks,
        volume_slots.c.node_id,
    )
    .join(volume_slots, volume_slots.c.volume_id == volumes.c.volume_id)
    .order_by(volumes.c.volume_id, volume_slots.c.slot)
)
_OPEN_VOLUMES: Final = _VOLUMES.where(volumes.c.state == VolumeState.OPEN.value)


class NodeReport(NamedTuple):
    """How full a node says it is, as often as it is asked."""

    node_id: NodeId
    free_bytes: int
    used_bytes: int
    fragments: int
    placement_free_bytes: int = -1


def read_version(connection: Connection) -> int:
    """The map's version."""
    version: int = connection.execute(_VERSION).scalar_one()
    return version


def next_version(connection: Connection) -> int:
    """Raise the map's version for the changes of this transaction, and return it."""
    connection.execute(update(map_version).values(version=map_version.c.version + 1))
    return read_version(connection)


def read_scheme(connection: Connection) -> Scheme | None:
    """What new large blocks get; None without a cell."""
    name = connection.execute(select(cell.c.scheme)).scalar_one_or_none()
    return None if name is None else Scheme.parse(name)


# -- nodes -------------------------------------------------------------------------------------


def read_nodes(connection: Connection, changed_after: int = -1) -> list[NodeView]:
    """Nodes whose rows changed after a version, in id order; all of them by default."""
    rows = connection.execute(_NODES_CHANGED, {"changed_after": changed_after})
    return [_node_view(row) for row in rows]


def read_node(connection: Connection, node_id: NodeId) -> NodeView | None:
    """One node, or None."""
    row = connection.execute(select(nodes).where(nodes.c.node_id == node_id)).one_or_none()
    return None if row is None else _node_view(row)


def insert_nodes(connection: Connection, views: Sequence[NodeView], version: int) -> None:
    """Add rows for nodes that the cell does not have."""
    rows = [
        {
            "node_id": str(view.node_id),
            "store_id": view.store_id,
            "directory": view.directory,
            "host": view.host,
            "rack": view.rack,
            "weight": view.weight,
            "state": view.state.value,
            "state_since": view.state_since,
            "incarnation": view.incarnation,
            "endpoint": view.endpoint,
            "pid": view.pid,
            "capacity_bytes": view.capacity_bytes,
            "free_bytes": view.free_bytes,
            "used_bytes": view.used_bytes,
            "fragments": view.fragments,
            "placement_free_bytes": view.placement_free_bytes,
            "detail": view.detail,
            "changed": version,
        }
        for view in views
    ]
    if rows:
        connection.execute(insert(nodes), rows)


def set_node_state(
    connection: Connection,
    node_id: NodeId,
    state: NodeState,
    since: float,
    detail: str,
    version: int,
) -> None:
    """Record a transition that `topology.transition` allowed."""
    connection.execute(
        update(nodes)
        .where(nodes.c.node_id == node_id)
        .values(state=state.value, state_since=since, detail=detail, changed=version)
    )


def set_disk_failed(connection: Connection, node_id: NodeId, failed: bool, version: int) -> None:
    """Record what a node says of its own disk."""
    connection.execute(
        update(nodes).where(nodes.c.node_id == node_id).values(disk_failed=failed, changed=version)
    )


def forget_endpoint(connection: Connection, node_id: NodeId, version: int) -> None:
    """The process behind a node's row has ended: nobody is to be sent there any more."""
    connection.execute(
        update(nodes).where(nodes.c.node_id == node_id).values(endpoint="", pid=0, changed=version)
    )


def begin_incarnation(connection: Connection, registration: NodeRegistration, version: int) -> None:
    """A node process announced itself: count it and note where it is.

    From this commit on, receipts of every earlier incarnation are refused.
    """
    connection.execute(
        update(nodes)
        .where(nodes.c.node_id == registration.node_id)
        .values(
            incarnation=nodes.c.incarnation + 1,
            endpoint=registration.endpoint,
            pid=registration.pid,
            directory=registration.directory,
            capacity_bytes=registration.capacity_bytes,
            # Until its first report: a new disk is empty.
            free_bytes=case(
                (nodes.c.incarnation == 0, registration.capacity_bytes), else_=nodes.c.free_bytes
            ),
            changed=version,
        )
    )


def note_refusal(connection: Connection, registration: NodeRegistration, version: int) -> None:
    """A node process does not serve its directory: where it can be asked, and why."""
    connection.execute(
        update(nodes)
        .where(nodes.c.node_id == registration.node_id)
        .values(
            endpoint=registration.endpoint,
            pid=registration.pid,
            detail=registration.refusal[:DETAIL_CHARACTERS_MAX],
            changed=version,
        )
    )


def skip_incarnations(
    connection: Connection, node_id: NodeId, incarnation: int, version: int
) -> None:
    """Go on from a higher incarnation than the row has: the node wrote down more of them than a
    database that was restored from a copy knows of."""
    connection.execute(
        update(nodes)
        .where(nodes.c.node_id == node_id, nodes.c.incarnation < incarnation)
        .values(incarnation=incarnation, changed=version)
    )


def save_reports(connection: Connection, reports: Sequence[NodeReport]) -> None:
    """Store what nodes report; clients do not choose by it, so the map version stays."""
    for report in reports:
        connection.execute(
            update(nodes)
            .where(nodes.c.node_id == report.node_id)
            .values(
                free_bytes=report.free_bytes,
                used_bytes=report.used_bytes,
                fragments=report.fragments,
                placement_free_bytes=report.placement_free_bytes,
            )
        )


def _node_view(row: Row[Any]) -> NodeView:
    return NodeView(
        node_id=NodeId(row.node_id),
        store_id=row.store_id,
        directory=row.directory,
        host=row.host,
        rack=row.rack,
        weight=row.weight,
        state=NodeState(row.state),
        state_since=row.state_since,
        incarnation=row.incarnation,
        endpoint=row.endpoint,
        pid=row.pid,
        capacity_bytes=row.capacity_bytes,
        free_bytes=row.free_bytes,
        used_bytes=row.used_bytes,
        fragments=row.fragments,
        detail=row.detail,
        disk_failed=bool(row.disk_failed),
        placement_free_bytes=row.placement_free_bytes,
    )


# -- volumes -----------------------------------------------------------------------------------


def read_open_volumes(connection: Connection) -> list[VolumeView]:
    """All open volumes in id order: a handful per scheme."""
    return _volume_views(connection, _OPEN_VOLUMES)


def read_volumes(connection: Connection, volume_ids: Iterable[VolumeId]) -> list[VolumeView]:
    """Those of the given volumes that exist, in id order."""
    wanted = sorted({int(volume_id) for volume_id in volume_ids})
    found: list[VolumeView] = []
    for start in range(0, len(wanted), _IDS_PER_QUERY):
        chunk = wanted[start : start + _IDS_PER_QUERY]
        query = _VOLUMES.where(volumes.c.volume_id.in_(chunk))
        found.extend(_volume_views(connection, query))
    return found


def read_all_volumes(connection: Connection) -> list[VolumeView]:
    """Every volume in id order, for planners: some 10 us a slot."""
    return _volume_views(connection, _VOLUMES)


def changed_volumes(connection: Connection, changed_after: int) -> list[VolumeId]:
    """Volumes whose state, epoch or slots changed after a version."""
    query = select(volumes.c.volume_id).where(volumes.c.changed > changed_after)
    return [VolumeId(number) for number in connection.execute(query).scalars()]


def insert_volumes(
    connection: Connection,
    planned: Sequence[tuple[Scheme, tuple[NodeId | None, ...]]],
    created: float,
    version: int,
) -> list[VolumeId]:
    """Open volumes of epoch 1 with these slots; returns their numbers in order."""
    if not planned:
        return []
    connection.execute(
        update(map_version).values(next_volume=map_version.c.next_volume + len(planned))
    )
    after: int = connection.execute(select(map_version.c.next_volume)).scalar_one()
    ids = [VolumeId(number) for number in range(after - len(planned), after)]
    connection.execute(
        insert(volumes),
        [
            {
                "volume_id": int(volume_id),
                "scheme": scheme.name,
                "state": VolumeState.OPEN.value,
                "epoch": 1,
                "stored_bytes": 0,
                "plain_bytes": 0,
                "blocks": 0,
                "created": created,
                "changed": version,
            }
            for volume_id, (scheme, _) in zip(ids, planned, strict=True)
        ],
    )
    connection.execute(
        insert(volume_slots),
        [
            {
                "volume_id": int(volume_id),
                "slot": slot,
                "node_id": None if node_id is None else str(node_id),
            }
            for volume_id, (_, slots) in zip(ids, planned, strict=True)
            for slot, node_id in enumerate(slots)
        ],
    )
    return ids


def seal_volume(connection: Connection, volume_id: VolumeId, version: int) -> None:
    """Take a volume out of the open ones; one that never got a block is removed altogether.

    A put that is under way when its volume is removed finds no row and is fenced.
    """
    row = connection.execute(
        select(volumes.c.blocks)
        .where(volumes.c.volume_id == int(volume_id), volumes.c.state == VolumeState.OPEN.value)
        .with_for_update()
    ).one_or_none()
    if row is None:
        return
    if row.blocks == 0:
        connection.execute(delete(volume_slots).where(volume_slots.c.volume_id == int(volume_id)))
        connection.execute(delete(volumes).where(volumes.c.volume_id == int(volume_id)))
        return
    connection.execute(
        update(volumes)
        .where(volumes.c.volume_id == int(volume_id))
        .values(state=VolumeState.SEALED.value, changed=version)
    )


def _volume_views(connection: Connection, query: Select[Any]) -> list[VolumeView]:
    """Fold rows of (volume, slot) into views; every volume has all of its n slot rows."""
    found: list[VolumeView] = []
    slots: list[NodeId | None] = []
    schemes: dict[str, Scheme] = {}
    for row in connection.execute(query):
        slots.append(None if row.node_id is None else NodeId(row.node_id))
        scheme = schemes.get(row.scheme)
        if scheme is None:
            scheme = schemes[row.scheme] = Scheme.parse(row.scheme)
        if len(slots) < scheme.n:
            continue
        found.append(
            VolumeView(
                volume_id=VolumeId(row.volume_id),
                scheme=scheme,
                state=VolumeState(row.state),
                epoch=row.epoch,
                slots=tuple(slots),
                stored_bytes=row.stored_bytes,
                blocks=row.blocks,
            )
        )
        slots = []
    assert not slots, "a volume has fewer slot rows than its scheme has slots"
    return found
