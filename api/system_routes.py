"""`/healthz`, `/readyz`, `/metrics`, `/openapi.json` and `/v1/admin/status`.

For probes, Prometheus and operators.  The first three need no token and no turn, so that a gateway
that is busy to its limit can still say so.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

from pydantic import BaseModel

from api.answers import NO_STORE, NOSNIFF, Answer, json_answer
from api.call import Access, Call
from api.metrics import CONTENT_TYPE, Metrics
from api.readiness import Readiness
from api.routing import Route
from api.turns import Turns
from cluster.status import CellStatus
from cluster.volume_map import VolumeMap
from protocol.clock import Clock
from protocol.errors import HaversackError

TOTALS_AGE_S: Final = 5.0
"""Metrics ask the database for sums at most this often, however often they are scraped."""

TOTALS_SHARE: Final = 0.05
"""Of a reader's time that these sums may take: a cell of a million volumes asks more seldom."""


class HealthAnswer(BaseModel):
    """The process runs."""

    alive: bool


class ReadyAnswer(BaseModel):
    """What works, and what is missing."""

    ready: bool
    reads: bool
    writes: bool
    whole: bool
    sql: dict[str, str]
    nodes: dict[str, int]
    needs: dict[str, int]


class DiskStatus(BaseModel):
    """What a node last told of its disk, and when: `SpaceReport` and `ScrubProgress`."""

    reported: float
    space: dict[str, int]
    scrub: dict[str, Any]


class NodeStatus(BaseModel):
    """One storage node."""

    id: str
    state: str
    since: float
    pid: int
    endpoint: str
    directory: str
    host: str
    rack: str
    weight: float
    incarnation: int
    bytes: int
    fragments: int
    capacity_bytes: int
    free_bytes: int
    detail: str
    disk: DiskStatus | None


class VolumeStatus(BaseModel):
    """Volumes, and how many could lose so many more fragments."""

    open: int
    sealed: int
    by_spare: dict[str, int]


class RedundancyStatus(BaseModel):
    """Blocks by the fragments they could still lose, and what is owed."""

    blocks_by_spare: dict[str, int]
    debts: int
    oldest_debt: float | None
    unrepairable: int
    moves: int


class AlarmStatus(BaseModel):
    """What an operator has to know of without asking."""

    kind: str
    subject: str
    text: str
    since: float | None


class StatusAnswer(BaseModel):
    """The cell."""

    cluster_id: str
    scheme: str
    version: str
    map_version: int
    nodes: list[NodeStatus]
    volumes: VolumeStatus
    blocks: int
    logical_bytes: int
    stored_bytes: int
    fragment_bytes: int
    debts: int
    redundancy: RedundancyStatus
    repair: dict[str, Any] | None
    verification: dict[str, Any]
    watcher: dict[str, Any]
    canaries: list[dict[str, Any]]
    jobs: list[dict[str, Any]]
    alarms: list[AlarmStatus]


class SystemRoutes:
    """Endpoints about the gateway and the cell."""

    def __init__(
        self,
        *,
        status: Callable[[], Awaitable[dict[str, Any]]],
        snapshot: Callable[[], Awaitable[CellStatus]],
        readiness: Callable[[], Awaitable[Readiness]],
        document: Callable[[], dict[str, Any]],
        volume_map: VolumeMap,
        turns: Turns,
        metrics: Metrics,
        clock: Clock,
    ) -> None:
        self._status = status
        self._readiness = readiness
        self._document = document
        self._snapshot = snapshot
        self._map = volume_map
        self._turns = turns
        self._metrics = metrics
        self._clock = clock
        self._totals_due = float("-inf")

    def routes(self) -> list[Route]:
        """What this class serves."""
        return [
            Route(
                "GET",
                "/healthz",
                self.health,
                access=Access.PUBLIC,
                responses={200: {"model": HealthAnswer, "description": "It runs."}},
            ),
            Route(
                "GET",
                "/readyz",
                self.ready,
                access=Access.PUBLIC,
                responses={
                    200: {"model": ReadyAnswer, "description": "Send traffic."},
                    503: {"model": ReadyAnswer, "description": "Not yet, or not any more."},
                },
            ),
            Route(
                "GET",
                "/metrics",
                self.metrics,
                access=Access.PUBLIC,
                responses={
                    200: {
                        "description": "Prometheus text format.",
                        "content": {"text/plain": {"schema": {"type": "string"}}},
                    }
                },
            ),
            Route(
                "GET",
                "/openapi.json",
                self.openapi,
                responses={
                    200: {
                        "description": "This document.",
                        "content": {"application/json": {"schema": {"type": "object"}}},
                    }
                },
            ),
            Route(
                "GET",
                "/v1/admin/status",
                self.status,
                access=Access.ADMIN,
                responses={200: {"model": StatusAnswer, "description": "The cell."}},
                problems=("forbidden",),
            ),
        ]

    async def health(self, call: Call) -> Answer:
        """The process is alive: asks nothing of anybody."""
        del call
        return json_answer({"alive": True})

    async def ready(self, call: Call) -> Answer:
        """Whether this gateway can serve."""
        del call
        ready, details = await self._readiness()
        return json_answer(details, 200 if ready else 503)

    async def metrics(self, call: Call) -> Answer:
        """Prometheus metrics."""
        del call
        self._metrics.http.active.set(self._turns.active)
        self._metrics.http.queued.set(self._turns.queued)
        cell = self._metrics.cell
        cell.set_nodes(self._map.nodes())
        began = self._clock.monotonic()
        if began >= self._totals_due:
            self._totals_due = began + TOTALS_AGE_S
            try:
                snapshot = await self._snapshot()
            except HaversackError:
                cell.sql_up.set(0)
            else:
                cell.sql_up.set(1)
                cell.set_snapshot(snapshot, self._clock.wall())
                took = self._clock.monotonic() - began
                self._totals_due = began + max(TOTALS_AGE_S, took / TOTALS_SHARE)
        headers = ((b"content-type", CONTENT_TYPE), NO_STORE, NOSNIFF)
        return Answer(200, headers, (self._metrics.expose(),))

    async def openapi(self, call: Call) -> Answer:
        """The description of this API."""
        del call
        return json_answer(self._document())

    async def status(self, call: Call) -> Answer:
        """Nodes, volumes by redundancy, blocks and bytes."""
        del call
        return json_answer(await self._status())
