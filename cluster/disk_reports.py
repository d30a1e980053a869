"""What each node last said of its disk: space by who asks, and how far it has read its fragments.

Written by the placement service, which asks every node for a summary anyway; read by `status` in
gateways, so that neither a scrape of metrics nor a look at the status costs the nodes anything.
Functions over a connection; no clock, no event loop, no Ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import Connection, bindparam, delete, insert, select

from cluster.schema import disk_reports
from protocol.ids import NodeId
from protocol.messages import ScrubProgress, SpaceReport


class DiskReport(NamedTuple):
    """One node's words."""

    node_id: NodeId
    space: SpaceReport
    scrub: ScrubProgress

    def differs_in_kind(self, other: DiskReport) -> bool:
        """Whether more changed than how much is done or free."""
        return _kind(self.scrub) != _kind(other.scrub)


class KeptReport(NamedTuple):
    """A report, and when it was written down, wall-clock seconds."""

    at: float
    space: SpaceReport
    scrub: ScrubProgress

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "reported": self.at,
            "space": msgspec.structs.asdict(self.space),
            "scrub": msgspec.structs.asdict(self.scrub),
        }


def save_disk_reports(connection: Connection, reports: Sequence[DiskReport], now: float) -> None:
    """Keep the newest report of each of these nodes."""
    if not reports:
        return
    connection.execute(
        delete(disk_reports).where(disk_reports.c.node_id == bindparam("of")),
        [{"of": str(report.node_id)} for report in reports],
    )
    rows = [
        {
            "node_id": str(report.node_id),
            "at": now,
            "space": _pack(report.space),
            "scrub": _pack(report.scrub),
        }
        for report in reports
    ]
    connection.execute(insert(disk_reports), rows)


def read_disk_reports(connection: Connection) -> dict[NodeId, KeptReport]:
    """Of all nodes that ever reported, those that are gone included."""
    return {
        NodeId(row.node_id): KeptReport(
            row.at,
            msgspec.json.decode(row.space, type=SpaceReport),
            msgspec.json.decode(row.scrub, type=ScrubProgress),
        )
        for row in connection.execute(select(disk_reports))
    }


def _kind(scrub: ScrubProgress) -> tuple[Any, ...]:
    return (
        scrub.pass_number,
        scrub.running,
        scrub.paused,
        scrub.findings,
        scrub.ended,
        scrub.index_damaged,
    )


def _pack(said: SpaceReport | ScrubProgress) -> str:
    return msgspec.json.encode(said).decode()
