"""SQL of repair: what it must look at, what it gave up on, how far it is.

Called inside transactions by `service` and `executor`.  Functions over a connection; no clock, no
event loop, no Ray.  Reads only volumes that lost something, through the index of slots by node.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from sqlalchemy import Connection, delete, func, insert, select, update

from cluster import map_rows
from cluster.debts import read_volume_debts
from cluster.move_rows import read_moves
from cluster.repair.plan import RepairView
from cluster.schema import unrepairable, volume_slots, volumes
from cluster.topology import VolumeState
from cluster.verify.pass_rows import CELL, PassRow, write_pass
from protocol.ids import BlockHash, NodeId, VolumeId

_PER_QUERY: Final = 500

_NODES_PER_QUERY: Final = 30_000
"""What SQLite takes in one IN list.  One query counts a volume's losses on all of these nodes; over
several, a volume with one loss in each would look better off than it is."""

PASS_KIND: Final = "repair"


def read_view(
    connection: Connection,
    out: Collection[NodeId],
    volumes_max: int,
) -> RepairView:
    """Nodes, moves, debts, and the volumes that lost most, at most `volumes_max` of them."""
    moves = read_moves(connection)
    owed = read_volume_debts(connection)
    lost: dict[int, int] = {}
    for volume, count in _lost_counts(connection, sorted(out), volumes_max):
        lost[volume] = lost.get(volume, 0) + count
    for item in owed:
        lost[int(item.volume)] = lost.get(int(item.volume), 0) + 1
    worst = sorted(lost, key=lambda volume: (-lost[volume], volume))[:volumes_max]
    wanted = {VolumeId(number) for number in worst} | {move.volume for move in moves}
    return RepairView(
        tuple(map_rows.read_nodes(connection)),
        frozenset(out),
        tuple(map_rows.read_volumes(connection, wanted)),
        tuple(item for item in owed if item.volume in wanted),
        tuple(moves),
    )


def _lost_counts(
    connection: Connection, out: Sequence[NodeId], limit: int
) -> list[tuple[int, int]]:
    """(volume, slots lost), most first; vacant slots of sealed volumes count."""
    found: list[tuple[int, int]] = []
    for start in range(0, len(out), _NODES_PER_QUERY):
        names = [str(node_id) for node_id in out[start : start + _NODES_PER_QUERY]]
        query = (
            select(volume_slots.c.volume_id, func.count().label("lost"))
            .where(volume_slots.c.node_id.in_(names))
            .group_by(volume_slots.c.volume_id)
            .order_by(func.count().desc())
            .limit(limit)
        )
        found += [(number, lost) for number, lost in connection.execute(query)]
    vacant = (
        select(volume_slots.c.volume_id, func.count().label("lost"))
        .join(volumes, volumes.c.volume_id == volume_slots.c.volume_id)
        .where(volume_slots.c.node_id.is_(None), volumes.c.state == VolumeState.SEALED.value)
        .group_by(volume_slots.c.volume_id)
        .order_by(func.count().desc())
        .limit(limit)
    )
    found += [(number, lost) for number, lost in connection.execute(vacant)]
    return found


def save_unrepairable(
    connection: Connection,
    volume: VolumeId,
    worked: Sequence[BlockHash],
    failed: Mapping[BlockHash, str],
    now: float,
) -> None:
    """List blocks that could not be made; those of `worked` that could are taken off the list."""
    listed = {
        bytes(name)
        for name in connection.execute(
            select(unrepairable.c.hash).where(unrepairable.c.volume_id == int(volume))
        ).scalars()
    }
    mended = [block for block in worked if bytes(block) in listed and block not in failed]
    for start in range(0, len(mended), _PER_QUERY):
        part = [bytes(block) for block in mended[start : start + _PER_QUERY]]
        connection.execute(delete(unrepairable).where(unrepairable.c.hash.in_(part)))
    for block, reason in failed.items():
        values = {"volume_id": int(volume), "reason": reason, "tried": now}
        if bytes(block) in listed:
            connection.execute(
                update(unrepairable).where(unrepairable.c.hash == bytes(block)).values(**values)
            )
        else:
            connection.execute(insert(unrepairable).values(hash=bytes(block), since=now, **values))


def listed_volumes(connection: Connection) -> set[int]:
    """Volumes of the blocks that could not be made."""
    return set(connection.execute(select(unrepairable.c.volume_id).distinct()).scalars())


def forget_unrepairable(connection: Connection, volume_ids: Collection[int]) -> None:
    """Take all blocks of these volumes off the list."""
    connection.execute(delete(unrepairable).where(unrepairable.c.volume_id.in_(volume_ids)))


def save_progress(
    connection: Connection, number: int, begun: float, ended: float | None, body: dict[str, Any]
) -> None:
    """How far repair is, for status and metrics, which need no Ray to read it."""
    write_pass(connection, PASS_KIND, CELL, PassRow(number, begun, ended, body))
