"""Prometheus metrics of one gateway: requests, blocks, the cell as this gateway sees it.

Written by `gate.Gate` and the block routes for every request, so the paths here are cheap:
children of labelled metrics are looked up once and kept.  Labels hold route templates, never
paths, so that their number is bounded by the code and not by callers.
"""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import generate_latest

from api.cell_metrics import CellMetrics
from cluster.block_client_settings import FragmentProblem, PutResult
from protocol.errors import HaversackError

LATENCY_BUCKETS_S: Final = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
)  # fmt: skip
NO_ROUTE: Final = "none"
"""Label of requests that found no route."""


class HttpMetrics:
    """Requests by route and status."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "haversack_http_requests",
            "Requests answered, by route template.",
            ("method", "route", "status"),
            registry=registry,
        )
        self._seconds = Histogram(
            "haversack_http_request_seconds",
            "From the end of the header to the end of the answer.",
            ("method", "route"),
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self._received = Counter(
            "haversack_http_received_bytes", "Request bodies, as declared.", registry=registry
        )
        self._sent = Counter("haversack_http_sent_bytes", "Answer bodies.", registry=registry)
        self._refused = Counter(
            "haversack_http_refused",
            "Connections answered before there was a request, by error kind.",
            ("kind",),
            registry=registry,
        )
        self.active = Gauge("haversack_http_active", "Requests worked on now.", registry=registry)
        self.queued = Gauge(
            "haversack_http_queued", "Requests waiting for a turn.", registry=registry
        )
        self._by_status: dict[tuple[str, str, int], Counter] = {}
        self._by_route: dict[tuple[str, str], Histogram] = {}

    def answered(
        self, method: str, route: str, status: int, seconds: float, received: int, sent: int
    ) -> None:
        """Count one request.  `method` and `route` are of the route table."""
        key = (method, route, status)
        counter = self._by_status.get(key)
        if counter is None:
            counter = self._by_status[key] = self._requests.labels(method, route, str(status))
        counter.inc()
        histogram = self._by_route.get((method, route))
        if histogram is None:
            histogram = self._by_route[method, route] = self._seconds.labels(method, route)
        histogram.observe(seconds)
        if received:
            self._received.inc(received)
        if sent:
            self._sent.inc(sent)

    def refused(self, error: HaversackError) -> None:
        """Count a connection that never became a request (`http_listener.Listener`)."""
        self._refused.labels(error.kind).inc()


class BlockMetrics:
    """What became of blocks."""

    def __init__(self, registry: CollectorRegistry) -> None:
        puts = Counter(
            "haversack_block_puts", "Blocks put, by outcome.", ("outcome",), registry=registry
        )
        self._new = puts.labels("new")
        self._known = puts.labels("known")
        self._failed = puts.labels("failed")
        self._put_bytes = Counter(
            "haversack_block_put_bytes", "Plain bytes of blocks that were new.", registry=registry
        )
        self._degraded = Counter(
            "haversack_block_puts_degraded",
            "Blocks stored with fragments still owed.",
            registry=registry,
        )
        self._gets = Counter("haversack_block_gets", "Blocks read.", registry=registry)
        self._get_bytes = Counter(
            "haversack_block_get_bytes", "Plain bytes of blocks read.", registry=registry
        )
        self._problems = Counter(
            "haversack_fragment_problems",
            "Fragments that a read could not use, by what was wrong.",
            ("problem",),
            registry=registry,
        )

    def put(self, result: PutResult | HaversackError, length: int) -> None:
        """Count one block that was sent to us."""
        if isinstance(result, HaversackError):
            self._failed.inc()
        elif not result.new:
            self._known.inc()
        else:
            self._new.inc()
            self._put_bytes.inc(length)
            if result.degraded:
                self._degraded.inc()

    def got(self, length: int, blocks: int = 1) -> None:
        """Count blocks that were read."""
        self._gets.inc(blocks)
        self._get_bytes.inc(length)

    def problem(self, problem: FragmentProblem) -> None:
        """Count a fragment that was missing, wrong or unreadable (`ReportFragment`)."""
        self._problems.labels(problem.kind.value).inc()


class WatchMetrics:
    """What this gateway's watcher read again."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._looks = Counter(
            "haversack_watch_looks",
            "Acknowledged blocks read again through the API, by outcome.",
            ("outcome",),
            registry=registry,
        )

    def looked(self, outcome: str) -> None:
        """Count one look."""
        self._looks.labels(outcome).inc()


class Metrics:
    """All metrics of one gateway, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.http = HttpMetrics(self.registry)
        self.blocks = BlockMetrics(self.registry)
        self.cell = CellMetrics(self.registry)
        self.watch = WatchMetrics(self.registry)

    def expose(self) -> bytes:
        """The text format, version 0.0.4."""
        return generate_latest(self.registry)


CONTENT_TYPE: Final = b"text/plain; version=0.0.4; charset=utf-8"
