"""What the tables say of one block, volume or node: everything `why` tells comes from here.

One read transaction per question, over keys and indexes only: the cost grows with the answer, with
the number of nodes, and for a node with the slots that it holds; never with the blocks of the cell.
Functions over a connection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, Row, Select, func, or_, select, union

from cluster import map_rows
from cluster.change.jobs import UNFINISHED, Job, read_jobs
from cluster.debts import read_debts
from cluster.events import Event, read_events
from cluster.schema import (
    blocks,
    claims,
    debts,
    nodes,
    slot_moves,
    stray,
    unrepairable,
    volume_slots,
    volumes,
)
from cluster.topology import NodeView, VolumeView
from erasure.scheme import Scheme
from protocol.ids import BlockHash, NodeId, VolumeId

LISTED_MAX: Final = 20
"""Rows of any one kind in an answer; the rest is counted."""

EVENTS_OF_BLOCK: Final = 10
EVENTS_OF_VOLUME: Final = 20
EVENTS_OF_NODE: Final = 10
JOBS_ASKED: Final = 100
"""Unfinished jobs among which those about a node are looked for."""

_NODES_PER_QUERY: Final = 500


class Move(NamedTuple):
    """A slot whose fragments are being made elsewhere."""

    volume: VolumeId
    slot: int
    target: NodeId
    reason: str
    begun: float


class Owed(NamedTuple):
    """Debts of one slot: of the block that was asked about, or of all of a volume's."""

    blocks: int
    since: float
    """Of the oldest."""
    reason: str


class Unrepairable(NamedTuple):
    """A block that repair gave up on until something changes."""

    block: BlockHash
    reason: str
    since: float
    tried: float


class Claim(NamedTuple):
    """An account that may still reference the block; `expires` in wall-clock seconds."""

    owner: int
    expires: float


class Stray(NamedTuple):
    """A fragment in no row's slot."""

    node_id: NodeId
    slot: int
    kind: str
    first_seen: float


@dataclass(frozen=True, slots=True)
class VolumeFacts:
    """A volume, with the nodes that its slots name."""

    view: VolumeView
    created: float
    nodes: dict[NodeId, NodeView]
    """All nodes of the cell."""
    moves: dict[int, Move]
    owed: dict[int, Owed]
    """By slot, over all blocks of the volume."""
    owing: tuple[BlockHash, ...]
    """The first blocks that owe something."""
    unrepairable: tuple[Unrepairable, ...]
    events: tuple[Event, ...]


@dataclass(frozen=True, slots=True)
class BlockFacts:
    """A block's row and what concerns it."""

    block: BlockHash
    stored_bytes: int
    plain_bytes: int
    created: float
    owner: int
    volume: VolumeFacts | None
    """None if the volume table lost it."""
    owed: dict[int, Owed]
    """By slot, of this block."""
    claims: tuple[Claim, ...]
    unrepairable: Unrepairable | None
    strays: tuple[Stray, ...]
    events: tuple[Event, ...]


class AtRisk(NamedTuple):
    """Volumes of a node by scheme and by how many of their slots are lost."""

    scheme: Scheme
    lost: int
    volumes: int
    blocks: int
    examples: tuple[VolumeId, ...]


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """A node and what it holds."""

    view: NodeView
    slots: int
    sealed_slots: int
    at_risk: tuple[AtRisk, ...]
    """Worst first."""
    leaving: tuple[Move, ...]
    leaving_total: int
    arriving: tuple[Move, ...]
    arriving_total: int
    owed: int
    """Fragments that its slots lack."""
    strays: dict[str, int]
    """By kind."""
    holding: tuple[VolumeId, ...]
    """The first volumes with a slot here: what a drain still has to move."""
    jobs: tuple[Job, ...]
    """About this node, and not ended; newest first."""
    events: tuple[Event, ...]


def read_block(
    connection: Connection, block: BlockHash, owners: Sequence[int], now: float
) -> BlockFacts | None:
    """A block of the index, or None.  `owners`: accounts whose claims to look for."""
    row = connection.execute(select(blocks).where(blocks.c.hash == bytes(block))).one_or_none()
    if row is None:
        return None
    volume_id = VolumeId(row.volume_id)
    query = select(debts).where(
        debts.c.volume_id == int(volume_id),
        debts.c.slot.in_(range(Scheme.parse(_scheme_of(connection, volume_id)).n)),
        debts.c.hash == bytes(block),
    )
    owed = {debt.slot: Owed(1, debt.since, debt.reason) for debt in connection.execute(query)}
    given_up = connection.execute(
        select(unrepairable).where(unrepairable.c.hash == bytes(block))
    ).one_or_none()
    return BlockFacts(
        block=block,
        stored_bytes=row.stored_bytes,
        plain_bytes=row.plain_bytes,
        created=row.created,
        owner=row.owner,
        volume=read_volume(connection, volume_id),
        owed=owed,
        claims=_claims(connection, block, owners, now),
        unrepairable=None if given_up is None else _unrepairable(given_up),
        strays=_strays(connection, volume_id, block),
        events=tuple(read_events(connection, block, EVENTS_OF_BLOCK)),
    )


def read_volume(connection: Connection, volume_id: VolumeId) -> VolumeFacts | None:
    """A volume, or None."""
    found = map_rows.read_volumes(connection, [volume_id])
    if not found:
        return None
    (view,) = found
    created = select(volumes.c.created).where(volumes.c.volume_id == int(volume_id))
    moves = select(slot_moves).where(slot_moves.c.volume_id == int(volume_id))
    owed = (
        select(
            debts.c.slot,
            func.count().label("blocks"),
            func.min(debts.c.since).label("since"),
            func.min(debts.c.reason).label("reason"),
        )
        .where(debts.c.volume_id == int(volume_id))
        .group_by(debts.c.slot)
    )
    given_up = (
        select(unrepairable).where(unrepairable.c.volume_id == int(volume_id)).limit(LISTED_MAX)
    )
    first = read_debts(connection, volume_id, LISTED_MAX)
    return VolumeFacts(
        view=view,
        created=connection.execute(created).scalar_one(),
        nodes={node.node_id: node for node in map_rows.read_nodes(connection)},
        moves={row.slot: _move(row) for row in connection.execute(moves)},
        owed={
            row.slot: Owed(row.blocks, row.since, row.reason) for row in connection.execute(owed)
        },
        owing=tuple(dict.fromkeys(debt.hash for debt in first)),
        unrepairable=tuple(_unrepairable(row) for row in connection.execute(given_up)),
        events=tuple(read_events(connection, volume_id, EVENTS_OF_VOLUME)),
    )


def read_node(connection: Connection, node_id: NodeId, away: Sequence[NodeId]) -> NodeFacts | None:
    """A node, or None.  `away`: nodes that do not serve reads, whose slots count as lost."""
    view = map_rows.read_node(connection, node_id)
    if view is None:
        return None
    mine = volume_slots.c.node_id == str(node_id)
    joined = select(func.count()).select_from(
        volume_slots.join(volumes, volumes.c.volume_id == volume_slots.c.volume_id)
    )
    first = select(volume_slots.c.volume_id).where(mine).order_by(volume_slots.c.volume_id)
    leaving = (
        select(slot_moves)
        .join(
            volume_slots,
            (volume_slots.c.volume_id == slot_moves.c.volume_id)
            & (volume_slots.c.slot == slot_moves.c.slot),
        )
        .where(mine)
    )
    arriving = select(slot_moves).where(slot_moves.c.target == str(node_id))
    owed = (
        select(func.count())
        .select_from(volume_slots)
        .join(
            debts,
            (debts.c.volume_id == volume_slots.c.volume_id) & (debts.c.slot == volume_slots.c.slot),
        )
        .where(mine)
    )
    strays = (
        select(stray.c.kind, func.count())
        .where(stray.c.node_id == str(node_id))
        .group_by(stray.c.kind)
    )
    return NodeFacts(
        view=view,
        slots=_count(connection, select(volume_slots.c.slot).where(mine)),
        sealed_slots=connection.execute(
            joined.where(mine, volumes.c.state == "sealed")
        ).scalar_one(),
        at_risk=_at_risk(connection, node_id, away),
        leaving=tuple(_move(row) for row in connection.execute(leaving.limit(LISTED_MAX))),
        leaving_total=_count(connection, leaving),
        arriving=tuple(_move(row) for row in connection.execute(arriving.limit(LISTED_MAX))),
        arriving_total=_count(connection, arriving),
        owed=connection.execute(owed).scalar_one(),
        strays={row[0]: row[1] for row in connection.execute(strays)},
        holding=tuple(
            VolumeId(number) for number in connection.execute(first.limit(LISTED_MAX)).scalars()
        ),
        jobs=tuple(
            job
            for job in read_jobs(connection, UNFINISHED, JOBS_ASKED)
            if job.subject == str(node_id)
        ),
        events=tuple(read_events(connection, node_id, EVENTS_OF_NODE)),
    )


def _at_risk(connection: Connection, node_id: NodeId, away: Sequence[NodeId]) -> tuple[AtRisk, ...]:
    """Slots that are vacant, whose node is away, or in which any block owes its fragment, per
    volume that has a slot on the node: as status counts volumes."""
    away_or_vacant = [volume_slots.c.node_id.is_(None)]
    for start in range(0, len(away), _NODES_PER_QUERY):
        away_or_vacant.append(volume_slots.c.node_id.in_(away[start : start + _NODES_PER_QUERY]))
    held = select(volume_slots.c.volume_id).where(volume_slots.c.node_id == str(node_id))
    lost = union(
        select(volume_slots.c.volume_id, volume_slots.c.slot).where(
            volume_slots.c.volume_id.in_(held), or_(*away_or_vacant)
        ),
        select(debts.c.volume_id, debts.c.slot).where(debts.c.volume_id.in_(held)),
    ).subquery()
    per_volume = (
        select(lost.c.volume_id, func.count().label("lost")).group_by(lost.c.volume_id).subquery()
    )
    columns = volumes.c.scheme, per_volume.c.lost
    query = (
        select(*columns, func.count().label("volumes"), func.sum(volumes.c.blocks).label("blocks"))
        .join(per_volume, per_volume.c.volume_id == volumes.c.volume_id)
        .group_by(*columns)
    )
    found = []
    for row in connection.execute(query).fetchall():
        examples = (
            select(volumes.c.volume_id)
            .join(per_volume, per_volume.c.volume_id == volumes.c.volume_id)
            .where(volumes.c.scheme == row.scheme, per_volume.c.lost == row.lost)
            .order_by(volumes.c.volume_id)
            .limit(LISTED_MAX)
        )
        names = tuple(VolumeId(number) for number in connection.execute(examples).scalars())
        scheme = Scheme.parse(row.scheme)
        found.append(AtRisk(scheme, row.lost, row.volumes, int(row.blocks), names))
    return tuple(sorted(found, key=lambda risk: risk.scheme.m - risk.lost))


def _claims(
    connection: Connection, block: BlockHash, owners: Sequence[int], now: float
) -> tuple[Claim, ...]:
    """Claims are kept by owner, so each account is looked up; those that ended are left out."""
    found: list[Claim] = []
    for start in range(0, len(owners), _NODES_PER_QUERY):
        query = select(claims.c.owner, claims.c.expires).where(
            claims.c.owner.in_(owners[start : start + _NODES_PER_QUERY]),
            claims.c.hash == bytes(block),
            claims.c.expires > now,
        )
        found.extend(Claim(row.owner, row.expires) for row in connection.execute(query))
    return tuple(found[:LISTED_MAX])


def _strays(connection: Connection, volume_id: VolumeId, block: BlockHash) -> tuple[Stray, ...]:
    """One look-up per node: the table is kept by node."""
    query = (
        select(stray)
        .join(nodes, nodes.c.node_id == stray.c.node_id)
        .where(stray.c.volume_id == int(volume_id), stray.c.hash == bytes(block))
        .limit(LISTED_MAX)
    )
    return tuple(
        Stray(NodeId(row.node_id), row.slot, row.kind, row.first_seen)
        for row in connection.execute(query)
    )


def _scheme_of(connection: Connection, volume_id: VolumeId) -> str:
    query = select(volumes.c.scheme).where(volumes.c.volume_id == int(volume_id))
    name: str | None = connection.execute(query).scalar_one_or_none()
    return name or "replica-1"


def _count(connection: Connection, query: Select[Any]) -> int:
    count: int = connection.execute(select(func.count()).select_from(query.subquery())).scalar_one()
    return count


def _move(row: Row[Any]) -> Move:
    return Move(VolumeId(row.volume_id), row.slot, NodeId(row.target), row.reason, row.begun)


def _unrepairable(row: Row[Any]) -> Unrepairable:
    return Unrepairable(BlockHash(row.hash), row.reason, row.since, row.tried)
