"""Where a gateway takes changes in: nodes to add or weigh, jobs to create, show and steer.

Called by `api.change_routes`, held by `api.services`.  Joins `requests` and `members` with a
database, a clock and the data directory; answers are JSON-ready.  May not import Ray.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, func, select

from cluster import map_rows, members
from cluster.change import requests
from cluster.change.jobs import JobEvent, JobId, JobState, job_json, read_job, read_jobs
from cluster.change.plans import plan_json
from cluster.change.requests import ChangeRequest
from cluster.schema import volume_slots
from cluster.topology import NodeView
from protocol.clock import Clock
from protocol.ids import NodeId
from sql.database import Database
from storage_node.node_config import NodeUpkeep

Run = Callable[..., Awaitable[Any]]
"""`await run(function, *args)`: calls a function that blocks, off the event loop."""


class ChangeDesk:
    """One per gateway.  All methods may raise `DatabaseBusy`."""

    def __init__(
        self,
        db: Database,
        clock: Clock,
        run: Run,
        data: Path,
        node_capacity_bytes: int | None,
        upkeep: NodeUpkeep,
    ) -> None:
        self._db = db
        self._clock = clock
        self._run = run
        self._data = data
        self._node_capacity_bytes = node_capacity_bytes
        self._upkeep = upkeep

    # -- nodes -----------------------------------------------------------------------------------

    async def nodes(self) -> list[dict[str, Any]]:
        """All nodes, the gone ones too, with the number of their slots."""

        def work(connection: Connection) -> list[dict[str, Any]]:
            counts = select(volume_slots.c.node_id, func.count()).group_by(volume_slots.c.node_id)
            slots: dict[str, int] = {row[0]: row[1] for row in connection.execute(counts)}
            return [
                _node_json(view, slots.get(str(view.node_id), 0))
                for view in map_rows.read_nodes(connection)
            ]

        return await self._db.read(work)

    async def add_node(
        self, directory: Path, host: str, rack: str, weight: float
    ) -> dict[str, Any]:
        """Format a directory, add its node, tell the controller.  Raises what `members.add_node`
        raises."""

        def work() -> NodeView:
            view = members.add_node(self._db, self._clock, directory, host, rack, weight)
            members.write_controller_plan(
                self._db, self._data, self._node_capacity_bytes, self._upkeep
            )
            return view

        view = await self._run(work)
        return _node_json(view, 0)

    async def set_weight(self, node_id: NodeId, weight: float) -> dict[str, Any]:
        """Raises `NodeNotFound`."""

        def work(connection: Connection) -> dict[str, Any]:
            members.set_weight(connection, node_id, weight)
            return _one_node(connection, node_id)

        return await self._db.write(work)

    async def undrain(self, node_id: NodeId) -> dict[str, Any]:
        """End a node's drain.  Raises `NodeNotFound`, `WrongState`."""
        now = self._clock.wall()

        def work(connection: Connection) -> dict[str, Any]:
            requests.undrain(connection, node_id, now)
            return _one_node(connection, node_id)

        return await self._db.write(work)

    # -- jobs ------------------------------------------------------------------------------------

    async def preview(self, request: ChangeRequest) -> dict[str, Any]:
        """The plan, and nothing done.  Raises `NodeNotFound`, `WrongState`."""
        plan = await self._db.read(lambda connection: requests.preview(connection, request))
        return {"kind": str(request.kind), "subject": request.subject, "plan": plan_json(plan)}

    async def submit(self, request: ChangeRequest) -> dict[str, Any]:
        """A new job.  Raises `NodeNotFound`, `WrongState`."""
        now = self._clock.wall()
        job = await self._db.write(lambda connection: requests.submit(connection, request, now))
        return job_json(job)

    async def jobs(self, limit: int) -> list[dict[str, Any]]:
        """The last jobs, newest first."""
        found = await self._db.read(
            lambda connection: read_jobs(connection, tuple(JobState), limit)
        )
        return [job_json(job) for job in found]

    async def job(self, job_id: JobId) -> dict[str, Any]:
        """Raises `JobNotFound`."""
        return job_json(await self._db.read(lambda connection: read_job(connection, job_id)))

    async def act(self, job_id: JobId, event: JobEvent) -> dict[str, Any]:
        """Pause, resume or cancel.  Raises `JobNotFound`, `WrongState`."""
        now = self._clock.wall()
        job = await self._db.write(lambda connection: requests.act(connection, job_id, event, now))
        return job_json(job)


def _one_node(connection: Connection, node_id: NodeId) -> dict[str, Any]:
    view = members.get_node(connection, node_id)
    return _node_json(view, members.references(connection, node_id))


def _node_json(view: NodeView, slots: int) -> dict[str, Any]:
    return {
        "id": str(view.node_id),
        "state": str(view.state),
        "since": view.state_since,
        "directory": view.directory,
        "host": view.host,
        "rack": view.rack,
        "weight": view.weight,
        "slots": slots,
        "bytes": view.used_bytes,
        "fragments": view.fragments,
        "capacity_bytes": view.capacity_bytes,
        "free_bytes": view.free_bytes,
        "detail": view.detail,
    }
