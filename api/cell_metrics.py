"""Prometheus metrics of the cell: redundancy, repair, jobs, alarms, as the database shows them.

Set when somebody asks for metrics (`system_routes`), from the same snapshot as the status; labels
are states, kinds and numbers of spare fragments, so their number is bounded by the code.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Gauge

from api.upkeep_metrics import UpkeepMetrics
from cluster.alarms import AlarmKind
from cluster.change.jobs import UNFINISHED
from cluster.status import CellStatus
from cluster.topology import NodeState, NodeView


class CellMetrics:
    """The cell as this gateway's map and the databases show it."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
            return Gauge(f"haversack_{name}", text, labels, registry=registry)

        self._nodes = gauge("nodes", "Storage nodes by state.", ("state",))
        self._debts = gauge("debts", "Fragments known to be missing.")
        self._blocks = gauge("blocks", "Blocks in the store.")
        self._plain = gauge("plain_bytes", "Their plain bytes.")
        self._stored = gauge("stored_bytes", "Their bytes before coding.")
        self._by_spare = gauge(
            "blocks_by_spare_fragments",
            "Blocks by the fragments that each could still lose; below zero: unreadable now.",
            ("spare",),
        )
        self._debt_age = gauge("debt_oldest_age_seconds", "Age of the oldest debt; 0: none.")
        self._unrepairable = gauge("blocks_unrepairable", "Blocks that repair gave up on.")
        self._moves = gauge("slots_moving", "Slots that are being made on another node.")
        self._jobs = gauge("jobs", "Jobs that have not ended, by state.", ("state",))
        self._alarms = gauge("alarms", "What an operator has to look at, by kind.", ("kind",))
        self._pass_ended = gauge(
            "pass_ended_timestamp_seconds",
            "When the last pass of a kind ended; 0: none has.",
            ("kind",),
        )
        self._repair_rate = gauge(
            "repair_bytes_per_second", "Fragments that repair wrote lately; 0: it has no work."
        )
        self._repair_eta = gauge(
            "repair_eta_seconds", "Until repair is done at that rate; NaN: not known."
        )
        self._upkeep = UpkeepMetrics(registry)
        self.sql_up = gauge("sql_up", "1 if both databases answered.")

    def set_nodes(self, nodes: Iterable[NodeView]) -> None:
        """Count nodes by state; states without a node are shown as zero."""
        tally = Tally(node.state for node in nodes)
        for state in NodeState:
            self._nodes.labels(state.value).set(tally[state])

    def set_snapshot(self, status: CellStatus, now: float) -> None:
        """Everything but the nodes; `now` is the wall clock."""
        totals, redundancy = status.totals, status.redundancy
        self._blocks.set(totals.blocks)
        self._plain.set(totals.plain_bytes)
        self._stored.set(totals.stored_bytes)
        self._debts.set(redundancy.debts)
        self._unrepairable.set(redundancy.unrepairable)
        self._moves.set(redundancy.moves)
        oldest = redundancy.oldest_debt
        self._debt_age.set(0.0 if oldest is None else max(0.0, now - oldest))
        self._by_spare.clear()
        for spare, blocks in redundancy.blocks_by_spare.items():
            self._by_spare.labels(str(spare)).set(blocks)
        jobs = Tally(job.state for job in status.jobs)
        for state in UNFINISHED:
            self._jobs.labels(state.value).set(jobs[state])
        alarms = Tally(alarm.kind for alarm in status.alarms)
        for kind in AlarmKind:
            self._alarms.labels(kind.value).set(alarms[kind])
        self._set_work(status)
        self._upkeep.set_snapshot(status, now)

    def _set_work(self, status: CellStatus) -> None:
        repair, verified = status.repair or {}, status.verification
        eta_s = repair.get("eta_s")
        self._repair_rate.set(repair.get("bytes_per_s", 0.0))
        self._repair_eta.set(float("nan") if eta_s is None else eta_s)
        last = {"repair": repair, "verify": verified["finished"], "removal": verified["removal"]}
        for kind, found in last.items():
            self._pass_ended.labels(kind).set((found or {}).get("ended") or 0.0)
