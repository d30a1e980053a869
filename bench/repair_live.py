"""Clients beside a repair: `python -m bench.repair --live` starts this in a process of its own.

GETs of whole blocks.  In a closed loop it finds the cell's maximum; in an open loop requests start
at random instants of a given mean rate, whether or not earlier ones were answered, and a latency
counts from the instant at which its request was due, so that a stall is not hidden.
"""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import time
from collections.abc import Sequence

import msgspec
import uvloop

from bench.connection import LoadConnection, request_head
from chaos.live.cell import LiveCell
from protocol.allocator import reuse_large_buffers
from protocol.limits import BLOCK_BYTES_MAX, MIB

CONNECTIONS = 64
"""Open at most: requests that find none wait, and their latency shows it."""

CLIENTS = 8
"""Of the closed loop."""


class LiveJob(msgspec.Struct, frozen=True):
    """What to ask for.  A closed loop runs for `seconds`, an open one until standard input ends,
    but no longer than that."""

    host: str
    port: int
    token: str
    names: list[str]
    rate: float
    """Requests a second; zero: `CLIENTS` in a closed loop."""
    seconds: float


class Sample(msgspec.Struct, frozen=True, array_like=True):
    """One answered request: when it was due, by the monotonic clock, and how long it took."""

    due: float
    took_s: float


class Live:
    """Makes the requests of one job."""

    def __init__(self, job: LiveJob) -> None:
        self._job = job
        self._free: asyncio.Queue[LoadConnection] = asyncio.Queue()
        self._rng = random.Random(1)
        self._samples: list[Sample] = []

    async def _get(self, due: float) -> None:
        job = self._job
        name = self._rng.choice(job.names)
        head = request_head("GET", f"{job.host}:{job.port}/v1/blocks/{name}", job.token)
        connection = await self._free.get()
        answer = await connection.request(head)
        self._samples.append(Sample(due, time.monotonic() - due))
        self._free.put_nowait(connection)
        assert (answer.status, len(answer.body)) == (200, BLOCK_BYTES_MAX), answer.status

    async def run(self) -> list[Sample]:
        """All samples in order of their answers."""
        for _ in range(CONNECTIONS):
            connection = await LoadConnection.open(self._job.host, self._job.port)
            self._free.put_nowait(connection)
        ended = asyncio.get_running_loop().run_in_executor(None, sys.stdin.buffer.read)
        until = time.monotonic() + self._job.seconds
        try:
            async with asyncio.timeout(self._job.seconds), asyncio.TaskGroup() as tasks:
                if self._job.rate:
                    tasks.create_task(self._open_loop(ended))
                else:
                    for _ in range(CLIENTS):
                        tasks.create_task(self._closed_loop(until))
        except TimeoutError:
            pass  # requests that were not answered by the end are none of the measurement
        return self._samples

    async def _closed_loop(self, until: float) -> None:
        while (now := time.monotonic()) < until:
            await self._get(now)

    async def _open_loop(self, ended: asyncio.Future[bytes]) -> None:
        due = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            while not ended.done():
                due += self._rng.expovariate(self._job.rate)
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                tasks.create_task(self._get(due))


class LiveClients:
    """The process, as its parent sees it."""

    def __init__(self, cell: LiveCell, names: Sequence[str], rate: float, seconds: float) -> None:
        job = LiveJob(cell.host, cell.port, cell.token, list(names), rate, seconds)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.repair_live"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(job) + b"\n")
        self._process.stdin.flush()

    def samples(self) -> list[Sample]:
        """What was measured: ends an open loop, waits for a closed one."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        said = self._process.stdout.read()
        self._process.wait()
        return msgspec.json.decode(said, type=list[Sample])


def main() -> None:
    """Run the job in the first line of standard input."""
    reuse_large_buffers(256 * MIB)
    job = msgspec.json.decode(sys.stdin.buffer.readline(), type=LiveJob)
    sys.stdout.buffer.write(msgspec.json.encode(uvloop.run(Live(job).run())))


if __name__ == "__main__":
    main()
