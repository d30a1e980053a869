"""Findings of the nodes' own scrubs become debts at once, so that repair mends them.

Runs beside the verifier, under the role `repair`.  A node keeps a finding until its record was
replaced, so nothing is lost if this process is away, and looking again changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import structlog

from cluster import map_rows
from cluster.node_watch import Ports
from cluster.topology import SERVES_READS, NodeView
from cluster.verify.confirm import record_findings
from cluster.verify.differences import Finding
from cluster.verify.index_scan import read_truth
from cluster.verify.lead import Lead
from cluster.verify.node_ports import NodePorts
from cluster.verify.settings import VerifierSettings
from cluster.verify.stripe_judgement import difference_of
from protocol.clock import Clock
from protocol.errors import HaversackError, NotLeader, RetryLater, UnknownOutcome
from protocol.messages import ItemStatus
from sql.database import Database
from storage_node.interface import FragmentKey

log = structlog.get_logger()


class FindingsCollector:
    """One per cell.  One event loop; no threads of its own."""

    def __init__(
        self,
        db: Database,
        clock: Clock,
        ports: Ports,
        epoch: Callable[[], int],
        settings: VerifierSettings | None = None,
    ) -> None:
        """As `VerifierService`."""
        self._settings = settings or VerifierSettings()
        self._clock = clock
        self._lead = Lead(db, epoch)
        self._ports = NodePorts(ports, clock, self._settings)
        self._stopped = False

    async def run(self) -> None:
        """Collect until `stop`.  Raises `NotLeader` when another process has taken the role."""
        try:
            while not self._stopped:
                try:
                    if self._lead.has_role:
                        await self.step()
                except NotLeader:
                    raise
                except (RetryLater, UnknownOutcome) as error:
                    log.warning("findings were not collected", error=error.message)
                await self._clock.sleep(self._settings.findings_s)
        finally:
            await self._ports.aclose()

    async def stop(self) -> None:
        """End `run` after its round.  Idempotent."""
        self._stopped = True

    async def step(self) -> int:
        """Ask every node once; returns how many debts are new.  Raises `NotLeader`,
        `DatabaseBusy`, `UnknownOutcome`; a node that does not answer is asked next time."""
        nodes = await self._lead.db.read(map_rows.read_nodes)
        await self._ports.adopt(nodes)
        return sum([await self._collect(node) for node in nodes if node.state in SERVES_READS])

    async def _collect(self, node: NodeView) -> int:
        after: FragmentKey | None = None
        new = 0
        while True:
            try:
                page = await self._ports.findings(node.node_id, after)
            except HaversackError as error:
                log.info("no findings heard", node=str(node.node_id), error=error.message)
                return new
            keys = [FragmentKey.unpack(key) for key in page.keys]
            new += await self._record(node, keys, page.statuses)
            if not page.more or not keys:
                return new
            after = keys[-1]

    async def _record(
        self, node: NodeView, keys: Sequence[FragmentKey], statuses: Sequence[int]
    ) -> int:
        truth = await self._lead.db.read(partial(read_truth, keys=keys))
        found = []
        for key, status in zip(keys, statuses, strict=True):
            difference = difference_of(ItemStatus(status))
            in_slot = truth.holder(key) == node.node_id
            if difference is not None and in_slot and key not in truth.owed:
                found.append(Finding(difference, key, node.node_id))
        kept = await record_findings(self._lead, self._clock.wall(), found, truth, "scrub")
        return len(kept)
