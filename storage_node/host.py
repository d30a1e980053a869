"""The life of one storage-node process: open the disk, serve it, heal what can be healed, stop.

Started by `storage_node/actor.py` (and by tests): everything around `StorageNode` that deals with
real directories, sockets and threads.  Imports no ray; talks to placement through `register`.

    read the secret -> listen -> open the directory, again and again until it opens
      -> register, until placement has granted a lease -> serve
    a write failed  -> close the store, open it again
    stop            -> stop listening, finish what is queued, close the store

A directory without its identity, or with another's, is never written to: the node says that it
refuses, and looks again from time to time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from protocol.allocator import release_free_memory
from protocol.clock import Clock
from protocol.errors import (
    DirectoryForeign,
    DirectoryInUse,
    HaversackError,
    NodeFull,
    OperatorNeeded,
)
from storage_node import identity
from storage_node.identity import Identity
from storage_node.interface import NodeRegistration
from storage_node.node import StorageNode
from storage_node.node_config import NodeConfig, NodeUpkeep
from storage_node.port_server import DataPort, serve
from storage_node.rocks_options import EXTENT_FILE_BYTES, StoreOptions
from storage_node.rocks_store import RocksStore, open_store
from storage_node.scrub import ScrubSettings
from storage_node.service_state import ServiceState
from storage_node.space import SpaceShares

OPEN_RETRY_S: Final = 0.5
OPEN_RETRY_S_MAX: Final = 15.0
"""First and longest pause between attempts to open a directory."""

WATCH_S: Final = 1.0
"""How often a serving node looks whether a write failed or its lease is missing."""

LEASE_POLL_S: Final = 0.2
"""How often a node that has registered looks for its lease."""

REGISTER_DEADLINE_S: Final = 5.0
REGISTER_RETRY_S: Final = 1.0
LEASE_WAIT_S: Final = 15.0
"""Without a lease for this long, a registered node registers again; each time counts as a new
incarnation, so a placement service that is merely restarting gets the time to come back."""

UPKEEP_S: Final = 5.0
IDLE_S: Final = 30.0
"""How often a node looks for upkeep, and for how long nobody must have used it: a merge costs as
much CPU as the puts that made its extents."""

UPKEEP_GROUPS_MAX: Final = 4_096
"""Group commits after which a busy node does a step of upkeep all the same."""

_log = logging.getLogger("haversack.node")

Register = Callable[[NodeRegistration], Awaitable[Any]]


def read_secret(path: Path) -> bytes:
    """The cluster secret: one line of hex digits."""
    return bytes.fromhex(path.read_text(encoding="ascii").strip())


def scrub_settings(upkeep: NodeUpkeep) -> ScrubSettings:
    """How the node reads its own fragments."""
    return ScrubSettings(upkeep.scrub_period_s, upkeep.scrub_bytes_per_s_max)


def space_shares(upkeep: NodeUpkeep) -> SpaceShares:
    """How far the node may fill, by who asks."""
    return SpaceShares(
        upkeep.placement_space_share, upkeep.client_space_share, upkeep.repair_space_share
    )


async def at_once(work: Callable[..., Any], *arguments: Any) -> Any:
    """The `run` of a real node.  rocksdict holds the GIL through puts and most of a get, so a
    thread would only add its hand-over; measured in `docs/design/006-data-port.md`."""
    return work(*arguments)


class NodeHost:
    """Owns the node, its port and its tasks; all on one event loop."""

    def __init__(
        self,
        config: NodeConfig,
        register: Register,
        clock: Clock,
        entropy: Callable[[int], bytes],
    ) -> None:
        self.config = config
        self._register = register
        self._clock = clock
        self._entropy = entropy
        self._directory = Path(config.directory)
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="disk")
        expected = Identity(config.cluster_id, config.node_id, "unknown")
        self.node = StorageNode(
            expected,
            None,
            clock,
            at_once,
            run_slow=self._in_thread,
            scrub=scrub_settings(config.upkeep),
        )
        self.port: DataPort | None = None
        self._stopping = asyncio.Event()
        self._ended = asyncio.Event()
        self._serving = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def run(self) -> None:
        """Until `stop`."""
        try:
            secret = read_secret(Path(self.config.secret_file))
            self.port = await serve(
                self.node, self.config.bind_host, 0, secret, entropy=self._entropy
            )
            _log.info("%s listens on %s", self.config.node_id, self.port.endpoint)
            for work in self._duties():
                self._tasks.append(asyncio.create_task(work))
            await self._stopping.wait()
        finally:
            await self._end()

    def _duties(self) -> list[Coroutine[Any, Any, None]]:
        """What a host does side by side, for as long as it runs."""
        return [
            self._keep_open(),
            self._keep_registered(),
            self._keep_tidy(),
            self._keep_scrubbed(),
        ]

    async def stop(self) -> None:
        """Serve no more; returns when the store is closed.  Idempotent."""
        self._stopping.set()
        await self._ended.wait()

    async def _end(self) -> None:
        try:
            if self.port is not None:
                await self.port.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self.node.close()
        finally:
            await asyncio.get_running_loop().run_in_executor(None, self._threads.shutdown)
            self._ended.set()
            _log.info("%s stopped", self.config.node_id)

    async def _in_thread(self, work: Callable[..., Any], *arguments: Any) -> Any:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, work, *arguments)

    # -- the directory ---------------------------------------------------------------------

    async def _keep_open(self) -> None:
        """Open the directory; open it again after a failed write."""
        pause = OPEN_RETRY_S
        while True:
            match self.node.state:
                case ServiceState.SERVING:
                    await self._clock.sleep(WATCH_S)
                    continue
                case ServiceState.CLOSING:
                    return
                case ServiceState.FAILED:
                    _log.error("%s: %s", self.config.node_id, self.node.detail)
                    self._serving.clear()
                    with contextlib.suppress(HaversackError):  # told already, by the failed write
                        await self.node.detach()
                case ServiceState.OPENING | ServiceState.REFUSING:
                    pass
            if await self._open():
                pause = OPEN_RETRY_S
                asyncio.get_running_loop().call_later(UPKEEP_S, self._give_memory_back)
            else:
                if self.node.state is ServiceState.REFUSING:
                    # Silent, it would be taken for lost, and its reason would stay in its log.
                    await self._register_once(self.node.detail)
                await self._clock.sleep(pause)
                pause = min(2 * pause, OPEN_RETRY_S_MAX)

    def _give_memory_back(self) -> None:
        """What opening left behind.  It concerns the whole process, which a simulated node shares
        with all others."""
        release_free_memory()

    async def _open(self) -> bool:
        opening = asyncio.ensure_future(self._in_thread(self._open_directory))
        try:
            owner, store = await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_close_opened)
            raise
        except (DirectoryInUse, NodeFull) as error:
            self._say(error.message)
            self.node.wait_to_open(error.message)
            return False
        except OperatorNeeded as error:
            self._say(error.message)
            self.node.refuse(error)
            return False
        self.node.identity = owner
        self.node.attach(store)
        self._serving.set()
        _log.info("%s serves %s", self.config.node_id, self._directory)
        return True

    def _say(self, detail: str) -> None:
        if detail != self.node.detail:
            _log.error("%s does not serve: %s", self.config.node_id, detail)

    def _open_directory(self) -> tuple[Identity, RocksStore]:
        owner = identity.load(self._directory)
        config = self.config
        if (owner.cluster_id, owner.node_id) != (config.cluster_id, config.node_id):
            raise DirectoryForeign(
                f"{self._directory} belongs to {owner.node_id} of cluster {owner.cluster_id}, not "
                f"to {config.node_id} of {config.cluster_id}",
                {"directory": config.directory},
            )
        options = StoreOptions(
            reserve_bytes=config.reserve_bytes,
            capacity_bytes=config.capacity_bytes,
            shares=space_shares(config.upkeep),
        )
        return owner, open_store(self._directory, owner, options)

    # -- placement -------------------------------------------------------------------------

    async def _keep_registered(self) -> None:
        """Register once the store is open, and again if no lease arrives for long."""
        registered = False
        while True:
            await self._serving.wait()
            if self.node.has_lease:
                await self._clock.sleep(WATCH_S)
                continue
            if registered and await self._lease_arrives():
                continue
            registered = await self._register_once()
            if not registered:
                await self._clock.sleep(REGISTER_RETRY_S)

    async def _register_once(self, refusal: str = "") -> bool:
        assert self.port is not None
        capacity_bytes = self.config.capacity_bytes
        if not capacity_bytes and not refusal:
            capacity_bytes = file_system_bytes(self._directory)
        registration = NodeRegistration(
            self.config.node_id,
            self.node.identity.store_id,
            self.port.endpoint,
            os.getpid(),
            self.config.directory,
            capacity_bytes or 0,
            refusal,
        )
        try:
            async with asyncio.timeout(REGISTER_DEADLINE_S):
                await self._register(registration)
        except Exception as error:  # noqa: BLE001  placement may be away in any way; ask again
            _log.warning("%s could not register: %s", self.config.node_id, error)
            return False
        return True

    async def _lease_arrives(self) -> bool:
        until = self._clock.monotonic() + LEASE_WAIT_S
        while not self.node.has_lease and self._clock.monotonic() < until:
            await self._clock.sleep(LEASE_POLL_S)
        return self.node.has_lease

    # -- upkeep ----------------------------------------------------------------------------

    async def _keep_tidy(self) -> None:
        """Merge extents when nobody uses the node, when very many were written, and when the space
        of deleted fragments is wanted back."""
        tidied_at = -1  # groups that had been written when there was nothing left to do
        while True:
            await self._clock.sleep(UPKEEP_S)
            groups = self.node.commits.groups
            while groups != tidied_at and self._may_tidy(groups - tidied_at):
                if await self.node.tidy(EXTENT_FILE_BYTES) == 0:
                    tidied_at = groups
                await self._clock.sleep(0)

    async def _keep_scrubbed(self) -> None:
        while True:
            await self._clock.sleep(await self.node.scrubber.step())

    def _may_tidy(self, groups_since: int) -> bool:
        idle = self._clock.monotonic() - self.node.last_use > IDLE_S
        return idle or groups_since > UPKEEP_GROUPS_MAX or self.node.is_space_short


def _close_opened(opening: asyncio.Future[tuple[Identity, RocksStore]]) -> None:
    """A store that was opened for a host that stops meanwhile."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result()[1].close()


def file_system_bytes(directory: Path) -> int:
    """Size of the file system that holds `directory`."""
    space = os.statvfs(directory)
    return space.f_blocks * space.f_frsize
