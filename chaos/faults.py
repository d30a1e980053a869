"""Faults as data: what can go wrong, said once, for the simulation and the live nemesis.

`chaos/nemesis.py` draws them from a seed, an engine's injector carries them out
(`chaos/sim/inject.py`).  A fault names its target and how long it lasts; what heals it is part of
its meaning.  Times are seconds of the engine's clock.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from protocol.ids import NodeId


class FaultKind(enum.StrEnum):
    """One name per kind; the counters of a run use them.  Append-only."""

    KILL = "kill"
    KILL_AT_STEP = "kill_at_step"
    KILL_AT_COMMIT = "kill_at_commit"
    KILL_AT_DISK = "kill_at_disk"
    PAUSE = "pause"
    POWER_CUT = "power_cut"
    LOSE_DISK = "lose_disk"
    EMPTY_DISK = "empty_disk"
    CORRUPT_RECORD = "corrupt_record"
    SWAP_RECORDS = "swap_records"
    DROP_RECORD = "drop_record"
    READ_ERRORS = "read_errors"
    DISK_FULL = "disk_full"
    SYNC_FAILS = "sync_fails"
    SLOW_DISK = "slow_disk"
    PARTITION = "partition"
    LOSSY_NETWORK = "lossy_network"
    SLOW_NETWORK = "slow_network"
    CLOCK_JUMP = "clock_jump"
    SQL_BUSY = "sql_busy"
    SQL_REPLY_LOST = "sql_reply_lost"
    DOUBLE_START = "double_start"


@dataclass(frozen=True, slots=True)
class Kill:
    """SIGKILL one process (`node-03`, `placement`, `gateway-1`); it starts again after `down_s`."""

    kind: ClassVar[FaultKind] = FaultKind.KILL
    process: str
    down_s: float


@dataclass(frozen=True, slots=True)
class KillAtStep:
    """SIGKILL a process before the scheduling point that is `steps` of its own from now."""

    kind: ClassVar[FaultKind] = FaultKind.KILL_AT_STEP
    process: str
    steps: int
    down_s: float


@dataclass(frozen=True, slots=True)
class KillAtCommit:
    """SIGKILL a process at its next SQL commit: just before it, or just after, unanswered."""

    kind: ClassVar[FaultKind] = FaultKind.KILL_AT_COMMIT
    process: str
    after: bool
    down_s: float


class Moment(enum.StrEnum):
    """Where in a write a process dies."""

    BEFORE = "before"
    TORN = "torn"
    """Some records of the group are durable."""
    AFTER = "after"


@dataclass(frozen=True, slots=True)
class KillAtDisk:
    """SIGKILL a node in the next write to its store."""

    kind: ClassVar[FaultKind] = FaultKind.KILL_AT_DISK
    node: NodeId
    moment: Moment
    down_s: float


@dataclass(frozen=True, slots=True)
class Pause:
    """SIGSTOP, and SIGCONT after `for_s`: longer than a lease makes a zombie."""

    kind: ClassVar[FaultKind] = FaultKind.PAUSE
    process: str
    for_s: float


@dataclass(frozen=True, slots=True)
class PowerCut:
    """SIGKILL every process at one instant; all start again after `down_s`, in a drawn order."""

    kind: ClassVar[FaultKind] = FaultKind.POWER_CUT
    down_s: float


@dataclass(frozen=True, slots=True)
class LoseDisk:
    """A node and its directory are gone for ever; `replaced` adds an empty new node instead."""

    kind: ClassVar[FaultKind] = FaultKind.LOSE_DISK
    node: NodeId
    replaced: bool


@dataclass(frozen=True, slots=True)
class EmptyDisk:
    """A node is restarted over an emptied directory, as after a disk swap nobody announced.  It
    must refuse to serve rather than answer that it holds nothing; formatted anew under the old
    name, it must not be let in."""

    kind: ClassVar[FaultKind] = FaultKind.EMPTY_DISK
    node: NodeId
    reformatted: bool


class Damage(enum.StrEnum):
    """How a record's bytes go wrong."""

    FLIP_HEADER = "flip_header"
    FLIP_PAYLOAD = "flip_payload"
    TRUNCATE = "truncate"
    ZERO = "zero"
    LIE = "lie"
    """Other bytes under matching checksums: only the block's SHA-256 can tell."""


@dataclass(frozen=True, slots=True)
class CorruptRecord:
    """One fragment of a known block on `node` rots; `pick` in [0, 1) chooses which.  The store
    itself notices, or hands the bytes out."""

    kind: ClassVar[FaultKind] = FaultKind.CORRUPT_RECORD
    node: NodeId
    pick: float
    damage: Damage
    noticed: bool


@dataclass(frozen=True, slots=True)
class SwapRecords:
    """A disk returns another fragment, itself intact, in place of one of a known block."""

    kind: ClassVar[FaultKind] = FaultKind.SWAP_RECORDS
    node: NodeId
    pick: float


@dataclass(frozen=True, slots=True)
class DropRecord:
    """A disk forgets one fragment of a known block."""

    kind: ClassVar[FaultKind] = FaultKind.DROP_RECORD
    node: NodeId
    pick: float


@dataclass(frozen=True, slots=True)
class ReadErrors:
    """A disk answers reads with errors for a while: says nothing about what it holds."""

    kind: ClassVar[FaultKind] = FaultKind.READ_ERRORS
    node: NodeId
    share: float
    for_s: float


@dataclass(frozen=True, slots=True)
class DiskFull:
    """A disk refuses writes for a while; reads and deletes work."""

    kind: ClassVar[FaultKind] = FaultKind.DISK_FULL
    node: NodeId
    for_s: float


@dataclass(frozen=True, slots=True)
class SyncFails:
    """The next sync of a disk fails: the store must take no further write until it is reopened,
    which the node's restart after `for_s` does."""

    kind: ClassVar[FaultKind] = FaultKind.SYNC_FAILS
    node: NodeId
    for_s: float


@dataclass(frozen=True, slots=True)
class SlowDisk:
    """Every operation of a disk takes `factor` times as long for a while."""

    kind: ClassVar[FaultKind] = FaultKind.SLOW_DISK
    node: NodeId
    factor: float
    for_s: float


@dataclass(frozen=True, slots=True)
class Partition:
    """Messages between two groups of processes are held; one way if `one_way`."""

    kind: ClassVar[FaultKind] = FaultKind.PARTITION
    side: tuple[str, ...]
    other: tuple[str, ...]
    one_way: bool
    for_s: float


@dataclass(frozen=True, slots=True)
class LossyNetwork:
    """A share of all requests and replies is lost, and some requests arrive twice."""

    kind: ClassVar[FaultKind] = FaultKind.LOSSY_NETWORK
    loss: float
    duplicate: float
    for_s: float


@dataclass(frozen=True, slots=True)
class SlowNetwork:
    """A share of all messages takes up to `slow_s` longer."""

    kind: ClassVar[FaultKind] = FaultKind.SLOW_NETWORK
    share: float
    slow_s: float
    for_s: float


@dataclass(frozen=True, slots=True)
class ClockJump:
    """The wall clock of a process's host is set forward or back."""

    kind: ClassVar[FaultKind] = FaultKind.CLOCK_JUMP
    process: str
    seconds: float


@dataclass(frozen=True, slots=True)
class SqlBusy:
    """The next `times` SQL writes of a process are refused as busy, with nothing done."""

    kind: ClassVar[FaultKind] = FaultKind.SQL_BUSY
    process: str
    times: int


@dataclass(frozen=True, slots=True)
class SqlReplyLost:
    """The next SQL write of a process is committed or not, and answered with neither."""

    kind: ClassVar[FaultKind] = FaultKind.SQL_REPLY_LOST
    process: str
    committed: bool


@dataclass(frozen=True, slots=True)
class DoubleStart:
    """A process is stopped, a second one is started in its place, and the first goes on after
    `for_s`: what Ray does behind a frozen raylet.  Nodes and the placement service."""

    kind: ClassVar[FaultKind] = FaultKind.DOUBLE_START
    process: str
    for_s: float
    together_s: float
    """How long both run before the first is killed."""


Fault: TypeAlias = (
    Kill
    | KillAtStep
    | KillAtCommit
    | KillAtDisk
    | Pause
    | PowerCut
    | LoseDisk
    | EmptyDisk
    | CorruptRecord
    | SwapRecords
    | DropRecord
    | ReadErrors
    | DiskFull
    | SyncFails
    | SlowDisk
    | Partition
    | LossyNetwork
    | SlowNetwork
    | ClockJump
    | SqlBusy
    | SqlReplyLost
    | DoubleStart
)

RARE: frozenset[FaultKind] = frozenset(
    {FaultKind.POWER_CUT, FaultKind.LOSE_DISK, FaultKind.EMPTY_DISK, FaultKind.DOUBLE_START}
)
"""Kinds that a mixed run draws seldom, because each of them shapes minutes of what follows."""
