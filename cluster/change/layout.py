"""What lies where, while a plan is being made: bytes, free room and failure domains.

Used by `plans` only.  A mutable picture of a frozen view: each planned move is taken into account
by the next.  Pure: no I/O, no randomness, no Ray.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Final

from cluster.placement import fair_shares, spread_cap
from cluster.topology import CellView, NodeView, VolumeView
from erasure.fragment import FRAGMENT_HEADER_BYTES
from erasure.scheme import Scheme
from protocol.ids import NodeId, VolumeId

HEADROOM_SHARE: Final = 0.10
"""Of a node's capacity, kept free of moves: repair of a lost node must find room."""


def slot_bytes(volume: VolumeView) -> int:
    """What one slot of a volume takes on a disk, about: its chunks and their headers."""
    return volume.scheme.chunk_bytes(volume.stored_bytes) + volume.blocks * FRAGMENT_HEADER_BYTES


class Layout:
    """The slots of all volumes, and the nodes that may take more."""

    def __init__(self, view: CellView, leaving: Collection[NodeId] = ()) -> None:
        """`leaving` nodes get nothing, whatever their state."""
        self.nodes: dict[NodeId, NodeView] = {node.node_id: node for node in view.nodes}
        self.takers: list[NodeView] = [
            node for node in view.nodes if node.takes_new_volumes and node.node_id not in leaving
        ]
        self.slots: dict[VolumeId, list[NodeId | None]] = {}
        self.bytes: dict[VolumeId, int] = {}
        self.held: dict[NodeId, float] = dict.fromkeys(self.nodes, 0)
        for volume in view.volumes:
            size = slot_bytes(volume)
            self.slots[volume.volume_id] = list(volume.slots)
            self.bytes[volume.volume_id] = size
            for node_id in volume.slots:
                if node_id is not None:
                    self.held[node_id] += size
        self._caps: dict[Scheme, int] = {}
        self.room: dict[NodeId, float] = {
            node.node_id: node.free_bytes - HEADROOM_SHARE * node.capacity_bytes
            for node in self.takers
        }

    def cap(self, scheme: Scheme) -> int:
        """Slots of a volume of this scheme that one host or rack of takers may hold."""
        cap = self._caps.get(scheme)
        if cap is None:
            cap = self._caps[scheme] = spread_cap(self.takers, scheme) if self.takers else 0
        return cap

    def fair_bytes(self, view: CellView) -> dict[NodeId, float]:
        """What each taker should hold of all bytes: by weight and capacity, never more than one
        slot of a volume."""
        weights = [node.weight * max(node.capacity_bytes, 1) for node in self.takers]
        per_slot: Counter[Scheme] = Counter()
        for volume in view.volumes:
            per_slot[volume.scheme] += self.bytes[volume.volume_id]
        fair = dict.fromkeys((node.node_id for node in self.takers), 0.0)
        for scheme, size in per_slot.items():
            for node_id, share in fair_shares(self.takers, scheme, weights).items():
                fair[node_id] += share * size
        return fair

    def obstacle(self, volume: VolumeView, slot: int, target: NodeView) -> str | None:
        """Why `target` may not take the slot; None if it may.

        Never two slots of a volume on a node, no host or rack beyond its cap, no disk without
        room.  To stay on the host or in the rack of before is always allowed: it takes nothing
        from the spread.
        """
        held = self.slots[volume.volume_id]
        if target.node_id in held:
            return HOLDS_A_SLOT
        if self.room[target.node_id] < self.bytes[volume.volume_id]:
            return NO_ROOM
        source = self.nodes.get(held[slot]) if held[slot] is not None else None  # type: ignore[arg-type]
        same_rack = source is not None and source.rack == target.rack
        same_host = same_rack and source is not None and source.host == target.host
        if same_host:
            return None
        on_host = in_rack = 0
        for node_id in held:
            if node_id is None:
                continue
            node = self.nodes[node_id]
            if node.rack == target.rack:
                in_rack += 1
                on_host += node.host == target.host
        cap = self.cap(volume.scheme)
        if on_host >= cap or (in_rack >= cap and not same_rack):
            return TOO_CLOSE
        return None

    def move(self, volume: VolumeView, slot: int, target: NodeId) -> NodeId | None:
        """Take a planned move into account; returns the node that held the slot."""
        held = self.slots[volume.volume_id]
        size = self.bytes[volume.volume_id]
        source = held[slot]
        if source is not None:
            self.held[source] -= size
            if source in self.room:
                self.room[source] += size
        held[slot] = target
        self.held[target] += size
        self.room[target] -= size
        return source

    def why_nowhere(self, volume: VolumeView, slot: int) -> str:
        """For people: what stands in the way at the nodes that there are."""
        found = Counter(self.obstacle(volume, slot, node) for node in self.takers)
        said = [f"{count} {reason}" for reason, count in sorted(found.items(), key=str) if reason]
        why = ", ".join(said) if said else "none takes new slots"
        return f"no node may take the slot: {why}; add a node"


HOLDS_A_SLOT: Final = "hold another slot of the volume"
NO_ROOM: Final = "have no room above the headroom of repair"
TOO_CLOSE: Final = "would put too many slots on one host or rack"
