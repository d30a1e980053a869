"""The life of the repair service's process: open the database, lead, try again, stop.

Held by its Ray shell (`cluster/repair/actor.py`).  Everything around `RepairService` that deals
with real files, sockets, threads and the clock; imports no Ray.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import structlog

from cluster.block_client_settings import BlockClientSettings
from cluster.change.runner import JobRunner
from cluster.change.transcode import TranscodeParts
from cluster.members import upkeep_of, write_controller_plan
from cluster.placement_host import socket_ports
from cluster.repair.service import RepairService
from cluster.repair.settings import repair_settings
from cluster.verify.host import run_with_verifier, verifier_settings
from erasure.codec import Codec
from erasure.keyring import read_keyring
from erasure.scheme import Scheme
from protocol.allocator import release_free_memory, reuse_large_buffers, share_one_arena
from protocol.clock import SystemClock
from protocol.config import Settings, load
from protocol.errors import HaversackError, NotLeader
from protocol.limits import MIB
from protocol.logs import open_log
from sql.database import Database
from sql.engine import sqlite_url

log = structlog.get_logger()

RETRY_S: Final = 1.0
"""Pause before the service is started again after a failure."""

THREADS: Final = 2
"""For decoding and encoding; more only fight for the interpreter."""

KEPT_BYTES: Final = 96 * MIB
"""Freed memory that the allocator keeps for the next batches."""


class RepairHost:
    """One event loop, one database: the repair service, and the verifier beside it."""

    def __init__(self, data: Path) -> None:
        """`data`: directory of the cell."""
        reuse_large_buffers(KEPT_BYTES)
        share_one_arena()
        self._data = data
        self._service: RepairService | None = None
        self._database: Database | None = None
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="repair")

    async def run(self) -> None:
        """Lead for ever, whatever happens to the settings or the database."""
        while True:
            try:
                settings = load(data=self._data)
                open_log(self._data / "logs" / "repair.log")
                await self._lead(settings)
            except NotLeader:
                # A newer copy leads; taking the role back would only make the two take turns.
                log.error("a newer repair service leads this cell: this one stays idle")
                return
            except HaversackError as error:
                log.error("repair failed", kind=error.kind, error=error.message)
            except Exception:
                log.exception("repair failed")
            await asyncio.sleep(RETRY_S)

    async def stop(self) -> None:
        """Close the database.  Idempotent."""
        if self._service is not None:
            await self._service.stop()
        if self._database is not None:
            await self._database.aclose()
        self._threads.shutdown(wait=False)

    async def _run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    async def _lead(self, settings: Settings) -> None:
        if self._database is None:
            self._database = Database(sqlite_url(settings.cell_database))
        database = self._database
        clock, ports = SystemClock(), socket_ports(database, settings)
        service = self._service = RepairService(
            database,
            clock,
            random.Random(os.urandom(16)),
            ports,
            Codec(),
            read_keyring(settings.encryption_key_file),
            self._run,
            repair_settings(settings),
            holder=f"pid {os.getpid()}",
        )
        await service.start()
        parts = self._transcode_parts(settings)
        jobs = self._jobs(settings, service, parts)
        asyncio.get_running_loop().call_soon(release_free_memory)
        try:
            async with asyncio.TaskGroup() as tasks:
                running = tasks.create_task(jobs.run(), name="jobs")
                try:
                    await run_with_verifier(
                        service.run(),
                        database,
                        clock,
                        ports,
                        lambda: service.epoch,
                        verifier_settings(settings),
                    )
                finally:
                    running.cancel()
        except* HaversackError as group:
            raise first_error(group) from None
        finally:
            await parts.aclose()

    def _transcode_parts(self, settings: Settings) -> TranscodeParts:
        database = self._database
        assert database is not None
        return TranscodeParts(
            database,
            SystemClock(),
            random.Random(os.urandom(16)),
            socket_ports(database, settings),
            Codec(),
            read_keyring(settings.encryption_key_file),
            self._run,
            BlockClientSettings(
                scheme=Scheme.parse(settings.scheme), compress=settings.compression
            ),
        )

    def _jobs(self, settings: Settings, service: RepairService, parts: TranscodeParts) -> JobRunner:
        """What carries out drains, rebalances and other changes, under this service's role."""
        database = self._database
        assert database is not None

        def write_plan() -> None:
            write_controller_plan(
                database, self._data, settings.node_capacity_bytes, upkeep_of(settings)
            )

        async def members_changed() -> None:
            await self._run(write_plan)

        return JobRunner(
            database,
            SystemClock(),
            service.lead,
            service.executor,
            self._run,
            parts.work,
            members_changed,
        )


def first_error(group: BaseExceptionGroup[HaversackError]) -> HaversackError:
    """One of the errors that ended a group of tasks."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, HaversackError)
    return error
