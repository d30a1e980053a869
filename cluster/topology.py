"""Nodes, their states, failure domains, volumes: the frozen views that planners and clients read.

Used at every step of every walk (put: choosing a volume; get: finding slots; healing: deciding what
is lost).  Pure data and one transition function: imports nothing that does I/O, and never Ray.

Life of a node
--------------

                  removed
    joining ----------------------------------------------------> gone
       | answered                                                 ^  ^
       v        missed            lost                  removed   |  |
       up <=================> suspect ----------> down -----------+  |
       |  ^     answered         |                ^  |               |
       |  +----------------------+------ answered |--+               |
       | drain                   | drain          | lost             |
       v                         v                |                  |
       draining <----------------+----------------+                  |
       | emptied                                                     |
       v                                                    removed  |
       drained ------------------------------------------------------+

`disk_failed` takes up, suspect, draining and drained straight to down.  `drain_cancelled` brings
draining and drained back to up.  An answer from a node that is down brings it up again: its
fragments are current as far as their epochs say.  `gone` is final; a replaced disk is a new node.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from erasure.scheme import Scheme
from protocol.ids import NodeId, VolumeId


class NodeState(enum.StrEnum):
    """Where a node is in its life; see the diagram above."""

    JOINING = "joining"
    UP = "up"
    SUSPECT = "suspect"
    DOWN = "down"
    DRAINING = "draining"
    DRAINED = "drained"
    GONE = "gone"


class NodeEvent(enum.StrEnum):
    """What can happen to a node."""

    ANSWERED = "answered"
    """It holds a lease of its current incarnation."""
    MISSED = "missed"
    """Some leases in a row got no answer."""
    LOST = "lost"
    """No lease was answered for so long that its slots must be written elsewhere."""
    DISK_FAILED = "disk_failed"
    """It says itself that its disk is bad, or that its directory is missing or another's."""
    DRAIN = "drain"
    DRAIN_CANCELLED = "drain_cancelled"
    EMPTIED = "emptied"
    """Nothing refers to a slot of it any more."""
    REMOVED = "removed"


_S, _E = NodeState, NodeEvent

NODE_TRANSITIONS: Final[Mapping[tuple[NodeState, NodeEvent], NodeState]] = MappingProxyType(
    {
        (_S.JOINING, _E.ANSWERED): _S.UP,
        (_S.JOINING, _E.REMOVED): _S.GONE,
        (_S.UP, _E.MISSED): _S.SUSPECT,
        (_S.UP, _E.DISK_FAILED): _S.DOWN,
        (_S.UP, _E.DRAIN): _S.DRAINING,
        (_S.SUSPECT, _E.ANSWERED): _S.UP,
        (_S.SUSPECT, _E.LOST): _S.DOWN,
        (_S.SUSPECT, _E.DISK_FAILED): _S.DOWN,
        (_S.SUSPECT, _E.DRAIN): _S.DRAINING,
        (_S.DOWN, _E.ANSWERED): _S.UP,
        (_S.DOWN, _E.REMOVED): _S.GONE,
        (_S.DRAINING, _E.LOST): _S.DOWN,
        (_S.DRAINING, _E.DISK_FAILED): _S.DOWN,
        (_S.DRAINING, _E.DRAIN_CANCELLED): _S.UP,
        (_S.DRAINING, _E.EMPTIED): _S.DRAINED,
        (_S.DRAINED, _E.DISK_FAILED): _S.DOWN,
        (_S.DRAINED, _E.DRAIN_CANCELLED): _S.UP,
        (_S.DRAINED, _E.REMOVED): _S.GONE,
    }
)
"""Every legal step; a pair that is absent is a mistake of ours."""


def may_happen(state: NodeState, event: NodeEvent) -> bool:
    """Whether `event` means something to a node in `state`."""
    return (state, event) in NODE_TRANSITIONS


def transition(state: NodeState, event: NodeEvent) -> NodeState:
    """The state after `event`.  An illegal pair is an assertion failure: ask `may_happen` first."""
    assert may_happen(state, event), f"a node that is {state} cannot take {event}"
    return NODE_TRANSITIONS[state, event]


TAKES_NEW_VOLUMES: Final = frozenset({NodeState.UP})
"""States in which a node gets slots of new volumes."""

TAKES_WRITES: Final = frozenset({NodeState.UP, NodeState.SUSPECT})
"""States in which a put may still be sent to a slot: suspicion is not yet a verdict."""

SERVES_READS: Final = frozenset(
    {NodeState.UP, NodeState.SUSPECT, NodeState.DRAINING, NodeState.DRAINED}
)
"""States in which a read should be tried first; a node that is down may be tried last."""


LEAVING: Final = frozenset({NodeState.DRAINING, NodeState.DRAINED, NodeState.GONE})
"""States of nodes that somebody took out on purpose: a cell without them is whole."""


@dataclass(frozen=True, slots=True, order=True)
class FailureDomain:
    """Where a node stands.  A host belongs to one rack; an empty label counts as a name."""

    rack: str
    host: str


@dataclass(frozen=True, slots=True)
class NodeView:
    """One node row.  Bytes and fragments are what the node reported last, seconds ago."""

    node_id: NodeId
    store_id: str
    directory: str
    host: str
    rack: str
    weight: float
    """Share of new slots this node should get, relative to the others; zero: none."""
    state: NodeState
    state_since: float
    incarnation: int
    """Counts the registrations of the node; zero until the first."""
    endpoint: str
    """`host:port` of its data port; empty until the first registration."""
    pid: int
    capacity_bytes: int
    free_bytes: int
    used_bytes: int
    """Bytes of the fragments it holds."""
    fragments: int
    detail: str
    disk_failed: bool = False
    """The node says itself that its disk is bad."""
    placement_free_bytes: int = -1
    """What it may fill before no new volume should be placed on it; -1 until it says so."""

    @property
    def domain(self) -> FailureDomain:
        """Rack and host."""
        return FailureDomain(self.rack, self.host)

    @property
    def takes_new_volumes(self) -> bool:
        """Whether a planner may give it slots of new volumes."""
        return self.state in TAKES_NEW_VOLUMES and self.weight > 0

    @property
    def is_crowded(self) -> bool:
        """So full that new volumes should lie on others while there are others."""
        return self.placement_free_bytes == 0

    @property
    def placement_weight(self) -> float:
        """Its claim to new slots: its weight times its free space, and never quite nothing, so that
        a cell whose disks are all full still has volumes."""
        return self.weight * max(self.free_bytes, 1)

    @property
    def takes_writes(self) -> bool:
        """Whether a put should be sent to it."""
        return bool(self.endpoint) and self.state in TAKES_WRITES

    @property
    def serves_reads(self) -> bool:
        """Whether a get should ask it before nodes that are down or have not come back yet."""
        return bool(self.endpoint) and self.state in SERVES_READS


class VolumeState(enum.StrEnum):
    """`open --seal--> sealed`; a sealed volume is never opened again."""

    OPEN = "open"
    SEALED = "sealed"


@dataclass(frozen=True, slots=True)
class VolumeView:
    """One volume row with its slots.  A slot is None while no node could be found for it."""

    volume_id: VolumeId
    scheme: Scheme
    state: VolumeState
    epoch: int
    slots: tuple[NodeId | None, ...]
    stored_bytes: int
    """Stored bytes of its blocks before coding when the row was read; grows unannounced."""
    blocks: int

    @property
    def vacant_slots(self) -> tuple[int, ...]:
        """Slots without a node."""
        return tuple(slot for slot, node in enumerate(self.slots) if node is None)


@dataclass(frozen=True, slots=True)
class CellView:
    """What a planner sees: all nodes, and the volumes it decides about (for placement the open
    ones).  Both in id order."""

    nodes: tuple[NodeView, ...]
    volumes: tuple[VolumeView, ...]
    unwritable: frozenset[NodeId] = frozenset()
    """Nodes that answer and whose state is good, and that take no writes: full, or failing them."""
