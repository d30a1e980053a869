"""One writer per store: whatever waits is written together.

Step "group-commit" of a put on a node: `StorageNode` submits, a task of this class takes all that
is queued and calls the store once.  A put costs the store a fixed amount and a little per record,
so the more wait, the less each costs; nobody waits for company unless company is already on its
way (`expect`).  Deletes and changes of node state go through the same queue, in order.

Runs on any event loop; blocking work goes through the injected `run`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

from protocol.errors import NodeRefuses, Overloaded
from protocol.limits import MIB, NODE_QUEUE_BYTES_MAX

GROUP_BYTES_MAX: Final = 16 * MIB
"""Bounds how long one group keeps the disk to itself."""

LINGER_S: Final = 0.002
"""How long a group waits for requests that are already arriving."""

_QUIET_TURNS: Final = 2
"""Turns of the event loop without news after which nothing more is waited for: the next frame of
a busy connection shows itself within two."""

Run = Callable[..., Awaitable[Any]]


@dataclass(slots=True)
class _Job:
    work: Callable[[list[Any]], Any]
    payload: Any
    size: int
    done: asyncio.Future[Any]


class GroupCommit:
    """Bounded queue in front of the one writer."""

    def __init__(
        self, run: Run, *, queue_bytes_max: int = NODE_QUEUE_BYTES_MAX, linger_s: float = LINGER_S
    ) -> None:
        self._run = run
        self._queue_bytes_max = queue_bytes_max
        self._linger_s = linger_s
        self._jobs: deque[_Job] = deque()
        self._queued_bytes = 0
        self._expected = 0
        self._arrived = asyncio.Event()
        self._writer: asyncio.Task[None] | None = None
        self._closed = False
        self.groups = 0
        self.jobs_grouped = 0

    @property
    def queued_bytes(self) -> int:
        """Bytes waiting or being written."""
        return self._queued_bytes

    def expect(self, change: int) -> None:
        """Say that `change` more (or fewer) jobs are on their way here."""
        self._expected += change
        if self._expected <= 0:
            self._arrived.set()

    async def submit(self, work: Callable[[list[Any]], Any], payload: Any, size: int) -> Any:
        """Run `work` on the writer with the payloads of all neighbours that name the same `work`;
        returns what it returned for the whole group.

        Raises what `work` raised, `Overloaded` if too many bytes wait already, `NodeRefuses` once
        closed.  Cancelling the caller does not cancel the write.
        """
        if self._closed:
            raise NodeRefuses("the node is closing")
        if self._queued_bytes and self._queued_bytes + size > self._queue_bytes_max:
            raise Overloaded(
                f"{self._queued_bytes} bytes wait for the disk already: try again later",
                {"queued_bytes": self._queued_bytes},
            )
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._jobs.append(_Job(work, payload, size, done))
        self._queued_bytes += size
        self._arrived.set()
        if self._writer is None:
            self._writer = asyncio.create_task(self._write_all(), name="group-commit")
        return await asyncio.shield(done)

    async def close(self) -> None:
        """Take no more jobs; return when those queued are done."""
        self._closed = True
        while self._writer is not None:
            await asyncio.wait({self._writer})

    async def _write_all(self) -> None:
        try:
            while self._jobs:
                await self._linger()
                await self._write(self._take_group())
        finally:
            self._writer = None

    async def _linger(self) -> None:
        """Let the loop receive what came meanwhile, and wait a moment for what is arriving."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self._linger_s
        quiet = 0
        while quiet < _QUIET_TURNS and self._queued_bytes < GROUP_BYTES_MAX:
            await asyncio.sleep(0)
            if self._expected <= 0 or self._closed:
                quiet += 1
                continue
            quiet = 0
            self._arrived.clear()
            try:
                async with asyncio.timeout_at(until):
                    await self._arrived.wait()
            except TimeoutError:
                return

    def _take_group(self) -> list[_Job]:
        group = [self._jobs.popleft()]
        size = group[0].size
        while self._jobs and self._jobs[0].work == group[0].work:
            size += self._jobs[0].size
            if size > GROUP_BYTES_MAX:
                break
            group.append(self._jobs.popleft())
        return group

    async def _write(self, group: list[_Job]) -> None:
        try:
            result = await self._run(group[0].work, [job.payload for job in group])
        except asyncio.CancelledError:
            for job in group:
                job.done.cancel()
            raise
        except Exception as error:  # noqa: BLE001  every waiter gets it
            for job in group:
                if not job.done.done():
                    job.done.set_exception(error)
                    job.done.exception()  # a waiter that was cancelled does not fetch it
        else:
            for job in group:
                if not job.done.done():
                    job.done.set_result(result)
        finally:
            self.groups += 1
            self.jobs_grouped += len(group)
            self._queued_bytes -= sum(job.size for job in group)
