"""The load generator: drives HTTP from its own process and checks what it reads.

`python -m bench.load JOB` reads one job as JSON, runs it and prints one JSON line.  Bodies are made
before the clock starts and compared after an answer came, byte by byte.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Sequence

import msgspec
import uvloop

from bench.bodies import Body, make_bodies
from bench.connection import LoadConnection, request_head
from protocol.allocator import reuse_large_buffers
from protocol.block_frames import MEDIA_TYPE, FrameStatus, iter_frames, pack_frame_header
from protocol.ids import BlockHash
from protocol.limits import MIB


class Job(msgspec.Struct, frozen=True):
    """What to do: `op` is put, get, batch, fetch, check or limit_get."""

    op: str
    host: str
    port: int
    token: str
    clients: int
    seed: int
    first: int
    count: int
    size: int
    per_request: int = 1


class Result(msgspec.Struct, frozen=True):
    """What came of it.  Latencies are those of requests; `operations` counts blocks."""

    operations: int
    requests: int
    bytes: int
    seconds: float
    p50_ms: float
    p99_ms: float

    @property
    def mb_s(self) -> float:
        """Millions of plain bytes per second."""
        return self.bytes / self.seconds / 1e6

    @property
    def operations_s(self) -> float:
        """Blocks per second."""
        return self.operations / self.seconds


Step = Callable[[LoadConnection, int], Awaitable[int]]


class Load:
    """Makes the requests of one job."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._bodies: Sequence[Body] = ()
        if job.op != "limit_get":
            self._bodies = make_bodies(job.seed, job.first, job.count, job.size)

    def _head(self, method: str, path: str, length: int, media_type: str) -> bytes:
        job = self._job
        return request_head(method, f"{job.host}:{job.port}{path}", job.token, media_type, length)

    async def put(self, connection: LoadConnection, index: int) -> int:
        """PUT one block; it must be new."""
        body = self._bodies[index]
        head = self._head(
            "PUT", f"/v1/blocks/{body.name}", len(body.data), "application/octet-stream"
        )
        answer = await connection.request(head, body.data)
        assert answer.status == 201, f"PUT answered {answer.status}: {bytes(answer.body)!r}"
        return 1

    async def get(self, connection: LoadConnection, index: int) -> int:
        """GET one block and compare every byte."""
        body = self._bodies[index]
        head = self._head("GET", f"/v1/blocks/{body.name}", 0, "application/octet-stream")
        answer = await connection.request(head)
        assert answer.status == 200, f"GET answered {answer.status}: {bytes(answer.body[:200])!r}"
        assert answer.holds(body.data), f"GET {body.name} answered other bytes"
        return 1

    async def limit_get(self, connection: LoadConnection, _index: int) -> int:
        """GET the limit's answer."""
        answer = await connection.request(self._head("GET", "/", 0, "application/octet-stream"))
        assert (answer.status, len(answer.body)) == (200, self._job.size)
        return 1

    def _group(self, index: int) -> Sequence[Body]:
        start = index * self._job.per_request
        return self._bodies[start : start + self._job.per_request]

    async def batch(self, connection: LoadConnection, index: int) -> int:
        """Upload one framed body of small blocks; all must be new."""
        parts = []
        for body in self._group(index):
            block = BlockHash.parse(body.name)
            parts += [pack_frame_header(block, FrameStatus.OK, len(body.data)), body.data]
        framed = b"".join(parts)
        head = self._head("POST", "/v1/blocks/batch", len(framed), MEDIA_TYPE)
        answer = await connection.request(head, framed)
        assert answer.status == 200, f"batch answered {answer.status}: {bytes(answer.body[:300])!r}"
        results = msgspec.json.decode(bytes(answer.body))["results"]
        assert results == ["created"] * self._job.per_request, results[:3]
        return self._job.per_request

    async def fetch(self, connection: LoadConnection, index: int) -> int:
        """Download small blocks in one framed body and compare every byte."""
        group = self._group(index)
        request = msgspec.json.encode({"hashes": [body.name for body in group]})
        head = self._head("POST", "/v1/blocks/fetch", len(request), "application/json")
        answer = await connection.request(head, request)
        assert answer.status == 200, f"fetch answered {answer.status}"
        frames = list(iter_frames(answer.body))
        assert [str(f.block) for f in frames] == [b.name for b in group]
        assert all(bytes(f.data) == b.data for f, b in zip(frames, group, strict=True))
        return len(group)

    async def check(self, connection: LoadConnection, index: int) -> int:
        """Ask which of `per_request` hashes are missing: every second one is."""
        group = self._group(index)
        asked = [b.name if i % 2 else b.name[::-1] for i, b in enumerate(group)]
        request = msgspec.json.encode({"hashes": asked})
        head = self._head("POST", "/v1/blocks/check", len(request), "application/json")
        answer = await connection.request(head, request)
        assert answer.status == 200, f"check answered {answer.status}"
        missing = msgspec.json.decode(bytes(answer.body))["missing"]
        assert missing == asked[::2], "check named other blocks"
        return len(group)

    async def run(self) -> Result:
        """All requests over `clients` connections, each taking the next one when it is free."""
        job = self._job
        step: Step = getattr(self, job.op)
        requests = job.count // job.per_request
        connections = [await LoadConnection.open(job.host, job.port) for _ in range(job.clients)]
        latencies: list[float] = []
        todo = iter(range(requests))
        done = 0

        async def client(connection: LoadConnection) -> None:
            nonlocal done
            for index in todo:
                started = time.perf_counter()
                blocks = await step(connection, index)
                latencies.append(time.perf_counter() - started)
                done += blocks

        started = time.perf_counter()
        await asyncio.gather(*(client(connection) for connection in connections))
        seconds = time.perf_counter() - started
        for connection in connections:
            connection.close()
        latencies.sort()
        return Result(
            operations=done,
            requests=requests,
            bytes=done * job.size,
            seconds=seconds,
            p50_ms=latencies[len(latencies) // 2] * 1e3,
            p99_ms=latencies[min(len(latencies) - 1, int(len(latencies) * 0.99))] * 1e3,
        )


def main() -> None:
    """Run the job given on standard input."""
    reuse_large_buffers(256 * MIB)
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    result = uvloop.run(Load(job).run())
    sys.stdout.buffer.write(msgspec.json.encode(result) + b"\n")


if __name__ == "__main__":
    main()
