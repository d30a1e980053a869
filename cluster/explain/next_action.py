"""What happens next, in sentences for people.  Pure.

Says only what the tables say will happen: a move that is under way, a debt that will be repaid, a
node that will be out at a certain time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from cluster.change.jobs import Job, JobState
from cluster.explain.facts import Move, NodeFacts, Owed, VolumeFacts
from cluster.explain.risk import Risk
from cluster.repair.plan import NodeWord, is_out, patience_s
from cluster.repair.settings import RepairSettings
from cluster.topology import SERVES_READS, NodeState, NodeView
from protocol.ids import NodeId
from protocol.messages import ItemStatus

BLOCKERS_NAMED: Final = 3
"""Of each job; `haversack jobs show` has them all."""

NOTHING: Final = "nothing to do"

_SAID: Final[Mapping[ItemStatus, str]] = {
    ItemStatus.NOT_FOUND: "does not hold it",
    ItemStatus.CORRUPT: "holds bytes that fail their checks",
    ItemStatus.IO_ERROR: "cannot read it from its disk",
}


@dataclass(frozen=True, slots=True)
class Times:
    """Wall-clock `now`, and what decides when a node's slots are placed anew."""

    now: float
    settings: RepairSettings
    reached: frozenset[NodeId] = frozenset()
    """Nodes that some gateway reaches."""
    words: Mapping[NodeId, NodeWord] = field(default_factory=dict)
    """Of nodes that were asked just now."""

    def is_out(self, view: NodeView) -> bool:
        """Whether repair places the node's slots anew, as far as is known here."""
        word = self.words.get(view.node_id, NodeWord.SILENT)
        is_read = view.node_id in self.reached
        return is_out(view, self.now, self.settings, word, is_read=is_read)

    def since(self, at: float) -> str:
        """`3 min`: how long ago."""
        return duration(self.now - at)


def duration(seconds: float) -> str:
    """`45 s`, `3 min`, `5 h`, `12 d`: one unit, rounded down."""
    whole = max(0, int(seconds))
    for limit, unit, name in ((120, 1, "s"), (7_200, 60, "min"), (172_800, 3_600, "h")):
        if whole < limit:
            return f"{whole // unit} {name}"
    return f"{whole // 86_400} d"


def next_of_volume(facts: VolumeFacts, times: Times) -> list[str]:
    """For each slot that is not as it should be."""
    found = _moves_and_losses(facts, times)
    found += [_of_debt(slot, facts.owed[slot], times) for slot in sorted(facts.owed)]
    for given_up in facts.unrepairable[:3]:
        found.append(f"block {given_up.block} cannot be repaired: {given_up.reason}")
    return found or [NOTHING]


def next_of_block(
    facts: VolumeFacts,
    owed: Mapping[int, Owed],
    checks: Mapping[int, ItemStatus],
    times: Times,
) -> list[str]:
    """As of a volume, with the block's own debts and what its nodes found just now."""
    found = _moves_and_losses(facts, times)
    found += [_of_debt(slot, owed[slot], times) for slot in sorted(owed)]
    for slot, status in sorted(checks.items()):
        if status in _SAID and slot not in owed and slot not in facts.moves:
            found.append(
                f"slot {slot}: {facts.view.slots[slot]} {_SAID[status]}, and no debt says so yet: "
                "the next read, scrub or verifier pass that sees it writes one"
            )
    return found or [NOTHING]


def next_of_node(facts: NodeFacts, times: Times) -> list[str]:
    """Of its state, what moves, and what it owes."""
    view = facts.view
    found = []
    if view.state is NodeState.DRAINING:
        left = facts.slots
        found.append(
            f"it is draining: {left} slots are still here, {facts.leaving_total} of them moving"
            if left
            else "it is draining and holds no slot any more: it will be drained"
        )
        found += [said for job in facts.jobs for said in _blockers_of(job)]
    elif view.state is NodeState.DRAINED:
        found.append("it is drained: it may be removed, or taken back")
    elif view.state not in SERVES_READS and view.state is not NodeState.GONE:
        if facts.slots or view.state is NodeState.DOWN:
            found.append(_of_node(view, times))
    elif view.state is NodeState.SUSPECT:
        found.append("it was not heard of lately: it is down if that lasts")
    if facts.leaving_total and view.state is not NodeState.DRAINING:
        found.append(f"{facts.leaving_total} of its slots are being made on other nodes")
    if facts.arriving_total:
        found.append(f"{facts.arriving_total} slots are being made on it")
    if facts.owed and view.state in SERVES_READS:
        found.append(f"{facts.owed} fragments that its slots owe are made again in place")
    return found or [NOTHING]


def _blockers_of(job: Job) -> list[str]:
    """What keeps a job from getting on, and whether anybody is at work on it at all."""
    blockers = job.progress.blockers
    found = [
        f"{job.name} ({job.kind}) gets no further with {blocker.volume}: {blocker.reason}"
        for blocker in blockers[:BLOCKERS_NAMED]
    ]
    rest = len(blockers) - BLOCKERS_NAMED
    if rest > 0:
        volumes = "1 more volume" if rest == 1 else f"{rest} more volumes"
        found.append(f"{job.name} waits for {volumes}: haversack jobs show {job.job_id}")
    if job.state is JobState.PAUSED:
        found.append(f"{job.name} ({job.kind}) is paused: haversack jobs resume {job.job_id}")
    return found


def headline(risk: Risk, before: int | None = None) -> str:
    """One line about redundancy.  `before`: volumes that repair takes on first."""
    if risk.spare < 0:
        return f"UNREADABLE NOW: {risk.present} of {risk.needed} fragments that a read needs"
    full = risk.slots - risk.needed
    said = f"readable, {risk.spare} of {full} spare fragments"
    if risk.spare < full and before is not None:
        volumes = "1 volume is" if before == 1 else f"{before} volumes are"
        said += f"; {volumes} repaired before it" if before else "; repair takes it next"
    return said


def _moves_and_losses(facts: VolumeFacts, times: Times) -> list[str]:
    found = []
    for slot, node_id in enumerate(facts.view.slots):
        move = facts.moves.get(slot)
        if move is not None:
            found.append(_of_move(move, times))
        elif node_id is None:
            found.append(f"slot {slot} has no node: it is placed as soon as one can take it")
        else:
            view = facts.nodes[node_id]
            if view.state not in SERVES_READS:
                found.append(f"slot {slot}: {_of_node(view, times)}")
    return found


def _of_move(move: Move, times: Times) -> str:
    since = times.since(move.begun)
    return f"slot {move.slot} is being made on {move.target} ({move.reason}), since {since}"


def _of_debt(slot: int, owed: Owed, times: Times) -> str:
    what = "its fragment" if owed.blocks == 1 else f"fragments of {owed.blocks} blocks"
    return (
        f"slot {slot} owes {what} ({owed.reason}), since {times.since(owed.since)}: "
        "made again in place"
    )


def _of_node(view: NodeView, times: Times) -> str:
    since = times.since(view.state_since)
    said = f"{view.node_id} is {view.state} since {since}"
    if view.detail:
        said += f" ({view.detail})"
    if view.state is not NodeState.DOWN:
        return f"{said}: it has to start"
    if view.disk_failed:
        return f"{said}: its disk failed, its slots are placed anew"
    word = times.words.get(view.node_id, NodeWord.SILENT)
    is_read = view.node_id in times.reached
    if times.is_out(view):
        return f"{said}: it is out, its slots are placed anew as nodes can take them"
    if is_read:
        return f"{said}: a gateway reaches it, so its slots stay where they are"
    if word is NodeWord.SERVES:
        return f"{said}: it answers and serves, so its slots stay where they are"
    if word is NodeWord.REFUSES:
        said += ": put its directory right"
    left_s = patience_s(times.settings, word) - (times.now - view.state_since)
    return f"{said}: its slots are placed anew in {duration(left_s)} unless it comes back"
