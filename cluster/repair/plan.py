"""Decides what repair does next: pure planner, frozen plan (`docs/design/015-repair.md`).

Called by `service` with a view read from SQL; printed by dry runs.  May not import SQL, asyncio or
Ray; randomness is a parameter.

What is lost: slots whose node is *out*, vacant slots of sealed volumes, debts.  Everything a volume
lost is one unit of work, because the k fragments that are read make all of its lost slots.

What comes first: fewest spare fragments; then volumes that have most of their remaining slots on
one host, which one more failure would take together; then the oldest loss.

Targets are drawn by weight times free space, among nodes that are up, hold no slot of the volume,
keep it within the spread cap of host and rack that placement keeps, and have room above the repair
headroom.  A draw costs a binary search, so planning grows with what is lost, not with the cell.
"""

from __future__ import annotations

import enum
import heapq
import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final, NamedTuple

from cluster.debts import VolumeDebts
from cluster.move_rows import MoveRow
from cluster.placement import spread_cap
from cluster.repair.settings import RepairSettings
from cluster.topology import NodeState, NodeView, VolumeState, VolumeView
from erasure.scheme import Scheme
from protocol.ids import NodeId, VolumeId
from storage_node.service_state import Fault, ServiceState

_NEVER: Final = float("inf")

_DRAWS_MAX: Final = 24
"""Random draws for one target before all nodes are looked at in turn."""


class NodeWord(enum.Enum):
    """What a node that is down says of itself when repair asks it."""

    SILENT = "silent"
    REFUSES = "refuses"
    """It answers and does not serve: its directory is empty, missing or another's."""
    SERVES = "serves"
    """It answers and serves: placement will bring it up, or its link to placement is cut."""


def word_of(state: str, fault: str) -> NodeWord:
    """What a node's answer means.  A bad disk does not come back; a directory may."""
    if fault == Fault.DISK:
        return NodeWord.SILENT
    return NodeWord.SERVES if state == ServiceState.SERVING else NodeWord.REFUSES


def patience_s(settings: RepairSettings, word: NodeWord) -> float:
    """How long a node may be down before its slots are placed anew."""
    return settings.refusing_out_after_s if word is NodeWord.REFUSES else settings.out_after_s


def is_out(
    node: NodeView,
    now: float,
    settings: RepairSettings,
    word: NodeWord = NodeWord.SILENT,
    *,
    is_read: bool = False,
) -> bool:
    """Whether a node's slots are to be placed anew.  `is_read`: somebody still reads from it."""
    if node.state is NodeState.GONE:
        return True
    if node.state is not NodeState.DOWN:
        return False
    if node.disk_failed:
        return True
    if is_read or word is NodeWord.SERVES:
        return False
    return now - node.state_since >= patience_s(settings, word)


@dataclass(frozen=True, slots=True)
class RepairView:
    """What the planner sees: all nodes, and the volumes that lost something or are being moved."""

    nodes: tuple[NodeView, ...]
    out: frozenset[NodeId]
    volumes: tuple[VolumeView, ...]
    debts: tuple[VolumeDebts, ...] = ()
    moves: tuple[MoveRow, ...] = ()
    avoid: frozenset[NodeId] = frozenset()
    """Nodes that took no fragments lately: no targets for now."""


@dataclass(frozen=True, slots=True)
class RepairBudget:
    """How much one plan may take on."""

    volumes_max: int
    headroom_share: float


@dataclass(frozen=True, slots=True)
class SlotMove:
    """One slot of one volume, to be made on another node."""

    volume: VolumeId
    slot: int
    source: NodeId | None
    """A living node to copy from; None: the slot's fragments are lost."""
    target: NodeId
    reason: str
    job_id: int | None = None


@dataclass(frozen=True, slots=True)
class VolumeRepair:
    """All that is done to one volume."""

    volume: VolumeId
    spare: int
    """Fragments its worst block can still lose; negative: it is unreadable now."""
    since: float
    """When the oldest of its losses was first known, wall-clock seconds; infinite if it only has
    vacant slots."""
    moves: tuple[SlotMove, ...]
    debts: tuple[int, ...]
    """Slots whose debts are repaid in place."""


@dataclass(frozen=True, slots=True)
class Blocked:
    """A slot that cannot be made now, and why."""

    volume: VolumeId
    slot: int
    reason: str


@dataclass(frozen=True, slots=True)
class RepairPlan:
    """What to do, in order of need."""

    repairs: tuple[VolumeRepair, ...]
    blocked: tuple[Blocked, ...]
    abandon: tuple[tuple[VolumeId, int], ...]
    """Moves that nobody needs any more: their slot's node is back."""
    left: int
    """Volumes that lost something and are not in this plan."""

    @property
    def is_idle(self) -> bool:
        """Nothing to do."""
        return not self.repairs and not self.abandon


REASON_LOST: Final = "node lost"
REASON_VACANT: Final = "vacant"
REPAIR_REASONS: Final = frozenset({REASON_LOST, REASON_VACANT})
"""Moves of repair's own; those of a job carry its number."""


class _Loss(NamedTuple):
    """What one volume lost.  A tuple, because a large disaster makes a million of them."""

    spare: int
    apart: int
    """Minus the most of its remaining slots on one host."""
    since: float
    volume_id: int
    volume: VolumeView
    slots: tuple[int, ...]
    debts: Mapping[int, VolumeDebts]


def plan_repair(view: RepairView, budget: RepairBudget, rng: random.Random) -> RepairPlan:
    """What to do next.  The same view and seed give the same plan."""
    nodes = {node.node_id: node for node in view.nodes}
    moves = _moves_by_volume(view.moves)
    losses = 0

    def counted() -> Iterator[_Loss]:
        nonlocal losses
        for loss in _losses(view, nodes):
            losses += 1
            yield loss

    chosen = heapq.nsmallest(budget.volumes_max, counted())  # by the first fields of `_Loss`
    targets = _Targets(view.nodes, view.avoid, budget.headroom_share, rng)
    for move in view.moves:
        targets.expect(move.target, 0)
    repairs: list[VolumeRepair] = []
    blocked: list[Blocked] = []
    for loss in chosen:
        repair, stuck = _plan_volume(loss, nodes, moves.get(loss.volume.volume_id, {}), targets)
        blocked += stuck
        if repair.moves or repair.debts:
            repairs.append(repair)
    return RepairPlan(tuple(repairs), tuple(blocked), _needless(view), left=losses - len(chosen))


def volumes_before(view: RepairView, volume_id: VolumeId) -> int | None:
    """How many volumes `plan_repair` takes on before this one; None if it lost nothing."""
    nodes = {node.node_id: node for node in view.nodes}
    losses = list(_losses(view, nodes))
    own = next((loss for loss in losses if loss.volume_id == volume_id), None)
    return None if own is None else sum(loss < own for loss in losses)


def _moves_by_volume(moves: Iterable[MoveRow]) -> dict[VolumeId, dict[int, MoveRow]]:
    grouped: dict[VolumeId, dict[int, MoveRow]] = {}
    for move in moves:
        grouped.setdefault(move.volume, {})[move.slot] = move
    return grouped


def _losses(view: RepairView, nodes: Mapping[NodeId, NodeView]) -> Iterator[_Loss]:
    debts: dict[VolumeId, dict[int, VolumeDebts]] = {}
    for owed in view.debts:
        debts.setdefault(owed.volume, {})[owed.slot] = owed
    hosts = {node_id: node.host for node_id, node in nodes.items() if node_id not in view.out}
    since: dict[NodeId | None, float] = {
        node_id: nodes[node_id].state_since for node_id in view.out if node_id in nodes
    }
    nothing: Mapping[int, VolumeDebts] = {}
    out = view.out
    for volume in view.volumes:
        slots = volume.slots
        owed_here = debts.get(volume.volume_id, nothing) if debts else nothing
        lost = _lost_slots(volume, out)
        if not lost and not owed_here:
            continue
        oldest = _NEVER
        for slot in lost:
            oldest = min(oldest, since.get(slots[slot], _NEVER))
        also_owed = 0
        for slot, owed in owed_here.items():
            oldest = min(oldest, owed.since)
            also_owed += slot not in lost
        kept = [hosts[name] for name in slots if name in hosts]
        together = 1 if len(set(kept)) == len(kept) else max(Counter(kept).values())
        spare = volume.scheme.m - len(lost) - also_owed
        yield _Loss(spare, -together, oldest, volume.volume_id, volume, lost, owed_here)


def _lost_slots(volume: VolumeView, out: frozenset[NodeId]) -> tuple[int, ...]:
    """Slots to be placed anew.  A vacant slot of an open volume is placement's: it opens a wider
    volume as soon as there is a node for it."""
    slots = volume.slots
    if None in slots and volume.state is VolumeState.SEALED:
        return tuple([slot for slot, name in enumerate(slots) if name is None or name in out])
    return tuple([slot for slot, name in enumerate(slots) if name in out])


def _needless(view: RepairView) -> tuple[tuple[VolumeId, int], ...]:
    """Moves of repair's own whose slot is not lost any more."""
    slots = {volume.volume_id: volume.slots for volume in view.volumes}
    return tuple(
        (move.volume, move.slot)
        for move in view.moves
        if move.reason == REASON_LOST
        and move.job_id is None
        and move.volume in slots
        and slots[move.volume][move.slot] not in view.out
    )


def _plan_volume(
    loss: _Loss,
    nodes: Mapping[NodeId, NodeView],
    under_way: Mapping[int, MoveRow],
    targets: _Targets,
) -> tuple[VolumeRepair, list[Blocked]]:
    volume = loss.volume
    moves: list[SlotMove] = []
    blocked: list[Blocked] = []
    slot_bytes = volume.scheme.chunk_bytes(volume.stored_bytes)
    taken = [node_id for node_id in volume.slots if node_id is not None]
    taken += [move.target for slot, move in under_way.items() if slot not in loss.slots]
    kept = [volume.slots[slot] for slot in range(volume.scheme.n) if slot not in loss.slots]
    spread = targets.spread(
        volume.scheme, [*filter(None, kept), *(m.target for m in under_way.values())]
    )
    for slot in loss.slots:
        begun = under_way.get(slot)
        if begun is not None and targets.fits(begun.target, slot_bytes, resumed=True):
            target: NodeId | None = begun.target
        else:
            target = targets.draw(volume.scheme, slot_bytes, taken, spread)
            if target is not None:
                spread.add(targets.view(target))
        if target is None:
            blocked.append(Blocked(volume.volume_id, slot, targets.why_none(taken)))
            continue
        taken.append(target)
        targets.expect(target, slot_bytes)
        reason = REASON_VACANT if volume.slots[slot] is None else REASON_LOST
        job_id = None if begun is None else begun.job_id
        moves.append(SlotMove(volume.volume_id, slot, None, target, reason, job_id))
    owed = []
    for slot in sorted(loss.debts):
        holder = volume.slots[slot]
        if slot in loss.slots or holder is None:
            continue
        if nodes[holder].takes_writes or nodes[holder].serves_reads:
            owed.append(slot)
        else:
            reason = f"{holder} is {nodes[holder].state} and not yet out"
            blocked.append(Blocked(volume.volume_id, slot, reason))
    repair = VolumeRepair(volume.volume_id, loss.spare, loss.since, tuple(moves), tuple(owed))
    return repair, blocked


class _Spread:
    """How many slots of one volume each host and rack holds."""

    __slots__ = ("cap", "hosts", "racks")

    def __init__(self, cap: int) -> None:
        self.cap = cap
        self.hosts: Counter[tuple[str, str]] = Counter()
        self.racks: Counter[str] = Counter()

    def add(self, node: NodeView) -> None:
        self.hosts[node.rack, node.host] += 1
        self.racks[node.rack] += 1

    def excess(self, node: NodeView) -> int:
        """By how much the volume would exceed the cap with one more slot here."""
        most = max(self.hosts[node.rack, node.host], self.racks[node.rack]) + 1
        return max(0, most - self.cap)


class _Targets:
    """Nodes that can take fragments, drawn by weight times free space."""

    def __init__(
        self,
        nodes: Sequence[NodeView],
        avoid: frozenset[NodeId],
        headroom_share: float,
        rng: random.Random,
    ) -> None:
        self._all = {node.node_id: node for node in nodes}
        self._avoid = avoid
        self._rng = rng
        self._room = {
            node.node_id: node.free_bytes - int(node.capacity_bytes * headroom_share)
            for node in nodes
        }
        self._takers = [
            node
            for node in nodes
            if node.takes_new_volumes and self._room[node.node_id] > 0 and node.node_id not in avoid
        ]
        self._ends = list(accumulate(node.placement_weight for node in self._takers))
        self._caps: dict[Scheme, int] = {}

    def view(self, node_id: NodeId) -> NodeView:
        return self._all[node_id]

    def expect(self, node_id: NodeId, fragment_bytes: int) -> None:
        """So much will be written there."""
        if node_id in self._room:
            self._room[node_id] -= fragment_bytes

    def fits(self, node_id: NodeId, fragment_bytes: int, *, resumed: bool = False) -> bool:
        """Whether a node can take a slot; one that was begun there has part of it already."""
        node = self._all.get(node_id)
        if node is None or not node.takes_new_volumes or node_id in self._avoid:
            return False
        return resumed or self._room[node_id] >= fragment_bytes

    def spread(self, scheme: Scheme, held: Iterable[NodeId]) -> _Spread:
        """Of a volume with slots on these nodes."""
        cap = self._caps.get(scheme)
        if cap is None:
            cap = spread_cap(self._takers, scheme) if self._takers else scheme.n
            self._caps[scheme] = cap
        spread = _Spread(cap)
        for node_id in held:
            if node_id in self._all:
                spread.add(self._all[node_id])
        return spread

    def draw(
        self, scheme: Scheme, fragment_bytes: int, taken: Sequence[NodeId], spread: _Spread
    ) -> NodeId | None:
        """A node for one more slot, or None.  The spread cap gives way before a slot stays lost."""
        if not self._takers:
            return None
        total = self._ends[-1]
        for _ in range(_DRAWS_MAX):
            place = bisect_right(self._ends, self._rng.random() * total)
            node = self._takers[min(place, len(self._takers) - 1)]
            if (
                node.node_id not in taken
                and self._room[node.node_id] >= fragment_bytes
                and spread.excess(node) == 0
            ):
                return node.node_id
        fitting = [
            node
            for node in self._takers
            if node.node_id not in taken and self._room[node.node_id] >= fragment_bytes
        ]
        if not fitting:
            return None
        least = min(spread.excess(node) for node in fitting)
        best = [node for node in fitting if spread.excess(node) == least]
        weights = [node.placement_weight for node in best]
        return self._rng.choices(best, weights)[0].node_id

    def why_none(self, taken: Sequence[NodeId]) -> str:
        """For people: why no node could be found."""
        free = sum(node.node_id not in taken for node in self._takers)
        if free:
            return f"none of {free} other nodes has room above the repair headroom"
        return "every node that is up and has room holds a slot of the volume already: add a node"
