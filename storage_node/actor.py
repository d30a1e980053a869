"""Ray shell of a storage node.  Every method is one call of the core.

Created by `cluster.supervisor`, one per disk, restarted by Ray for ever.  `__init__` never raises:
Ray would take that for a death for good.  Whatever can go wrong happens in a task, and shows in
the node's state.

Whoever holds a handle to an actor imports the module of its class, so what only the node itself
needs (RocksDB, the data port) is imported where the node is made.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import ray

from protocol.allocator import reuse_large_buffers
from protocol.clock import SystemClock
from protocol.limits import MIB
from storage_node.node_config import NodeConfig

if TYPE_CHECKING:
    from storage_node.host import Register
    from storage_node.interface import NodeRegistration

KEPT_BYTES: Final = 64 * MIB
"""Freed memory that the allocator keeps for the next fragments."""


class StorageNodeActor:
    """One disk."""

    def __init__(self, config: NodeConfig) -> None:
        from storage_node.host import NodeHost  # see the module's docstring

        reuse_large_buffers(KEPT_BYTES)
        _open_log(config.log_file)
        self._host = NodeHost(config, _registrar(config), SystemClock(), os.urandom)
        self._task = asyncio.get_running_loop().create_task(self._host.run())
        self._task.add_done_callback(_report)

    async def endpoint(self) -> str | None:
        """`host:port` of the data port; None until it listens."""
        return None if self._host.port is None else self._host.port.endpoint

    async def state(self) -> tuple[str, str]:
        """What the node does with its disk, and why."""
        return str(self._host.node.state), self._host.node.detail

    async def stop(self) -> None:
        """Close the store in order, then end this process for good."""
        await self._host.stop()
        end: Any = ray.actor.exit_actor
        end()


def _registrar(config: NodeConfig) -> Register:
    """Registration by a call to the placement actor, found anew each time: it may restart."""

    async def register(registration: NodeRegistration) -> None:
        loop = asyncio.get_running_loop()
        # Ray's look-up blocks for as long as its GCS is away: never on the loop.
        placement = await loop.run_in_executor(
            None, lambda: ray.get_actor(config.registrar, namespace=config.namespace)
        )
        await placement.register.remote(registration)

    return register


def _report(task: asyncio.Task[None]) -> None:
    """A host that ended by an error leaves a process that serves nothing: let Ray restart it."""
    if task.cancelled() or task.exception() is None:
        return
    logging.getLogger("haversack.node").error("node ended", exc_info=task.exception())
    asyncio.get_running_loop().call_later(RESTART_PAUSE_S, os._exit, 1)


RESTART_PAUSE_S: Final = 2.0
"""Ray restarts actors without a pause of its own."""


class _JsonLines(logging.Formatter):
    """One JSON object a line, as `protocol.logs` writes elsewhere, without its libraries."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "event": record.getMessage(),
            "level": record.levelname.lower(),
            "logger": record.name,
            "timestamp": self.formatTime(record, "%Y-%m-%dT%H:%M:%S"),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _open_log(path: str | None) -> None:
    if path is None:
        return
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path, encoding="utf-8")
    except OSError:
        return  # a node that cannot log still serves; Ray keeps its stderr
    handler.setFormatter(_JsonLines())
    logger = logging.getLogger("haversack")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)


def remote_storage_node() -> Any:
    """The actor class: restarted for ever, never retried by Ray, no share of a core reserved."""
    remote: Any = ray.remote
    return remote(
        num_cpus=0,
        max_restarts=-1,
        max_task_retries=0,
        max_concurrency=100,
        lifetime=None,
    )(StorageNodeActor)
