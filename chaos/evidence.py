"""What a cell really holds, seen past its own code: rows, disks, and what faults destroyed.

Collected by an engine (`chaos/sim/inspect.py`; later `chaos/live/`) and judged by
`chaos/checkers.py`.  Frozen values; imports only ids and schemes.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from erasure.scheme import Scheme
from protocol.ids import BlockHash, NodeId, VolumeId


class SlotState(enum.Enum):
    """What the disk of the node that the volume table names holds for one slot."""

    INTACT = "intact"
    CORRUPT = "corrupt"
    ABSENT = "absent"


@dataclass(frozen=True, slots=True)
class Stripe:
    """One row of the block index and what stands behind it."""

    block: BlockHash
    volume: VolumeId
    scheme: Scheme
    plain_bytes: int
    nodes: tuple[NodeId | None, ...]
    slots: tuple[SlotState, ...]
    debts: frozenset[int]
    """Slots that the cell itself knows to be missing."""
    destroyed: frozenset[int]
    """Slots whose fragment a fault took or damaged after it was durable."""

    @property
    def lost(self) -> frozenset[int]:
        """Slots that nobody can blame the cell for not having."""
        return self.debts | self.destroyed

    @property
    def intact(self) -> frozenset[int]:
        """Slots that can be read as far as the disk is concerned.  A fault may have left a record
        whose checksums match and whose bytes lie: it counts as destroyed."""
        states = enumerate(self.slots)
        good = frozenset(slot for slot, state in states if state is SlotState.INTACT)
        return good - self.destroyed


@dataclass(frozen=True, slots=True)
class Version:
    """One row of the versions table."""

    owner: str
    path: str
    rev: str
    blocks: tuple[BlockHash, ...]
    current: bool
    """The entry exists and this is its newest version."""


@dataclass(frozen=True, slots=True)
class References:
    """One row of `namespace_blocks`."""

    owner: str
    block: BlockHash
    count: int


@dataclass(frozen=True, slots=True)
class LeaseGranted:
    """A life of a node accepted a lease.  Times are seconds of the node's monotonic clock."""

    node_id: NodeId
    life: int
    incarnation: int
    at: float
    lease_s: float


@dataclass(frozen=True, slots=True)
class WriteAcknowledged:
    """A life of a node answered OK to at least one record of a put, or to a delete."""

    node_id: NodeId
    life: int
    incarnation: int
    at: float


NodeEvent = LeaseGranted | WriteAcknowledged
