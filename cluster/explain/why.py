"""`haversack why BLOCK|VOLUME|NODE`: what is known of it, how close to loss it is, what comes next.

Called by `api.explain_routes`.  Reads `cell.db` in one transaction, asks the nodes that hold a
block's slots to verify them, and puts both together.  Changes nothing: not even a fragment found
missing becomes a debt here.  The answer is bounded: first N of each list, and how many there are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection

from cluster import map_rows
from cluster.change.jobs import job_json
from cluster.events import Event, read_events
from cluster.explain.facts import (
    LISTED_MAX,
    BlockFacts,
    Move,
    NodeFacts,
    Unrepairable,
    VolumeFacts,
    read_block,
    read_node,
    read_volume,
)
from cluster.explain.next_action import (
    Times,
    headline,
    next_of_block,
    next_of_node,
    next_of_volume,
)
from cluster.explain.risk import assess
from cluster.repair.plan import NodeWord, volumes_before, word_of
from cluster.repair.repair_rows import read_view
from cluster.repair.settings import RepairSettings
from cluster.sightings import Sighting
from cluster.status import node_json
from cluster.topology import SERVES_READS, NodeView
from protocol.clock import Clock
from protocol.errors import EntryNotFound, HaversackError, NodeNotFound
from protocol.ids import BlockHash, NodeId, VolumeId
from protocol.messages import ItemStatus
from sql.database import Database
from storage_node.interface import FragmentKey, NodePort, VerifiedRecord

VERIFY_DEADLINE_S: Final = 2.0
"""A disk that does not read one fragment within this is shown as not answering."""

_CHECKS: Final[Mapping[ItemStatus, str]] = {
    ItemStatus.OK: "intact",
    ItemStatus.NOT_FOUND: "missing",
    ItemStatus.CORRUPT: "corrupt",
    ItemStatus.IO_ERROR: "unreadable",
}


@dataclass(frozen=True, slots=True)
class Check:
    """What a slot's node said of the fragment just now: a record, or why there is none."""

    record: VerifiedRecord | None
    error: str = ""

    @property
    def intact(self) -> bool:
        """Whether the fragment was read and is whole."""
        return self.record is not None and self.record.status is ItemStatus.OK

    @property
    def shown(self) -> str:
        """One word, or the error."""
        if self.record is None:
            return self.error
        return _CHECKS.get(self.record.status, self.record.status.name.lower())


class Explainer:
    """One per gateway.  All methods may raise `DatabaseBusy`, and `EntryNotFound` or `NodeNotFound`
    for a subject that the cell does not have."""

    def __init__(
        self,
        db: Database,
        port: Callable[[NodeId], NodePort],
        clock: Clock,
        settings: RepairSettings,
        sightings: Callable[[], Mapping[NodeId, Sequence[Sighting]]],
    ) -> None:
        """`port` may raise `NodeUnavailable`; `settings` are repair's; `sightings`: what gateways
        say now of nodes in trouble."""
        self._db = db
        self._port = port
        self._clock = clock
        self._settings = settings
        self._sightings = sightings

    async def block(self, block: BlockHash, owners: Sequence[int]) -> dict[str, Any]:
        """A block, with a live check of each slot.  `owners`: accounts whose claims to look for."""
        now = self._clock.wall()

        facts = await self._db.read(lambda connection: read_block(connection, block, owners, now))
        if facts is None:
            raise EntryNotFound(
                f"block {block} is not in the index: it was never stored here, or nothing "
                "referenced it and it was collected",
                {"hash": str(block)},
            )
        volume = facts.volume
        answer: dict[str, Any] = {
            "kind": "block",
            "subject": str(block),
            "stored_bytes": facts.stored_bytes,
            "plain_bytes": facts.plain_bytes,
            "created": facts.created,
            "owner": facts.owner,
            "claims": [{"owner": claim.owner, "expires": claim.expires} for claim in facts.claims],
            "unrepairable": facts.unrepairable and _unrepairable_json(facts.unrepairable),
            "strays": [
                {
                    "node": str(found.node_id),
                    "slot": found.slot,
                    "kind": found.kind,
                    "first_seen": found.first_seen,
                }
                for found in facts.strays
            ],
        }
        if volume is None:
            return {
                **answer,
                "summary": "UNREADABLE NOW: the volume table does not have its volume",
                "next": ["rebuild the table from the nodes: haversack fsck"],
                "events": [_event_json(event) for event in facts.events],
            }
        return {**answer, **await self._block_in_volume(facts, volume)}

    async def volume(self, volume_id: VolumeId) -> dict[str, Any]:
        """A volume, as the tables say."""
        facts = await self._db.read(lambda connection: read_volume(connection, volume_id))
        if facts is None:
            raise EntryNotFound(
                f"there is no volume {volume_id}: it never was, or was removed while it was empty",
                {"volume": str(volume_id)},
            )
        slots = facts.view.slots
        there = [
            slot
            for slot, node_id in enumerate(slots)
            if slot not in facts.owed and _serves(node_id, facts.nodes)
        ]
        risk = assess(facts.view.scheme, slots, there, facts.nodes)
        return {
            "kind": "volume",
            "subject": str(volume_id),
            "summary": headline(risk),
            "next": next_of_volume(facts, self._times()),
            "volume": _volume_json(facts),
            "slots": [_slot_json(facts, slot, None) for slot in range(len(slots))],
            "risk": risk.to_json(),
            "owing_blocks": [str(block) for block in facts.owing],
            "unrepairable": [_unrepairable_json(found) for found in facts.unrepairable],
            "events": [_event_json(event) for event in facts.events],
        }

    async def node(self, node_id: NodeId) -> dict[str, Any]:
        """A node, what it says itself, and what stands or falls with it."""

        def work(connection: Connection) -> NodeFacts | None:
            views = map_rows.read_nodes(connection)
            away = [view.node_id for view in views if view.state not in SERVES_READS]
            return read_node(connection, node_id, away)

        facts = await self._db.read(work)
        if facts is None:
            raise NodeNotFound(f"{node_id} is not a node of this cell", {"node": str(node_id)})
        live, word = await self._summary(node_id)
        view, times = facts.view, self._times({node_id: word})
        worst = min((risk.scheme.m - risk.lost for risk in facts.at_risk), default=None)
        summary = f"{view.state} since {times.since(view.state_since)}, {facts.slots} slots"
        if worst is not None:
            summary += f"; its worst volumes have {worst} fragments to spare"
        return {
            "kind": "node",
            "subject": str(node_id),
            "summary": summary,
            "next": next_of_node(facts, times),
            "node": node_json(view),
            "live": live,
            "sightings": [
                {
                    "gateway": row.gateway,
                    "reachable": row.reachable,
                    "reason": row.reason,
                    "since": row.since,
                }
                for row in self._sightings().get(node_id, ())
            ],
            "slots": {"all": facts.slots, "sealed": facts.sealed_slots},
            "at_risk": [
                {
                    "scheme": risk.scheme.name,
                    "spare": risk.scheme.m - risk.lost,
                    "volumes": risk.volumes,
                    "blocks": risk.blocks,
                    "examples": [str(volume_id) for volume_id in risk.examples],
                }
                for risk in facts.at_risk
            ],
            "moves": {
                "leaving": [_move_json(move) for move in facts.leaving],
                "leaving_total": facts.leaving_total,
                "arriving": [_move_json(move) for move in facts.arriving],
                "arriving_total": facts.arriving_total,
            },
            "owed": facts.owed,
            "strays": facts.strays,
            "volumes": [str(volume_id) for volume_id in facts.holding],
            "jobs": [job_json(job) for job in facts.jobs],
            "events": [_event_json(event) for event in facts.events],
        }

    async def is_node(self, name: str) -> bool:
        """Whether the cell has a node of this name."""
        found = await self._db.read(lambda connection: map_rows.read_node(connection, NodeId(name)))
        return found is not None

    async def events(self, subject: str | None, limit: int) -> list[dict[str, Any]]:
        """What happened, newest first; to one subject, or in the whole cell."""
        found = await self._db.read(lambda connection: read_events(connection, subject, limit))
        return [_event_json(event) for event in found]

    # -- parts ---------------------------------------------------------------------------------

    async def _block_in_volume(self, facts: BlockFacts, volume: VolumeFacts) -> dict[str, Any]:
        checks = await self._verify(volume, facts.block)
        there = [slot for slot, check in checks.items() if check.intact]
        risk = assess(volume.view.scheme, volume.view.slots, there, volume.nodes)
        said = {
            slot: check.record.status for slot, check in checks.items() if check.record is not None
        }
        slots = []
        for slot in range(len(volume.view.slots)):
            shown = _slot_json(volume, slot, checks.get(slot))
            owed = facts.owed.get(slot)
            shown["debt"] = owed and {"since": owed.since, "reason": owed.reason}
            slots.append(shown)
        times, around = self._times(), _around(facts, volume)
        is_whole = risk.spare == volume.view.scheme.m
        before = None if is_whole else await self._volumes_before(volume.view.volume_id, times)
        return {
            "summary": headline(risk, before),
            "repaired_after_volumes": before,
            "next": next_of_block(volume, facts.owed, said, times),
            "volume": _volume_json(volume),
            "slots": slots,
            "risk": risk.to_json(),
            "events": [_event_json(event) for event in around],
        }

    async def _volumes_before(self, volume_id: VolumeId, times: Times) -> int | None:
        """The volume's place in the order of repair, as its planner orders; None if repair has
        nothing to do for it now, or so much that it is not among the worst."""

        def work(connection: Connection) -> int | None:
            out = {view.node_id for view in map_rows.read_nodes(connection) if times.is_out(view)}
            view = read_view(connection, out, self._settings.volumes_seen_max)
            return volumes_before(view, volume_id)

        return await self._db.read(work)

    async def _verify(self, volume: VolumeFacts, block: BlockHash) -> dict[int, Check]:
        """Ask every slot's node at once; a node that is down is asked too, for it may be back."""

        async def ask(slot: int, node_id: NodeId) -> Check:
            key = FragmentKey(volume.view.volume_id, block, slot)
            try:
                (record,) = await self._port(node_id).verify([key], VERIFY_DEADLINE_S)
            except HaversackError as error:
                return Check(None, f"no answer: {error.message}")
            return Check(record)

        held = {
            slot: node_id for slot, node_id in enumerate(volume.view.slots) if node_id is not None
        }
        answers = await asyncio.gather(*(ask(slot, node_id) for slot, node_id in held.items()))
        return dict(zip(held, answers, strict=True))

    async def _summary(self, node_id: NodeId) -> tuple[dict[str, Any], NodeWord]:
        try:
            summary = await self._port(node_id).summary(VERIFY_DEADLINE_S)
        except HaversackError as error:
            return {"answers": False, "error": error.message}, NodeWord.SILENT
        said = {
            "answers": True,
            "state": summary.state,
            "detail": summary.detail,
            "incarnation": summary.incarnation,
            "fragments": summary.fragments,
            "fragment_bytes": summary.fragment_bytes,
            "disk_used_bytes": summary.disk_used_bytes,
            "disk_free_bytes": summary.disk_free_bytes,
            "pid": summary.pid,
            "counters": summary.counters,
            "fault": summary.fault,
        }
        return said, word_of(summary.state, summary.fault)

    def _times(self, words: Mapping[NodeId, NodeWord] | None = None) -> Times:
        reached = {
            node for node, rows in self._sightings().items() if any(row.reachable for row in rows)
        }
        return Times(self._clock.wall(), self._settings, frozenset(reached), words or {})


def _around(facts: BlockFacts, volume: VolumeFacts) -> list[Event]:
    """What happened to the block and to its volume, newest first."""
    events = sorted({*facts.events, *volume.events}, key=lambda event: -event.event_id)
    return events[:LISTED_MAX]


def _serves(node_id: NodeId | None, nodes: Mapping[NodeId, NodeView]) -> bool:
    return node_id is not None and nodes[node_id].state in SERVES_READS


def _volume_json(facts: VolumeFacts) -> dict[str, Any]:
    view = facts.view
    return {
        "id": str(view.volume_id),
        "scheme": view.scheme.name,
        "state": str(view.state),
        "epoch": view.epoch,
        "blocks": view.blocks,
        "stored_bytes": view.stored_bytes,
        "created": facts.created,
    }


def _slot_json(facts: VolumeFacts, slot: int, check: Check | None) -> dict[str, Any]:
    node_id = facts.view.slots[slot]
    view = None if node_id is None else facts.nodes[node_id]
    move, owed = facts.moves.get(slot), facts.owed.get(slot)
    record = check.record if check else None
    return {
        "slot": slot,
        "node": node_id and str(node_id),
        "node_state": view and str(view.state),
        "node_since": view and view.state_since,
        "rack": view and view.rack,
        "host": view and view.host,
        "check": check and check.shown,
        "epoch": record.epoch if record and check and check.intact else None,
        "owed_blocks": owed.blocks if owed else 0,
        "move": move and _move_json(move),
    }


def _move_json(move: Move) -> dict[str, Any]:
    return {
        "volume": str(move.volume),
        "slot": move.slot,
        "target": str(move.target),
        "reason": move.reason,
        "begun": move.begun,
    }


def _unrepairable_json(found: Unrepairable) -> dict[str, Any]:
    return {
        "hash": str(found.block),
        "reason": found.reason,
        "since": found.since,
        "tried": found.tried,
    }


def _event_json(event: Event) -> dict[str, Any]:
    return {
        "at": event.at,
        "kind": str(event.kind),
        "subject": event.subject,
        "detail": event.detail,
    }
