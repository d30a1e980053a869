"""Draws faults from a seed, within a budget.

Pure drawing: it asks what the cell looks like (`CellView`) and returns the next fault, or None
when the budget forbids everything it drew.  The engine's injector carries faults out.  Each run
draws its own subset of kinds and its own weights: a run that does everything at once rarely does
anything for long.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from chaos import faults
from chaos.faults import RARE, Damage, Fault, FaultKind, Moment
from protocol.ids import NodeId

ATTEMPTS = 20
"""Draws before the nemesis lets a turn pass."""

DISK_LOSSES_APART_S = 60.0
"""Longer than any put lasts, so that one put cannot lose more than one receipt to lost disks."""

KIND_KEPT = 0.6
"""Probability that a run uses a kind of fault at all."""


class CellView(Protocol):
    """What the nemesis may know of the cell it breaks."""

    def nodes(self) -> Sequence[NodeId]:
        """Nodes whose disks still exist, in id order."""
        ...

    def gateways(self) -> Sequence[str]:
        """Names of the gateway processes."""
        ...

    def impaired_nodes(self) -> Sequence[str]:
        """Nodes that cannot do their part now; lost disks count for ever."""
        ...

    def spare_after_loss(self, node: NodeId) -> int:
        """Spare fragments of the worst stripe if this disk were lost too."""
        ...

    def seconds_since_loss(self) -> float:
        """Since the last disk was lost; infinite if none was."""
        ...


@dataclass(frozen=True, slots=True)
class NemesisPlan:
    """What one run draws from.  `weights` are relative; a kind that is absent never comes."""

    weights: Mapping[FaultKind, float]
    gap_mean_s: float
    impaired_nodes_max: int
    """Nodes that may be out at once: m promises that every read is served throughout."""

    @staticmethod
    def draw(rng: random.Random, tolerance: int, nodes: int, gap_mean_s: float) -> NemesisPlan:
        """A plan for a cell that tolerates `tolerance` losses."""
        kept = [kind for kind in FaultKind if rng.random() < KIND_KEPT] or [FaultKind.KILL]
        weights = {
            kind: rng.expovariate(1.0) * (0.15 if kind in RARE else 1.0) + 0.02 for kind in kept
        }
        impaired_max = tolerance if rng.random() < 0.6 else nodes
        return NemesisPlan(weights, gap_mean_s, impaired_max)


_Draw = Callable[["Nemesis"], Fault]


class Nemesis:
    """Draws one fault after the other."""

    def __init__(self, plan: NemesisPlan, view: CellView, rng: random.Random) -> None:
        self._plan = plan
        self._view = view
        self._rng = rng

    def gap_s(self) -> float:
        """Seconds until the next draw."""
        return self._rng.expovariate(1.0 / self._plan.gap_mean_s)

    def draw(self) -> Fault | None:
        """The next fault within the budget."""
        kinds, weights = list(self._plan.weights), list(self._plan.weights.values())
        for _ in range(ATTEMPTS):
            (kind,) = self._rng.choices(kinds, weights)
            fault = _DRAWS[kind](self)
            if self._affordable(fault):
                return fault
        return None

    # -- the budget ----------------------------------------------------------------------------

    def _affordable(self, fault: Fault) -> bool:
        match fault:
            case faults.LoseDisk() | faults.EmptyDisk():
                return (
                    self._view.spare_after_loss(fault.node) >= 0
                    and self._view.seconds_since_loss() > DISK_LOSSES_APART_S
                    and self._room_for([fault.node])
                )
            case faults.PowerCut():
                return self._plan.impaired_nodes_max >= len(self._view.nodes())
            case faults.Partition():
                # The smaller side is out, unless a gateway is cut off from nodes: then they are.
                return self._room_for([*fault.side, *fault.other])
            case (
                faults.KillAtDisk()
                | faults.ReadErrors()
                | faults.DiskFull()
                | faults.SyncFails()
                | faults.SlowDisk()
            ):
                return self._room_for([fault.node])
            case (
                faults.Kill()
                | faults.KillAtStep()
                | faults.KillAtCommit()
                | faults.Pause()
                | faults.DoubleStart()
            ):
                return self._room_for([fault.process])
            case _:
                return True

    def _room_for(self, processes: Sequence[str]) -> bool:
        nodes = {str(node) for node in self._view.nodes()}
        out = {*self._view.impaired_nodes(), *(name for name in processes if name in nodes)}
        return len(out) <= self._plan.impaired_nodes_max

    # -- targets and lengths -------------------------------------------------------------------

    def node(self) -> NodeId:
        """Any node that has a disk."""
        return self._rng.choice(self._view.nodes())

    def process(self) -> str:
        """Any process; nodes are as likely together as the gateways and the cell's services."""
        others = [*self._view.gateways(), "placement", "repair"]
        return str(self.node()) if self._rng.random() < 0.5 else self._rng.choice(others)

    def writer(self) -> str:
        """A process that writes to SQL."""
        gateways = self._view.gateways()
        return self._rng.choice([*gateways, *gateways, "placement", "repair"])

    def service(self) -> str:
        """A process of which there may be one."""
        return self._rng.choice(["placement", "placement", "repair"])

    def down_s(self) -> float:
        """How long a killed process stays away: mostly a restart, sometimes an outage."""
        if self._rng.random() < 0.8:
            return 0.2 + self._rng.expovariate(0.3)
        return self._rng.uniform(20, 200)

    def for_s(self) -> float:
        """How long a condition lasts."""
        return self._rng.choice([0.5, 3.0, 12.0, 45.0, 150.0]) * self._rng.uniform(0.5, 1.5)

    def pick(self) -> float:
        """A number in [0, 1) for the injector."""
        return self._rng.random()

    def partition(self) -> Fault:
        """Cut a few nodes off from a gateway, from a service of the cell, or from all."""
        nodes = [str(node) for node in self._view.nodes()]
        count = min(len(nodes), self._rng.choice([1, 1, 1, 2, 3]))
        side = tuple(sorted(self._rng.sample(nodes, count)))
        others = [*self._view.gateways(), "placement", "repair"]
        if self._rng.random() < 0.5:
            others = [self._rng.choice(others)]
        return faults.Partition(side, tuple(others), self._rng.random() < 0.4, self.for_s())

    def rare_share(self) -> float:
        """A probability between one in a hundred and one half, small ones more likely."""
        return 0.01 * math.pow(50.0, self._rng.random())


def _kill_at_step(n: Nemesis) -> Fault:
    return faults.KillAtStep(n.process(), int(200 * n.pick() ** 2), n.down_s())


def _clock_jump(n: Nemesis) -> Fault:
    seconds = (n.pick() - 0.5) * 2 * (3600.0 if n.pick() < 0.7 else 5.0)
    return faults.ClockJump(n.process(), seconds)


_DRAWS: Mapping[FaultKind, _Draw] = {
    FaultKind.KILL: lambda n: faults.Kill(n.process(), n.down_s()),
    FaultKind.KILL_AT_STEP: _kill_at_step,
    FaultKind.KILL_AT_COMMIT: lambda n: faults.KillAtCommit(n.writer(), n.pick() < 0.5, n.down_s()),
    FaultKind.KILL_AT_DISK: lambda n: faults.KillAtDisk(
        n.node(), list(Moment)[int(n.pick() * len(Moment))], n.down_s()
    ),
    FaultKind.PAUSE: lambda n: faults.Pause(n.process(), n.for_s()),
    FaultKind.POWER_CUT: lambda n: faults.PowerCut(n.down_s()),
    FaultKind.LOSE_DISK: lambda n: faults.LoseDisk(n.node(), n.pick() < 0.7),
    FaultKind.EMPTY_DISK: lambda n: faults.EmptyDisk(n.node(), n.pick() < 0.5),
    FaultKind.CORRUPT_RECORD: lambda n: faults.CorruptRecord(
        n.node(), n.pick(), list(Damage)[int(n.pick() * len(Damage))], n.pick() < 0.3
    ),
    FaultKind.SWAP_RECORDS: lambda n: faults.SwapRecords(n.node(), n.pick()),
    FaultKind.DROP_RECORD: lambda n: faults.DropRecord(n.node(), n.pick()),
    FaultKind.READ_ERRORS: lambda n: faults.ReadErrors(n.node(), n.rare_share(), n.for_s()),
    FaultKind.DISK_FULL: lambda n: faults.DiskFull(n.node(), n.for_s()),
    FaultKind.SYNC_FAILS: lambda n: faults.SyncFails(n.node(), n.for_s()),
    FaultKind.SLOW_DISK: lambda n: faults.SlowDisk(n.node(), 10.0 ** (1 + 2 * n.pick()), n.for_s()),
    FaultKind.PARTITION: lambda n: n.partition(),
    FaultKind.LOSSY_NETWORK: lambda n: faults.LossyNetwork(
        0.3 * n.rare_share(), n.rare_share(), n.for_s()
    ),
    FaultKind.SLOW_NETWORK: lambda n: faults.SlowNetwork(n.rare_share(), 5 * n.pick(), n.for_s()),
    FaultKind.CLOCK_JUMP: _clock_jump,
    FaultKind.SQL_BUSY: lambda n: faults.SqlBusy(n.writer(), 1 + int(5 * n.pick())),
    FaultKind.SQL_REPLY_LOST: lambda n: faults.SqlReplyLost(n.writer(), n.pick() < 0.7),
    FaultKind.DOUBLE_START: lambda n: faults.DoubleStart(
        n.service() if n.pick() < 0.5 else str(n.node()), n.for_s(), n.for_s()
    ),
}
assert set(_DRAWS) == set(FaultKind)
