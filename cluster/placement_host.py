"""The life of the placement service's process: open the database, lead, try again, stop.

Held by its Ray shell (`cluster/actor.py`).  Everything around `PlacementService` that deals with
real files, sockets and the clock; imports no Ray.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable
from pathlib import Path

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


class PlacementHost:
    """One event loop, one service, one database."""

    def __init__(self, data: Path) -> None:
        """`data`: directory of the cell."""
        self._data = data
        self._service: PlacementService | None = None
        self._database: Database | None = None

    async def run(self) -> None:
        """Lead for ever, whatever happens to the settings or the database."""
        while True:
            try:
                settings = load(data=self._data)
                open_log(self._data / "logs" / "placement.log")
                await self._lead(settings)
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

    async def register(self, registration: NodeRegistration) -> int:
        """A node opened its store: its new incarnation."""
        if self._service is None:
            raise NodeRefuses("the placement service is starting: register again")
        return await self._service.register(registration)

    async def stop(self) -> None:
        """Give up the role in order."""
        if self._service is not None:
            await self._service.stop()
        if self._database is not None:
            await self._database.aclose()

    async def _lead(self, settings: Settings) -> None:
        if self._database is None:
            self._database = Database(sqlite_url(settings.cell_database))
        service = PlacementService(
            self._database,
            SystemClock(),
            random.Random(os.urandom(16)),
            socket_ports(self._database, settings),
            placement_settings(settings),
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


def socket_ports(database: Database, settings: Settings) -> Callable[[NodeView], NodePort]:
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
