"""What a seed decides about a run: the cell, its network and clocks, how long, what goes wrong.

Everything is drawn here, before anything runs, so that a report can print it and a scenario can
replace part of it.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from chaos.faults import FaultKind
from chaos.nemesis import NemesisPlan
from chaos.sim.network import LinkQuality
from chaos.workloads import WorkloadPlan
from erasure.scheme import Scheme

SCHEMES: tuple[tuple[str, int, int], ...] = (
    ("rs-6-3", 9, 12),
    ("rs-6-3", 9, 9),
    ("rs-4-2", 6, 9),
    ("rs-2-1", 3, 5),
    ("rs-3-2", 5, 8),
    ("replica-3", 3, 5),
)
"""Scheme, fewest and most nodes."""

CHANGED = 0.2
"""Share of runs in which an operator is at work."""


@dataclass(frozen=True, slots=True)
class Options:
    """One run.  Times are virtual seconds."""

    seed: int
    scheme: Scheme
    nodes: int
    hosts: int
    gateways: int
    shuffle: bool
    encrypted: bool
    link: LinkQuality
    clock_drift: float
    """Clocks of hosts run up to this share fast or slow."""
    lease_interval_s: float
    map_age_s: float
    """How old a gateway's map may be when an operation starts."""
    rows_cached: int
    """Rows of the block index that a gateway keeps."""
    fault_s: float
    """How long faults and clients go on."""
    quiet_s: float
    """Idle time before the last look: leases and timers go on."""
    workload: WorkloadPlan
    nemesis: NemesisPlan
    out_after_s: float = 30.0
    """After which a node that is down counts as lost for good."""
    verified: bool = False
    """Whether the healed cell is verified until a deep pass finds nothing."""
    changes_gap_s: float = 0.0
    """Between two things that an operator asks for; zero: there is none."""
    stray_grace_s: float = 90.0
    """How old a stray must be before an operator's removal takes it."""

    def describe(self) -> list[str]:
        """Lines for a report."""
        weights = sorted(self.nemesis.weights.items(), key=lambda item: -item[1])
        return [
            f"cell: {self.scheme}, {self.nodes} nodes on {self.hosts} hosts, "
            f"{self.gateways} gateways, shuffled schedule: {_yes(self.shuffle)}, encrypted: "
            f"{_yes(self.encrypted)}",
            f"time: {self.fault_s:.0f} s of faults, then {self.quiet_s:.0f} s of quiet; clocks "
            f"drift up to {self.clock_drift:.4%}; leases every {self.lease_interval_s:g} s, maps "
            f"up to {self.map_age_s:g} s old, {self.rows_cached} rows cached",
            f"repair: nodes are out after {self.out_after_s:.0f} s; verified at the end: "
            f"{_yes(self.verified)}",
            f"operator: asks for something about every {self.changes_gap_s:.0f} s"
            if self.changes_gap_s
            else "operator: none",
            f"clients: {self.workload.clients} of {self.workload.owners} owners, a pause of "
            f"{self.workload.think_mean_s:.1f} s, {self.workload.paths} paths",
            f"faults: about every {self.nemesis.gap_mean_s:.0f} s, at most "
            f"{self.nemesis.impaired_nodes_max} nodes out at once; "
            + ", ".join(f"{kind} {weight:.2f}" for kind, weight in weights)
            if weights
            else "faults: none",
        ]


def _yes(flag: bool) -> str:
    return "yes" if flag else "no"


def draw_options(seed: int) -> Options:
    """The options of the `mixed` scenario: some hundreds of operations, spread over minutes."""
    rng = random.Random(f"options-{seed}")
    scheme_name, fewest, most = rng.choice(SCHEMES)
    scheme = Scheme.parse(scheme_name)
    nodes = rng.randint(fewest, most)
    fault_s = rng.choice([60.0, 180.0, 360.0, 600.0])
    faults = rng.choice([6, 15, 40])
    changes = random.Random(f"changes-{seed}")
    return Options(
        seed=seed,
        scheme=scheme,
        nodes=nodes,
        hosts=rng.choice([1, nodes, max(2, nodes // 2)]),
        gateways=rng.choice([1, 2, 2]),
        shuffle=rng.random() < 0.7,
        encrypted=rng.random() < 0.25,
        link=LinkQuality(latency_mean_s=rng.choice([0.0002, 0.0005, 0.003])),
        clock_drift=rng.choice([0.0, 0.0001, 0.01]),
        lease_interval_s=rng.choice([1.0, 2.0, 3.0, 3.0]),
        map_age_s=rng.choice([1.0, 1.0, 15.0]),
        rows_cached=rng.choice([4, 10_000]),
        fault_s=fault_s,
        quiet_s=rng.choice([20.0, 60.0, 240.0]),
        workload=WorkloadPlan.draw(rng, rng.randint(200, 340), fault_s),
        nemesis=NemesisPlan.draw(rng, scheme.m, nodes, fault_s / faults),
        out_after_s=rng.choice([10.0, 30.0, 90.0, 900.0]),
        verified=rng.random() < 0.5,
        changes_gap_s=changes.choice([15.0, 30.0, 60.0]) if changes.random() < CHANGED else 0.0,
    )


def _only(
    options: Options, *kinds: FaultKind, gap_s: float, impaired_max: int | None = None
) -> Options:
    limit = options.scheme.m if impaired_max is None else impaired_max
    plan = NemesisPlan(dict.fromkeys(kinds, 1.0), gap_s, limit)
    return dataclasses.replace(options, nemesis=plan, changes_gap_s=0.0)


def _calm(options: Options) -> Options:
    plan = NemesisPlan({}, 1e9, 0)
    return dataclasses.replace(options, nemesis=plan, changes_gap_s=0.0)


def _contended(options: Options) -> Options:
    """Few paths, no pauses to speak of: every commit races with another."""
    workload = dataclasses.replace(
        options.workload,
        weights={"put": 2.0, "commit": 6.0, "entry": 1.0, "delete": 1.0},
        clients=6,
        paths=2,
        think_mean_s=0.2,
        bursts=True,
    )
    return dataclasses.replace(_calm(options), workload=workload, fault_s=20.0, quiet_s=5.0)


def _unwritable(options: Options) -> Options:
    """More nodes than slots, and never so few that take writes that a put may be refused."""
    cell = dataclasses.replace(options, scheme=Scheme.parse("rs-6-3"), nodes=12, hosts=12)
    return _only(cell, FaultKind.DISK_FULL, FaultKind.SYNC_FAILS, gap_s=10.0)


def _changes(options: Options) -> Options:
    """Drains, rebalances and transcodes under load and kills, in a cell with nodes to spare."""
    cell = dataclasses.replace(options, scheme=Scheme.parse("rs-4-2"), nodes=9, hosts=9)
    killed = _only(cell, FaultKind.KILL, FaultKind.KILL_AT_STEP, gap_s=10.0, impaired_max=1)
    return dataclasses.replace(killed, changes_gap_s=8.0)


def _healing(options: Options) -> Options:
    """Everything that repair, scrub, verifier and jobs are there for, in a cell that is changed all
    the time."""
    cell = dataclasses.replace(
        options,
        scheme=Scheme.parse("rs-4-2"),
        nodes=10,
        hosts=10,
        out_after_s=10.0,
        fault_s=180.0,
        stray_grace_s=70.0,
    )
    broken = _only(
        cell,
        FaultKind.KILL,
        FaultKind.KILL_AT_DISK,
        FaultKind.LOSE_DISK,
        FaultKind.CORRUPT_RECORD,
        FaultKind.DROP_RECORD,
        FaultKind.LOSSY_NETWORK,
        FaultKind.SLOW_DISK,
        FaultKind.PAUSE,
        gap_s=6.0,
    )
    return dataclasses.replace(broken, changes_gap_s=8.0)


def _idle(options: Options) -> Options:
    calm = dataclasses.replace(_calm(options), changes_gap_s=0.0)
    return dataclasses.replace(calm, quiet_s=4 * 3600.0)


SCENARIOS: Mapping[str, Callable[[Options], Options]] = {
    "mixed": lambda options: options,
    "calm": _calm,
    "idle": _idle,
    "contended": _contended,
    "changes": _changes,
    "healing": _healing,
    "kill_m": lambda options: _only(
        options, FaultKind.KILL, FaultKind.KILL_AT_STEP, FaultKind.KILL_AT_DISK, gap_s=5.0
    ),
    "power_cut": lambda options: _only(
        options, FaultKind.POWER_CUT, gap_s=30.0, impaired_max=options.nodes
    ),
    "zombies": lambda options: _only(options, FaultKind.PAUSE, FaultKind.DOUBLE_START, gap_s=10.0),
    "laggards": lambda options: _only(
        options,
        FaultKind.KILL,
        FaultKind.PAUSE,
        FaultKind.SLOW_DISK,
        gap_s=3.0,
        impaired_max=options.nodes,
    ),
    "bit_rot": lambda options: _only(
        options,
        FaultKind.CORRUPT_RECORD,
        FaultKind.SWAP_RECORDS,
        FaultKind.DROP_RECORD,
        FaultKind.READ_ERRORS,
        gap_s=5.0,
    ),
    "unwritable": _unwritable,
    "lost_disks": lambda options: _only(
        options, FaultKind.LOSE_DISK, FaultKind.EMPTY_DISK, gap_s=30.0
    ),
    "bad_network": lambda options: _only(
        options,
        FaultKind.PARTITION,
        FaultKind.LOSSY_NETWORK,
        FaultKind.SLOW_NETWORK,
        gap_s=15.0,
    ),
    "sql": lambda options: _only(
        options,
        FaultKind.SQL_BUSY,
        FaultKind.SQL_REPLY_LOST,
        FaultKind.KILL_AT_COMMIT,
        gap_s=3.0,
    ),
}
"""Name -> how a seed's options are bent towards one kind of trouble."""
