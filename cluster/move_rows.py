"""SQL of moves: the rows that say where a slot is being made, and the two transactions around them.

Called inside a leader's transactions by `cluster/repair`, which holds the state machine
(`docs/design/013-healing.md`).  Functions over a connection; no clock, no event loop, no Ray.

All moves of one volume share its epoch: whatever changes the volume's slots raises the epoch of
the volume and of its move rows together, so a move that works under an older one finds out at its
next transaction.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection, and_, delete, insert, select, update

from cluster import map_rows
from cluster.block_sql import Debt
from cluster.debts import DebtReason, record_debts
from cluster.schema import debts, nodes, slot_moves, volume_slots, volumes
from cluster.topology import VolumeView
from protocol.ids import BlockHash, NodeId, VolumeId


class MoveRow(NamedTuple):
    """A slot that is being made."""

    volume: VolumeId
    slot: int
    target: NodeId
    epoch: int
    """Of the volume since the move began."""
    reason: str
    job_id: int | None
    begun: float


class NewMove(NamedTuple):
    """A slot to make."""

    slot: int
    source: NodeId | None
    """If given, the slot must still be this node's."""
    target: NodeId
    reason: str
    job_id: int | None


class Verified(NamedTuple):
    """A slot whose fragments were all read back on its target."""

    slot: int
    target: NodeId
    incarnation: int
    """Of the target when it was verified."""
    owed: tuple[BlockHash, ...] = ()
    """Blocks whose fragment could not be made: fewer than k others are good."""


def read_moves(connection: Connection, volume: VolumeId | None = None) -> list[MoveRow]:
    """Moves under way in (volume, slot) order; all, or those of one volume."""
    query = select(slot_moves).order_by(slot_moves.c.volume_id, slot_moves.c.slot)
    if volume is not None:
        query = query.where(slot_moves.c.volume_id == int(volume))
    return [_move(row) for row in connection.execute(query)]


def begin_moves(
    connection: Connection, volume_id: VolumeId, moves: Sequence[NewMove], now: float
) -> VolumeView | None:
    """Seal the volume, raise its epoch, write the move rows; the volume as it is from now on.

    Changes nothing if all of them were begun before: that is how a move resumes.  None if the
    moves are not possible any more: the volume is gone (it was empty), a slot is another node's
    than planned, or a target holds a slot of the volume.
    """
    volume = _read_locked(connection, volume_id)
    if volume is None:
        return None
    begun = {move.slot: move for move in read_moves(connection, volume_id)}
    if not _possible(volume, begun, moves):
        return None
    if all(
        move.slot in begun
        and (begun[move.slot].target, begun[move.slot].epoch) == (move.target, volume.epoch)
        for move in moves
    ):
        return volume
    version = map_rows.next_version(connection)
    map_rows.seal_volume(connection, volume_id, version)
    _raise_epoch(connection, volume_id, version)
    found = map_rows.read_volumes(connection, [volume_id])
    if not found:
        return None  # it was open and empty: sealing removed it
    for move in moves:
        connection.execute(
            delete(slot_moves).where(
                slot_moves.c.volume_id == int(volume_id), slot_moves.c.slot == move.slot
            )
        )
        connection.execute(
            insert(slot_moves).values(
                volume_id=int(volume_id),
                slot=move.slot,
                target=str(move.target),
                epoch=volume.epoch + 1,
                reason=move.reason,
                job_id=move.job_id,
                begun=now,
            )
        )
    return found[0]


def publish_moves(
    connection: Connection,
    volume_id: VolumeId,
    epoch: int,
    verified: Sequence[Verified],
    now: float,
) -> bool:
    """Let the slots name their targets; False, with nothing changed, if anything has moved on.

    Compared: the volume's epoch, each move row's target and epoch, each target's incarnation.
    Debts of the slots are repaid, except for the blocks that could not be made.
    """
    volume = _read_locked(connection, volume_id)
    if volume is None or volume.epoch != epoch or not verified:
        return False
    begun = {move.slot: move for move in read_moves(connection, volume_id)}
    incarnations = _incarnations(connection, {item.target for item in verified})
    for item in verified:
        move = begun.get(item.slot)
        if move is None or (move.target, move.epoch) != (item.target, epoch):
            return False
        if incarnations.get(item.target) != item.incarnation:
            return False
        if item.target in volume.slots:
            return False
    version = map_rows.next_version(connection)
    for item in verified:
        here = and_(volume_slots.c.volume_id == int(volume_id), volume_slots.c.slot == item.slot)
        connection.execute(update(volume_slots).where(here).values(node_id=str(item.target)))
        connection.execute(
            delete(slot_moves).where(
                slot_moves.c.volume_id == int(volume_id), slot_moves.c.slot == item.slot
            )
        )
        connection.execute(
            delete(debts).where(debts.c.volume_id == int(volume_id), debts.c.slot == item.slot)
        )
        owed = [Debt(volume_id, item.slot, block) for block in item.owed]
        record_debts(connection, owed, now, DebtReason.MISSING)
    _raise_epoch(connection, volume_id, version)
    return True


def abandon_moves(connection: Connection, slots: Iterable[tuple[VolumeId, int]]) -> None:
    """Forget moves; what was made on their targets becomes stray."""
    for volume_id, slot in slots:
        connection.execute(
            delete(slot_moves).where(
                slot_moves.c.volume_id == int(volume_id), slot_moves.c.slot == slot
            )
        )


def incarnations_hold(connection: Connection, held: Mapping[NodeId, int]) -> bool:
    """Whether these nodes still live the lives in which they verified something."""
    found = _incarnations(connection, held)
    return all(found.get(node_id) == number for node_id, number in held.items())


def _possible(volume: VolumeView, begun: Mapping[int, MoveRow], moves: Sequence[NewMove]) -> bool:
    planned = {move.slot for move in moves}
    taken = set(volume.slots) | {row.target for slot, row in begun.items() if slot not in planned}
    for move in moves:
        if move.source is not None and volume.slots[move.slot] != move.source:
            return False
        if move.target in taken:
            return False
        taken.add(move.target)
    return True


def _read_locked(connection: Connection, volume_id: VolumeId) -> VolumeView | None:
    """The volume, held until the end of the transaction."""
    connection.execute(
        select(volumes.c.epoch).where(volumes.c.volume_id == int(volume_id)).with_for_update()
    )
    found = map_rows.read_volumes(connection, [volume_id])
    return found[0] if found else None


def _raise_epoch(connection: Connection, volume_id: VolumeId, version: int) -> None:
    connection.execute(
        update(volumes)
        .where(volumes.c.volume_id == int(volume_id))
        .values(epoch=volumes.c.epoch + 1, changed=version)
    )
    connection.execute(
        update(slot_moves)
        .where(slot_moves.c.volume_id == int(volume_id))
        .values(epoch=slot_moves.c.epoch + 1)
    )


def _incarnations(connection: Connection, node_ids: Collection[NodeId]) -> dict[NodeId, int]:
    query = select(nodes.c.node_id, nodes.c.incarnation).where(
        nodes.c.node_id.in_([str(node_id) for node_id in node_ids])
    )
    return {NodeId(name): number for name, number in connection.execute(query)}


def _move(row: Any) -> MoveRow:
    return MoveRow(
        VolumeId(row.volume_id),
        row.slot,
        NodeId(row.target),
        row.epoch,
        row.reason,
        row.job_id,
        row.begun,
    )
