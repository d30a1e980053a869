"""What the routes need, and how a gateway assembles it from a data directory.

Called once by `gateway`; tests assemble a `Services` of their own.  A gateway is no Ray driver: it
opens both databases, reads the volume map, and speaks to storage nodes over their data ports, so
it goes on serving while the control plane is down.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import secrets
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any, Final

from api.bodies import Run
from api.metrics import Metrics
from api.readiness import Readiness, ReadinessProbe
from api.watcher import WatchSample
from cluster.block_client import BlockClient
from cluster.block_client_settings import BlockClientSettings, FragmentProblem
from cluster.block_index import BlockIndex
from cluster.cell import open_cell
from cluster.change.desk import ChangeDesk
from cluster.explain.losses import Losses
from cluster.explain.why import Explainer
from cluster.lookout import Lookout
from cluster.members import upkeep_of
from cluster.node_pool import NodePool
from cluster.problem_log import ProblemLog
from cluster.repair.settings import repair_settings
from cluster.scrub_desk import ScrubDesk
from cluster.status import CellStatus, read_status
from cluster.topology import SERVES_READS, NodeView
from cluster.verify.admin import Verification
from cluster.verify.canaries import Canaries, CanarySettings
from cluster.volume_map import VolumeMap
from erasure.codec import Codec
from erasure.keyring import read_keyring
from metadata.accounts import Accounts
from metadata.tree import Tree
from protocol.clock import Clock
from protocol.config import Settings
from protocol.errors import ConfigInvalid, HaversackError
from protocol.ids import NodeId
from sql.database import Database
from sql.engine import sqlite_url
from storage_node.interface import NodePort
from storage_node.port_client import SocketPort

SUMMARY_S: Final = 0.5
"""A node that does not say how full it is within this is shown as of its last report."""

THREADS: Final = 4
"""For hashing, coding and parsing: more than cores would only fight over them."""


@dataclass(slots=True)
class Services:
    """Everything the routes call.  One event loop."""

    settings: Settings
    clock: Clock
    accounts: Accounts
    tree: Tree
    index: BlockIndex
    volume_map: VolumeMap
    blocks: BlockClient
    status: Callable[[], Awaitable[dict[str, Any]]]
    """Body of `/v1/admin/status`."""
    verification: Verification
    snapshot: Callable[[], Awaitable[CellStatus]]
    """The same as the database alone says; for metrics."""
    readiness: Callable[[], Awaitable[Readiness]]
    changes: ChangeDesk
    explainer: Explainer
    losses: Losses
    scrubs: ScrubDesk
    run: Run
    cell_db: Database
    sample: WatchSample
    """Of new blocks, for the watcher."""
    watcher_token: str
    """Secret of this process."""
    canaries: Canaries
    lookout: Lookout
    metrics: Metrics = field(default_factory=Metrics)
    version: str = "0"


def haversack_version() -> str:
    """Version of the installed distribution; of a bare checkout, that it is one."""
    try:
        return installed_version("haversack")
    except PackageNotFoundError:
        return "0+checkout"


def gateway_name() -> str:
    """Of this process, for people and for other processes of the cell."""
    return f"gateway {socket.gethostname()}:{os.getpid()}"


def read_secret(path: Path) -> bytes:
    """The cluster secret: hex digits.  Raises `ConfigInvalid`, never quoting it."""
    try:
        return bytes.fromhex(path.read_text(encoding="ascii").strip())
    except (OSError, ValueError) as error:
        raise ConfigInvalid(f"the cluster secret {path} cannot be read") from error


@contextlib.asynccontextmanager
async def open_services(settings: Settings, clock: Clock) -> AsyncIterator[Services]:
    """Assemble a gateway's services from a prepared data directory, close them afterwards.

    Raises `ConfigInvalid` if the directory holds no cell or a secret is missing, and
    `FormatUnsupported` for the cell of a newer version.
    """
    async with contextlib.AsyncExitStack() as stack:
        cell_db = await _database(stack, settings.cell_database)
        metadata_db = await _database(stack, settings.metadata_database)
        cell = open_cell(cell_db)
        if cell is None:
            raise ConfigInvalid(f"{settings.data} holds no cell: `haversack up` prepares one")
        secret = read_secret(settings.data / "cluster.secret")
        executor = stack.enter_context(ThreadPoolExecutor(THREADS, "gateway"))
        loop = asyncio.get_running_loop()

        async def run(function: Callable[..., Any], *arguments: Any) -> Any:
            return await loop.run_in_executor(executor, function, *arguments)

        def connect(node: NodeView) -> NodePort:
            return SocketPort(node.node_id, node.endpoint, cell.cluster_id, secret, clock)

        metrics = Metrics()
        rng = random.Random(os.urandom(16))
        index = BlockIndex(cell_db, clock)
        volume_map = VolumeMap(cell_db, clock)
        pool = NodePool(volume_map, connect, clock, rng)
        stack.push_async_callback(pool.aclose)
        problems = ProblemLog(cell_db, clock)
        stack.push_async_callback(problems.aclose)

        def report(problem: FragmentProblem) -> None:
            metrics.blocks.problem(problem)
            problems.report(problem)

        blocks = BlockClient(
            index,
            volume_map,
            pool,
            Codec(),
            read_keyring(settings.encryption_key_file),
            clock,
            rng,
            run,
            BlockClientSettings(scheme=cell.scheme, compress=settings.compression),
            report,
        )
        lookout = Lookout(gateway_name(), cell_db, volume_map, pool, clock, rng)
        databases = {"cell": cell_db, "metadata": metadata_db}
        version = haversack_version()

        async def snapshot() -> CellStatus:
            return await read_status(cell_db, clock.wall())

        async def status() -> dict[str, Any]:
            body = {**(await snapshot()).to_json(), "version": version}
            await _bring_up_to_date(body["nodes"], pool)
            return body

        yield Services(
            settings=settings,
            clock=clock,
            accounts=Accounts(metadata_db, clock, os.urandom),
            tree=Tree(metadata_db, clock),
            index=index,
            volume_map=volume_map,
            blocks=blocks,
            status=status,
            verification=Verification(cell_db, clock),
            scrubs=ScrubDesk(volume_map, pool),
            changes=ChangeDesk(
                cell_db,
                clock,
                run,
                settings.data,
                settings.node_capacity_bytes,
                upkeep_of(settings),
            ),
            snapshot=snapshot,
            explainer=Explainer(
                cell_db, pool.port, clock, repair_settings(settings), lookout.sightings
            ),
            losses=Losses(cell_db, clock),
            readiness=ReadinessProbe(databases, volume_map, cell.schemes, clock).ask,
            run=run,
            cell_db=cell_db,
            sample=WatchSample(rng, settings.watch_share),
            canaries=Canaries(
                cell_db,
                clock,
                rng,
                os.urandom,
                blocks.put,
                pool.port,
                CanarySettings(settings.canary_interval_s, settings.canary_alarm_s),
            ),
            lookout=lookout,
            watcher_token=secrets.token_urlsafe(32),
            metrics=metrics,
            version=version,
        )


async def _bring_up_to_date(nodes: list[dict[str, Any]], pool: NodePool) -> None:
    """Ask the nodes themselves for their counts; who does not answer keeps the last report's."""

    async def ask(node: dict[str, Any]) -> None:
        try:
            summary = await pool.port(NodeId(node["id"])).summary(SUMMARY_S)
        except HaversackError:
            return  # its row says what is known
        node["bytes"], node["fragments"] = summary.fragment_bytes, summary.fragments

    await asyncio.gather(*(ask(node) for node in nodes if node["state"] in SERVES_READS))


async def _database(stack: contextlib.AsyncExitStack, path: Path) -> Database:
    if not path.exists():  # noqa: ASYNC240 - once, before anything is served
        raise ConfigInvalid(f"{path} does not exist: `haversack up` prepares a data directory")
    database = Database(sqlite_url(path))
    stack.push_async_callback(database.aclose)
    return database
