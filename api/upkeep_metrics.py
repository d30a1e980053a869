"""Prometheus metrics of what keeps a cell's redundancy true: disks, scrubs, the verifier, canaries.

Set by `cell_metrics` from the snapshot that it got from SQL; nothing is asked of a node.  Labels
are nodes, at most `NODES_LABELLED_MAX` of them, and classes that the code names.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable
from typing import Final

from prometheus_client import CollectorRegistry, Gauge

from cluster.disk_reports import KeptReport
from cluster.status import CellStatus
from cluster.topology import NodeState
from cluster.verify.canaries import CanaryState
from cluster.verify.differences import STRAYS, Difference

NODES_LABELLED_MAX: Final = 200
"""Nodes with series of their own, first by name: a scrape of more would hold up a gateway's event
loop.  The status has them all."""

_Value = Callable[[KeptReport], float]

_OF_NODES: Final[tuple[tuple[str, str, _Value], ...]] = (
    ("report_timestamp_seconds", "When it last told of its disk.", lambda told: told.at),
    ("capacity_bytes", "That it may fill.", lambda told: told.space.capacity_bytes),
    (
        "used_bytes",
        "Of its capacity, deleted fragments that still take space included.",
        lambda told: told.space.used_bytes,
    ),
    ("scrub_running", "1 while it reads its own fragments.", lambda told: told.scrub.running),
    ("scrub_paused", "1 while its scrub is paused.", lambda told: told.scrub.paused),
    ("scrub_done_bytes", "Read by its present or last pass.", lambda told: told.scrub.bytes_done),
    ("scrub_pass_bytes", "Held when that pass began.", lambda told: told.scrub.bytes_total),
    (
        "scrub_started_timestamp_seconds",
        "When that pass began; 0: none has.",
        lambda told: told.scrub.started,
    ),
    (
        "scrub_ended_timestamp_seconds",
        "When its last full pass ended; 0: none has.",
        lambda told: told.scrub.ended,
    ),
    ("scrub_findings", "Fragments that it has set aside.", lambda told: told.scrub.findings),
    (
        "index_damaged",
        "1 if a part of its index cannot be read.",
        lambda told: told.scrub.index_damaged,
    ),
)


class UpkeepMetrics:
    """Gauges; all are zero until the first snapshot."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
            return Gauge(f"haversack_{name}", text, labels, registry=registry)

        self._of_nodes = [
            (gauge(f"node_{name}", text, ("node",)), value) for name, text, value in _OF_NODES
        ]
        self._free = gauge(
            "node_free_bytes",
            "What it still takes, by who asks: placement of new volumes, clients, repair.",
            ("node", "purpose"),
        )
        self._verifying = gauge("verify_running", "1 while the verifier is in a pass.")
        self._blocks = gauge("verify_done_blocks", "Blocks that the newest pass looked at.")
        self._blocks_total = gauge("verify_pass_blocks", "Blocks when that pass began.")
        self._differences = gauge(
            "verify_differences",
            "What the last pass of the verifier that ended found, by class.",
            ("difference",),
        )
        self._unlooked = gauge(
            "verify_unlooked_slots", "Fragments that pass knows nothing of: their node was silent."
        )
        self._strays = gauge("strays", "Fragments in no block's slot, by class.", ("difference",))
        self._stray_bytes = gauge("stray_bytes", "Their bytes.", ("difference",))
        self._stray_age = gauge(
            "stray_oldest_age_seconds", "Age of the oldest; 0: none.", ("difference",)
        )
        self._canaries = gauge("canaries", "Blocks damaged on purpose, by state.", ("state",))
        self._unnoticed = gauge(
            "canaries_unnoticed", "Whose damage nobody reported in time: alarms."
        )
        self._notice = gauge(
            "canary_notice_seconds", "How long the slowest canary's last damage went unnoticed."
        )
        self._watched = gauge("watched_blocks", "Acknowledged blocks that will be read again.")
        self._late = gauge("watch_late_seconds", "How late the most overdue of those reads is.")

    def set_snapshot(self, status: CellStatus, now: float) -> None:
        """`now` is the wall clock."""
        self._set_nodes(status)
        self._set_verification(status, now)
        canaries = status.canaries
        states = Tally(canary["state"] for canary in canaries)
        for state in CanaryState:
            self._canaries.labels(state.value).set(states[state.value])
        self._unnoticed.set(sum(bool(canary["alarmed"]) for canary in canaries))
        self._notice.set(max((canary["latest_s"] for canary in canaries), default=0.0))
        self._watched.set(status.watcher["blocks"])
        self._late.set(status.watcher["late_s"])

    def _set_nodes(self, status: CellStatus) -> None:
        shown = [
            (str(node.node_id), status.disks[node.node_id])
            for node in status.nodes
            if node.state is not NodeState.GONE and node.node_id in status.disks
        ][:NODES_LABELLED_MAX]
        for made, value in self._of_nodes:
            made.clear()  # a node that is gone has no series
            for name, told in shown:
                made.labels(name).set(value(told))
        self._free.clear()
        for name, told in shown:
            self._free.labels(name, "placement").set(told.space.placement_free_bytes)
            self._free.labels(name, "clients").set(told.space.client_free_bytes)
            self._free.labels(name, "repair").set(told.space.repair_free_bytes)

    def _set_verification(self, status: CellStatus, now: float) -> None:
        found = status.verification
        current, finished, strays = found["current"], found["finished"] or {}, found["strays"]
        self._verifying.set(current is not None and current["ended"] is None)
        self._blocks.set(current["blocks"] if current else 0)
        self._blocks_total.set(current["blocks_total"] if current else 0)
        self._unlooked.set(finished.get("unlooked_slots", 0))
        counted = finished.get("differences", {})
        for kind in Difference:
            count = counted.get(kind.value, {}).get("count", 0)
            self._differences.labels(kind.value).set(count)
        for kind in STRAYS:
            total = strays.get(kind.value, {"fragments": 0, "bytes": 0, "oldest": now})
            self._strays.labels(kind.value).set(total["fragments"])
            self._stray_bytes.labels(kind.value).set(total["bytes"])
            self._stray_age.labels(kind.value).set(max(0.0, now - total["oldest"]))
