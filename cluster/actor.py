"""Ray shell of the placement service.  Every method is one call of the core.

Created by the controller under a fixed name; storage-node actors register through it.  Ray runs
`__init__` again after a death, so that taking the role over is the ordinary start.  It never
raises there: Ray would take that for a death for good.
"""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path
from typing import Any

import ray
import structlog

from cluster.cell import open_cell
from cluster.placement_service import PlacementService
from cluster.placement_settings import PlacementSettings
from cluster.topology import NodeView
from protocol.allocator import release_free_memory
from protocol.clock import SystemClock
from protocol.config import Settings, load
from protocol.errors import ConfigInvalid, HaversackError, NodeRefuses, NotLeader
from protocol.logs import open_log
from sql.database import Database
from sql.engine import sqlite_url
from storage_node.interface import NodePort, NodeRegistration
from storage_node.port_client import SocketPort

log = structlog.get_logger()

RETRY_S = 1.0
"""Pause before the service is started again after a failure."""


class PlacementActor:
    """One event loop, one service, one database."""

    def __init__(self, data: str) -> None:
        """`data`: directory of the cell."""
        self._settings = load(data=Path(data))
        self._service: PlacementService | None = None
        self._database: Database | None = None
        open_log(Path(data) / "logs" / "placement.log")
        self._task = asyncio.get_running_loop().create_task(self._lead_for_ever())

    async def register(self, registration: NodeRegistration) -> int:
        """A node opened its store: its new incarnation."""
        if self._service is None:
            raise NodeRefuses("the placement service is starting: register again")
        return await self._service.register(registration)

    async def stop(self) -> None:
        """Give up the role in order."""
        self._task.cancel()
        if self._service is not None:
            await self._service.stop()
        if self._database is not None:
            await self._database.aclose()

    async def _lead_for_ever(self) -> None:
        while True:
            try:
                await self._lead()
            except NotLeader:
                # Ray started a second copy while this one was cut off or frozen; the newer one
                # leads.  Taking the role back would only make the two take turns.
                self._service = None
                log.error("a newer placement service leads this cell: this one stays idle")
                return
            except HaversackError as error:
                log.error("placement failed", kind=error.kind, error=error.message)
            except Exception:
                log.exception("placement failed")
            await asyncio.sleep(RETRY_S)

    async def _lead(self) -> None:
        if self._database is None:
            self._database = Database(sqlite_url(self._settings.cell_database))
        service = PlacementService(
            self._database,
            SystemClock(),
            random.Random(os.urandom(16)),
            _socket_ports(self._database, self._settings),
            placement_settings(self._settings),
            holder=f"pid {os.getpid()}",
        )
        await service.start()
        self._service = service
        asyncio.get_running_loop().call_soon(release_free_memory)
        await service.run()


def placement_settings(settings: Settings) -> PlacementSettings:
    """What an operator may set of the service's times and amounts."""
    return PlacementSettings(
        lease_s=settings.lease_s,
        lease_interval_s=settings.health_interval_s,
        call_deadline_s=settings.health_deadline_s,
        down_after_s=settings.node_down_after_s,
        open_volumes=settings.open_volumes,
    )


def _socket_ports(database: Database, settings: Settings) -> Any:
    """Connections to data ports, as the cell's member."""
    cell = open_cell(database)
    if cell is None:
        raise ConfigInvalid(f"{settings.cell_database} holds no cell yet: prepare it first")
    cluster_id = cell.cluster_id
    secret = bytes.fromhex((settings.data / "cluster.secret").read_text(encoding="ascii").strip())
    clock = SystemClock()

    def connect(node: NodeView) -> NodePort:
        return SocketPort(node.node_id, node.endpoint, cluster_id, secret, clock)

    return connect


def remote_placement() -> Any:
    """The actor class: restarted for ever, never retried by Ray, no share of a core reserved."""
    remote: Any = ray.remote
    return remote(
        num_cpus=0,
        max_restarts=-1,
        max_task_retries=0,
        max_concurrency=1000,
        lifetime=None,
    )(PlacementActor)
