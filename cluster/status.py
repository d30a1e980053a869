"""What an operator sees of a cell: the data behind `GET /v1/admin/status` and `/metrics`.

Called by `api` in a gateway, which needs no placement service for it.  Reads `cell.db` only, in one
snapshot.  What each part costs:

| part                       | grows with                                            |
|----------------------------|-------------------------------------------------------|
| nodes, jobs, disks         | their rows                                            |
| volumes, blocks, bytes     | volume rows, each read once                           |
| by spare fragments         | volume rows, slots of nodes that are away, debts      |
| oldest debt, unrepairable  | debts, unrepairable blocks                            |
| alarms                     | the table of events, which is bounded                 |
| verification, watcher      | strays and watched blocks, whose tables are bounded   |

Nothing grows with blocks that are whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, func, select

from cluster import map_rows
from cluster.alarms import Alarm, alarms_of, read_raised
from cluster.block_index import Totals, read_totals
from cluster.change.jobs import UNFINISHED, Job, job_json, read_jobs
from cluster.disk_reports import KeptReport, read_disk_reports
from cluster.redundancy import Redundancy, read_redundancy, volumes_by_spare
from cluster.repair.failing import read_failing
from cluster.repair.repair_rows import PASS_KIND
from cluster.schema import cell, volumes
from cluster.topology import NodeView, VolumeState
from cluster.verify.canaries import canaries_of
from cluster.verify.pass_rows import CELL, read_pass, verification_of
from cluster.verify.watch_rows import watching_of
from erasure.scheme import Scheme
from protocol.errors import ConfigInvalid
from protocol.ids import NodeId
from sql.database import Database

JOBS_SHOWN: Final = 20
BLOCKERS_SHOWN: Final = 3
"""Of each job; `haversack jobs` shows them all."""


@dataclass(frozen=True, slots=True)
class CellStatus:
    """One snapshot of a cell."""

    cluster_id: str
    scheme: Scheme
    map_version: int
    nodes: tuple[NodeView, ...]
    open_volumes: int
    sealed_volumes: int
    spare: dict[int, int]
    """Volumes by how many more fragments they could lose: -1 and below is unreadable now.  A slot
    is lost while it is vacant, its node does not serve, or any block has a debt in it."""
    totals: Totals
    redundancy: Redundancy
    disks: dict[NodeId, KeptReport]
    """What nodes last told of space and scrub; a node that never did is not in it."""
    repair: dict[str, Any] | None
    """What repair noted of itself last: `repair.service.Counters`."""
    verification: dict[str, Any]
    """`verify.pass_rows.verification_of`."""
    watcher: dict[str, Any]
    """`verify.watch_rows.watching_of`."""
    canaries: tuple[dict[str, Any], ...]
    """Bodies of `verify.canaries.Canary`."""
    jobs: tuple[Job, ...]
    """Not ended, newest first."""
    alarms: tuple[Alarm, ...]

    def to_json(self) -> dict[str, Any]:
        """The answer of the API, except for what only the API knows."""
        return {
            "cluster_id": self.cluster_id,
            "scheme": self.scheme.name,
            "map_version": self.map_version,
            "nodes": [self._node_json(node) for node in self.nodes],
            "volumes": {
                "open": self.open_volumes,
                "sealed": self.sealed_volumes,
                "by_spare": {str(spare): self.spare[spare] for spare in sorted(self.spare)},
            },
            "blocks": self.totals.blocks,
            "logical_bytes": self.totals.plain_bytes,
            "stored_bytes": self.totals.stored_bytes,
            "fragment_bytes": sum(node.used_bytes for node in self.nodes),
            "debts": self.redundancy.debts,
            "redundancy": self.redundancy.to_json(),
            "repair": self.repair,
            "verification": self.verification,
            "watcher": self.watcher,
            "canaries": list(self.canaries),
            "jobs": [_job_json(job) for job in self.jobs],
            "alarms": [alarm.to_json() for alarm in self.alarms],
        }

    def _node_json(self, node: NodeView) -> dict[str, Any]:
        told = self.disks.get(node.node_id)
        return {**node_json(node), "disk": None if told is None else told.to_json()}


async def read_status(db: Database, now: float) -> CellStatus:
    """A snapshot; `now` is the wall clock.  Raises `ConfigInvalid` without a cell,
    `DatabaseBusy`."""
    return await db.read(lambda connection: status_of(connection, now))


def status_of(connection: Connection, now: float) -> CellStatus:
    """`read_status` on a connection."""
    row = connection.execute(select(cell.c.cluster_id, cell.c.scheme)).one_or_none()
    if row is None:
        raise ConfigInvalid("this database holds no cell yet")
    nodes = map_rows.read_nodes(connection)
    by_state = select(volumes.c.state, func.count()).group_by(volumes.c.state)
    counts: dict[str, int] = {row[0]: row[1] for row in connection.execute(by_state)}
    redundancy = read_redundancy(connection, nodes)
    jobs = tuple(read_jobs(connection, UNFINISHED, JOBS_SHOWN))
    repair = read_pass(connection, PASS_KIND, CELL)
    return CellStatus(
        cluster_id=row.cluster_id,
        scheme=Scheme.parse(row.scheme),
        map_version=map_rows.read_version(connection),
        nodes=tuple(nodes),
        open_volumes=counts.get(VolumeState.OPEN.value, 0),
        sealed_volumes=counts.get(VolumeState.SEALED.value, 0),
        spare=volumes_by_spare(connection, nodes),
        totals=read_totals(connection),
        redundancy=redundancy,
        disks=read_disk_reports(connection),
        repair=None if repair is None else repair.to_json(),
        verification=verification_of(connection),
        watcher=watching_of(connection, now),
        canaries=tuple(canaries_of(connection)),
        jobs=jobs,
        alarms=alarms_of(
            nodes, redundancy, jobs, read_raised(connection), now, read_failing(connection)
        ),
    )


def _job_json(job: Job) -> dict[str, Any]:
    shown = job_json(job)
    blockers = shown["blockers"]
    return {**shown, "blockers": blockers[:BLOCKERS_SHOWN], "blockers_total": len(blockers)}


def node_json(node: NodeView) -> dict[str, Any]:
    """A node's row, for people."""
    return {
        "id": str(node.node_id),
        "state": str(node.state),
        "since": node.state_since,
        "pid": node.pid,
        "endpoint": node.endpoint,
        "directory": node.directory,
        "host": node.host,
        "rack": node.rack,
        "weight": node.weight,
        "incarnation": node.incarnation,
        "bytes": node.used_bytes,
        "fragments": node.fragments,
        "capacity_bytes": node.capacity_bytes,
        "free_bytes": node.free_bytes,
        "placement_free_bytes": node.placement_free_bytes,
        "disk_failed": node.disk_failed,
        "detail": node.detail,
    }
