"""Planners of changes: from a view of the cell to a frozen plan.

Called by `runner` before it acts, by the gateway for `--dry-run` and by what-if questions.  Pure
functions: the same view gives the same plan; no SQL, no clock, no randomness, no Ray.  `layout`
says which node may take a slot.

A plan holds what can be done now.  What cannot is listed with its reason, and tried again when the
caller plans anew: nodes come, disks are emptied, open volumes are sealed.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from cluster.change.layout import Layout, slot_bytes
from cluster.topology import CellView, NodeView, VolumeState, VolumeView
from erasure.scheme import Scheme
from protocol.ids import NodeId, VolumeId

TOLERANCE: Final = 0.05
"""A node within this share of what it should hold is left alone: evenness beyond it is not worth
the copying."""

_BUSY: Final = "is being moved already"
_OPEN: Final = "is open: the placement service seals it first"


@dataclass(frozen=True, slots=True)
class PlannedMove:
    """One slot of a sealed volume, from a node to another."""

    volume: VolumeId
    slot: int
    source: NodeId | None
    """Where the fragments are read, or None if they have to be rebuilt from other slots."""
    target: NodeId
    bytes: int


@dataclass(frozen=True, slots=True)
class Blocked:
    """A volume that cannot be changed now, and why: it has no target, or it has to wait."""

    volume: VolumeId
    reason: str


@dataclass(frozen=True, slots=True)
class MovePlan:
    """Slots to move, in the order in which to move them, and what cannot be moved now."""

    moves: tuple[PlannedMove, ...]
    blocked: tuple[Blocked, ...] = ()
    """Nothing that goes by itself helps these."""
    waiting: tuple[Blocked, ...] = ()
    """These have a target, and are moved as soon as what they wait for has ended by itself."""

    @property
    def units(self) -> int:
        """Slots to move."""
        return len(self.moves)

    @property
    def bytes(self) -> int:
        """To be written to targets, about."""
        return sum(move.bytes for move in self.moves)


@dataclass(frozen=True, slots=True)
class TranscodePlan:
    """Volumes whose blocks are written anew, emptiest first, and what has to wait."""

    source: Scheme
    target: Scheme
    volumes: tuple[VolumeId, ...]
    bytes: int
    """Stored bytes of their blocks, before coding."""
    blocked: tuple[Blocked, ...] = ()

    @property
    def units(self) -> int:
        """Volumes to transcode."""
        return len(self.volumes)


Plan = MovePlan | TranscodePlan


def plan_drain(
    view: CellView, node_id: NodeId, busy: Collection[VolumeId] = frozenset()
) -> MovePlan:
    """Move every slot of a node to the nodes that are farthest below their share."""
    layout = Layout(view, leaving=(node_id,))
    targets = _Emptiest(layout, layout.fair_bytes(view))
    moves: list[PlannedMove] = []
    blocked: list[Blocked] = []
    waiting: list[Blocked] = []
    for volume, slot in _slots_of(view, node_id):
        wait = _not_now(volume, busy)
        if wait == _BUSY:
            waiting.append(Blocked(volume.volume_id, wait))
            continue
        target = targets.take(volume, slot)
        if target is None:
            blocked.append(Blocked(volume.volume_id, layout.why_nowhere(volume, slot)))
            continue
        move = _move(layout, volume, slot, target)  # counted there also while it waits
        if wait is None:
            moves.append(move)
        else:
            waiting.append(Blocked(volume.volume_id, wait))
    return MovePlan(tuple(moves), tuple(blocked), tuple(waiting))


def plan_replace(
    view: CellView, node_id: NodeId, new: NodeId, busy: Collection[VolumeId] = frozenset()
) -> MovePlan:
    """Move every slot of a node, which may be dead, to one other."""
    layout = Layout(view, leaving=(node_id,))
    target = next((node for node in layout.takers if node.node_id == new), None)
    moves: list[PlannedMove] = []
    blocked: list[Blocked] = []
    waiting: list[Blocked] = []
    for volume, slot in _slots_of(view, node_id):
        wait = _not_now(volume, busy)
        if target is None:
            blocked.append(Blocked(volume.volume_id, f"{new} takes no slots now"))
            continue
        obstacle = None if wait == _BUSY else layout.obstacle(volume, slot, target)
        if obstacle is not None:
            said = f"{new} cannot take it: it would {obstacle}"
            blocked.append(Blocked(volume.volume_id, said))
        elif wait is not None:
            waiting.append(Blocked(volume.volume_id, wait))
        else:
            moves.append(_move(layout, volume, slot, target))
    return MovePlan(tuple(moves), tuple(blocked), tuple(waiting))


def plan_rebalance(
    view: CellView, tolerance: float = TOLERANCE, busy: Collection[VolumeId] = frozenset()
) -> MovePlan:
    """Move slots from nodes above their share to nodes below it, until all are within `tolerance`
    of it or no move helps.

    A byte is moved once, and straight to where it is missing; every move lessens the sum of the
    squared distances from the shares, so that a plan ends, and planning again after it finds
    nothing to do.
    """
    return MovePlan(_joined(_Rebalance(view, Layout(view), tolerance, busy).run()))


def plan_transcode(view: CellView, source: Scheme, target: Scheme) -> TranscodePlan:
    """Every sealed volume of `source`: its blocks go to open volumes of `target`."""
    sealed: list[VolumeView] = []
    blocked: list[Blocked] = []
    for volume in view.volumes:
        if volume.scheme != source:
            continue
        if volume.state is VolumeState.OPEN:
            blocked.append(Blocked(volume.volume_id, "is open: new blocks still go there"))
        else:
            sealed.append(volume)
    sealed.sort(key=lambda volume: (volume.stored_bytes, volume.volume_id))
    return TranscodePlan(
        source,
        target,
        tuple(volume.volume_id for volume in sealed),
        sum(volume.stored_bytes for volume in sealed),
        tuple(blocked),
    )


def plan_json(plan: Plan) -> dict[str, Any]:
    """A plan as the API gives it."""
    said: dict[str, Any] = {
        "units": plan.units,
        "bytes": plan.bytes,
        "blocked": _blocked_json(plan.blocked),
    }
    if isinstance(plan, MovePlan):
        said["moves"] = [
            {
                "volume": str(move.volume),
                "slot": move.slot,
                "source": None if move.source is None else str(move.source),
                "target": str(move.target),
                "bytes": move.bytes,
            }
            for move in plan.moves
        ]
        said["waiting"] = _blocked_json(plan.waiting)
    else:
        said["volumes"] = [str(volume) for volume in plan.volumes]
    return said


def _blocked_json(volumes: Iterable[Blocked]) -> list[dict[str, Any]]:
    return [{"volume": str(item.volume), "reason": item.reason} for item in volumes]


# -- parts ---------------------------------------------------------------------------------------


def _slots_of(view: CellView, node_id: NodeId) -> Iterable[tuple[VolumeView, int]]:
    """Slots on a node, the largest first: they are the hardest to find room for."""
    found = [volume for volume in view.volumes if node_id in volume.slots]
    found.sort(key=lambda volume: (-slot_bytes(volume), volume.volume_id))
    return ((volume, volume.slots.index(node_id)) for volume in found)


def _not_now(volume: VolumeView, busy: Collection[VolumeId]) -> str | None:
    """What a volume waits for before a slot of it may be moved."""
    if volume.volume_id in busy:
        return _BUSY
    return _OPEN if volume.state is VolumeState.OPEN else None


def _move(layout: Layout, volume: VolumeView, slot: int, target: NodeView) -> PlannedMove:
    source = layout.move(volume, slot, target.node_id)
    serves = source is not None and layout.nodes[source].serves_reads
    return PlannedMove(
        volume.volume_id,
        slot,
        source if serves else None,
        target.node_id,
        layout.bytes[volume.volume_id],
    )


class _Emptiest:
    """Takers by how much of their share they hold, in a heap: a slot goes to the first that may
    take it."""

    def __init__(self, layout: Layout, fair: dict[NodeId, float]) -> None:
        self._layout = layout
        self._fair = fair
        self._heap = [self._entry(node) for node in layout.takers]
        heapq.heapify(self._heap)

    def _entry(self, node: NodeView) -> tuple[float, NodeId]:
        return self._layout.held[node.node_id] / max(self._fair[node.node_id], 1.0), node.node_id

    def take(self, volume: VolumeView, slot: int) -> NodeView | None:
        """The node that the slot is to move to, counted as if it were there already."""
        passed: list[tuple[float, NodeId]] = []
        chosen: NodeView | None = None
        while self._heap and chosen is None:
            entry = heapq.heappop(self._heap)
            node = self._layout.nodes[entry[1]]
            if self._layout.obstacle(volume, slot, node) is None:
                chosen = node
                full = self._layout.held[node.node_id] + self._layout.bytes[volume.volume_id]
                entry = (full / max(self._fair[node.node_id], 1.0), node.node_id)
            passed.append(entry)
        for entry in passed:
            heapq.heappush(self._heap, entry)
        return chosen


class _Rebalance:
    """Takes from the fullest node again and again, one slot at a time.

    A pass walks each donor's slots once, largest first; passes repeat until one moves nothing.
    """

    def __init__(
        self, view: CellView, layout: Layout, tolerance: float, busy: Collection[VolumeId]
    ) -> None:
        self._layout = layout
        self._fair = layout.fair_bytes(view)
        self._tolerance = tolerance
        serving = {node.node_id for node in view.nodes if node.serves_reads}
        self._whole = [
            volume
            for volume in view.volumes
            if volume.state is VolumeState.SEALED
            and volume.blocks
            and volume.volume_id not in busy
            and serving.issuperset(volume.slots)
        ]
        self._whole.sort(key=lambda volume: (-layout.bytes[volume.volume_id], volume.volume_id))
        self._movable: dict[NodeId, Iterator[tuple[VolumeView, int]]] = {}
        self._receivers: list[tuple[float, NodeId]] = []
        self._off: set[NodeId] = set()

    def run(self) -> list[PlannedMove]:
        """All moves in order."""
        moves: list[PlannedMove] = []
        while True:
            found = self._pass()
            if not found:
                return moves
            moves += found

    def _pass(self) -> list[PlannedMove]:
        surplus = {node_id: self._surplus(node_id) for node_id in self._fair}
        donors = [(-over, node_id) for node_id, over in surplus.items() if over > 0]
        self._receivers = [(over, node_id) for node_id, over in surplus.items() if over < 0]
        self._off = {node_id for _, node_id in self._receivers if self._is_off(node_id)}
        heapq.heapify(donors)
        heapq.heapify(self._receivers)
        self._walk({node_id for _, node_id in donors})
        moves: list[PlannedMove] = []
        while donors and self._receivers:
            _, donor = heapq.heappop(donors)
            move = self._give(donor)
            if move is not None:
                moves.append(move)
                if self._surplus(donor) > 0:
                    heapq.heappush(donors, (-self._surplus(donor), donor))
        return moves

    def _walk(self, donors: set[NodeId]) -> None:
        """Where each donor's slots are, before this pass moves any."""
        found: dict[NodeId, list[tuple[VolumeView, int]]] = {node_id: [] for node_id in donors}
        for volume in self._whole:
            for slot, node_id in enumerate(self._layout.slots[volume.volume_id]):
                if node_id in donors:
                    assert node_id is not None
                    found[node_id].append((volume, slot))
        self._movable = {node_id: iter(slots) for node_id, slots in found.items()}

    def _give(self, donor: NodeId) -> PlannedMove | None:
        """The next slot of a donor that some receiver may take, moved there."""
        if not self._off and not self._is_off(donor):
            return None
        for volume, slot in self._movable[donor]:
            target = self._receiver(donor, volume, slot)
            if target is not None:
                return _move(self._layout, volume, slot, self._layout.nodes[target])
        return None

    def _receiver(self, donor: NodeId, volume: VolumeView, slot: int) -> NodeId | None:
        """The node that lacks most among those that may take the slot and are the better for
        it."""
        size = self._layout.bytes[volume.volume_id]
        surplus, donor_is_off = self._surplus(donor), self._is_off(donor)
        passed: list[tuple[float, NodeId]] = []
        chosen: NodeId | None = None
        while self._receivers and chosen is None:
            lacks, node_id = heapq.heappop(self._receivers)
            passed.append((lacks, node_id))
            if surplus - lacks <= size:
                break  # those after it lack less still
            needed = donor_is_off or node_id in self._off
            node = self._layout.nodes[node_id]
            if needed and self._layout.obstacle(volume, slot, node) is None:
                chosen = node_id
                passed[-1] = (lacks + size, node_id)
                if abs(lacks + size) <= self._tolerance * self._fair[node_id] or lacks + size > 0:
                    self._off.discard(node_id)
        for entry in passed:
            if entry[0] < 0:
                heapq.heappush(self._receivers, entry)
        return chosen

    def _surplus(self, node_id: NodeId) -> float:
        return self._layout.held[node_id] - self._fair[node_id]

    def _is_off(self, node_id: NodeId) -> bool:
        return abs(self._surplus(node_id)) > self._tolerance * self._fair[node_id]


def _joined(moves: list[PlannedMove]) -> tuple[PlannedMove, ...]:
    """A slot that a later pass moved on goes straight to where it ends."""
    ends: dict[tuple[VolumeId, int], PlannedMove] = {}
    for move in moves:
        key = (move.volume, move.slot)
        first = ends.pop(key, None)
        source = first.source if first is not None else move.source
        ends[key] = PlannedMove(move.volume, move.slot, source, move.target, move.bytes)
    return tuple(move for move in ends.values() if move.source != move.target)
