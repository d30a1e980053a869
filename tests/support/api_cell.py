"""A whole cell behind HTTP in one process: real SQLite files, real data ports, the real placement
service, memory stores.  Runs in the loop of `api_server.serving`; tests talk to it over sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from api_server import Running, serving

from api.app import create_app
from api.http_listener import Patience
from api.services import Services, open_services
from cluster.cell import NodeSpec, create_cell, prepare_schema
from cluster.placement_service import PlacementService
from cluster.placement_settings import PlacementSettings
from cluster.topology import NodeView
from erasure.scheme import Scheme
from metadata.accounts import Accounts
from metadata.schema import MIGRATIONS as METADATA_MIGRATIONS
from protocol.clock import SystemClock
from protocol.config import Settings, load
from protocol.hashing import hash_block
from protocol.ids import NodeId
from protocol.logs import open_log
from sql.database import Database
from sql.engine import sqlite_url
from sql.migrations import upgrade
from storage_node import port_server
from storage_node.identity import Identity
from storage_node.interface import NodePort, NodeRegistration
from storage_node.memory_store import Disk, MemoryStore
from storage_node.node import StorageNode
from storage_node.port_client import SocketPort

open_log(None)
CLUSTER_ID = "cell-of-api-tests"
SECRET = bytes(range(32))
PLACEMENT = PlacementSettings(
    lease_s=4.0,
    lease_interval_s=0.2,
    call_deadline_s=1.0,
    down_after_s=2.0,
    start_grace_s=3.0,
    report_interval_s=0.5,
    review_interval_s=0.5,
    open_volumes=2,
)


@dataclass
class Cell:
    """The parts of a running cell that tests reach into."""

    scheme: Scheme
    directory: Path
    disks: dict[NodeId, Disk] = field(default_factory=dict)
    ports: dict[NodeId, Any] = field(default_factory=dict)
    nodes: dict[NodeId, StorageNode] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    services: Services | None = None
    running: Running | None = None

    def client(self, account: str | None = "admin", **options: Any) -> httpx.Client:
        """A client in the name of an account; None: without a token."""
        assert self.running is not None
        headers = {"Authorization": f"Bearer {self.tokens[account]}"} if account else {}
        return httpx.Client(
            base_url=self.running.url, headers=headers, timeout=30, trust_env=False, **options
        )

    def kill(self, *names: NodeId) -> None:
        """Close the data ports of these nodes: nobody is told."""

        async def close() -> None:
            for name in names:
                await self.ports[name].close()

        assert self.running is not None
        self.running.call(close)

    def fragments(self) -> int:
        """Fragments on all disks."""
        return sum(len(disk.entries) for disk in self.disks.values())


def block_of(seed: int, size: int) -> tuple[str, bytes]:
    """Random bytes and their name."""
    data = random.Random(seed).randbytes(size)
    return str(hash_block(data)), data


@contextlib.contextmanager
def running_cell(
    directory: Path,
    *,
    scheme: str = "rs-6-3",
    nodes: int = 9,
    racks: int = 1,
    patience: Patience | None = None,
    wrap: Callable[[Services], Services] = lambda services: services,
    **settings: Any,
) -> Iterator[Cell]:
    """A cell that is ready, with the accounts `admin`, `alice` and `bob`.

    With several `racks`, nodes are dealt out to them in turn, each on a host of its own.
    """
    cell = Cell(Scheme.parse(scheme), directory)
    _prepare(cell, nodes, racks)
    chosen = load(data=directory, **settings)
    hold = _Hold(cell, chosen, wrap)
    with serving(hold.app, patience) as running:
        cell.running = running
        running.call(hold.wait_ready)
        try:
            yield cell
        finally:
            running.call(hold.close)


def _prepare(cell: Cell, nodes: int, racks: int) -> None:
    directory, clock = cell.directory, SystemClock()
    (directory / "cluster.secret").write_text(SECRET.hex())
    cell_db = Database(sqlite_url(directory / "cell.db"), inline=True)
    prepare_schema(cell_db)
    names = [NodeId.numbered(number + 1) for number in range(nodes)]
    specs = [
        NodeSpec(
            name,
            f"store-{name}",
            str(directory / name),
            "host" if racks == 1 else f"host-{name}",
            "rack" if racks == 1 else f"rack-{number % racks + 1}",
        )
        for number, name in enumerate(names)
    ]
    create_cell(cell_db, clock, CLUSTER_ID, cell.scheme, specs)
    cell_db.close()
    metadata_db = Database(sqlite_url(directory / "metadata.db"), inline=True)
    upgrade(metadata_db, METADATA_MIGRATIONS)
    accounts = Accounts(metadata_db, clock, os.urandom)

    async def people() -> None:
        for name in ("admin", "alice", "bob"):
            account = await accounts.create_account(name, name == "admin")
            cell.tokens[name] = await accounts.issue_token(account, "tests")

    thread = threading.Thread(target=lambda: asyncio.run(people()))
    thread.start()
    thread.join()
    metadata_db.close()
    cell.disks = {name: Disk() for name in names}


class _Hold:
    """Starts and stops what runs in the server's loop."""

    def __init__(
        self, cell: Cell, settings: Settings, wrap: Callable[[Services], Services]
    ) -> None:
        self._cell = cell
        self._settings = settings
        self._wrap = wrap
        self._stack = contextlib.AsyncExitStack()
        self._starting: asyncio.Task[None] | None = None

    def app(self) -> Any:
        """An ASGI application that becomes the real one once the services are open."""
        self._starting = asyncio.get_running_loop().create_task(self._start())

        async def app(scope: Any, receive: Any, send: Any) -> None:
            assert self._starting is not None
            await asyncio.shield(self._starting)
            await self._app(scope, receive, send)

        return app

    async def _start(self) -> None:
        cell, clock = self._cell, SystemClock()
        services = await self._stack.enter_async_context(open_services(self._settings, clock))
        placement_db = Database(sqlite_url(cell.directory / "cell.db"))
        self._stack.push_async_callback(placement_db.aclose)

        def connect(view: NodeView) -> NodePort:
            return SocketPort(view.node_id, view.endpoint, CLUSTER_ID, SECRET, clock)

        placement = PlacementService(placement_db, clock, random.Random(1), connect, PLACEMENT)
        await placement.start()
        leading = asyncio.get_running_loop().create_task(placement.run())
        self._stack.push_async_callback(asyncio.wait, [leading])
        self._stack.push_async_callback(placement.stop)
        executor = self._stack.enter_context(ThreadPoolExecutor(2, "nodes"))
        loop = asyncio.get_running_loop()

        async def run(function: Callable[..., Any], *arguments: Any) -> Any:
            return await loop.run_in_executor(executor, function, *arguments)

        for name, disk in cell.disks.items():
            identity = Identity(CLUSTER_ID, name, f"store-{name}")
            node = StorageNode(identity, MemoryStore(disk), clock, run)
            port = await port_server.serve(node, "127.0.0.1", 0, SECRET, entropy=os.urandom)
            cell.nodes[name], cell.ports[name] = node, port
            self._stack.push_async_callback(node.close)
            self._stack.push_async_callback(port.close)
            await placement.register(
                NodeRegistration(
                    name, f"store-{name}", port.endpoint, os.getpid(), str(name), 1 << 40
                )
            )
        cell.services = self._wrap(services)
        self._app = create_app(cell.services)

    async def wait_ready(self) -> None:
        """Until the gateway says that the cell is whole."""
        assert self._starting is not None
        await self._starting
        assert self._cell.services is not None
        async with asyncio.timeout(20):
            whole = False
            while not whole:
                whole = (await self._cell.services.readiness()).details["whole"]
                await asyncio.sleep(0.02)

    async def close(self) -> None:
        """Stop everything, in the reverse order."""
        await self._stack.aclose()
