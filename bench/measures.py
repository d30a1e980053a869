"""The measures of the data path: each runs the load, checks the answers, returns figures.

Every measure of the cell is bracketed by the limits P and H, so that a ratio compares moments that
are close together on a machine whose speed changes by the minute.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from bench import processes
from bench.load import Job, Result
from chaos.live.cell import LiveCell
from protocol.limits import BLOCK_BYTES_MAX, KIB

PUT_BLOCKS = 160
GET_BLOCKS = 480
"""4 MiB blocks of one measure: some seconds each, well past the page cache's first touch."""


class Figure(msgspec.Struct, frozen=True):
    """One measured run."""

    name: str
    clients: int
    mb_s: float
    operations_s: float
    p50_ms: float
    p99_ms: float
    cpu_ms: float
    """CPU milliseconds per operation, summed over all processes of the server."""


def run_load(name: str, job: Job, server_pid: int) -> Figure:
    """Run one job in a process of its own."""
    before = processes.cpu_seconds(server_pid)
    done = subprocess.run(
        (sys.executable, "-m", "bench.load"),
        input=msgspec.json.encode(job),
        stdout=subprocess.PIPE,
        check=True,
    )
    cpu = processes.cpu_seconds(server_pid) - before
    result = msgspec.json.decode(done.stdout, type=Result)
    return Figure(
        name=name,
        clients=job.clients,
        mb_s=result.mb_s,
        operations_s=result.operations_s,
        p50_ms=result.p50_ms,
        p99_ms=result.p99_ms,
        cpu_ms=cpu * 1e3 / result.operations,
    )


@contextmanager
def limits_server() -> Iterator[tuple[int, int]]:
    """The process of `bench.limits`: yields its pid and port."""
    directory = Path(tempfile.mkdtemp(prefix="haversack-limits-"))
    process = subprocess.Popen(
        (sys.executable, "-m", "bench.limits", str(directory)), stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield process.pid, int(process.stdout.readline())
    finally:
        process.terminate()
        process.wait()
        shutil.rmtree(directory)


class Bench:
    """Jobs against one cell, with a seed of its own so that every body is fresh."""

    def __init__(self, cell: LiveCell, seed: int) -> None:
        self._cell = cell
        self._seed = seed
        self._next = 0

    def _job(
        self, op: str, clients: int, first: int, count: int, size: int, per_request: int = 1
    ) -> Job:
        cell = self._cell
        return Job(
            op=op,
            host=cell.host,
            port=cell.port,
            token=cell.token,
            clients=clients,
            seed=self._seed,
            first=first,
            count=count,
            size=size,
            per_request=per_request,
        )

    def write(
        self, name: str, op: str, clients: int, count: int, size: int, per_request: int = 1
    ) -> tuple[int, Figure]:
        """Upload fresh blocks; returns the number of the first one with the figure."""
        first, self._next = self._next, self._next + count
        job = self._job(op, clients, first, count, size, per_request)
        return first, run_load(name, job, self._cell.pid)

    def read(
        self,
        name: str,
        op: str,
        clients: int,
        first: int,
        count: int,
        size: int,
        per_request: int = 1,
    ) -> Figure:
        """Read, or check, blocks uploaded before."""
        job = self._job(op, clients, first, count, size, per_request)
        return run_load(name, job, self._cell.pid)


def measure_limits(clients: int) -> dict[str, Figure]:
    """P and H now."""
    with limits_server() as server:
        put = _limit_job(server, "put", clients, PUT_BLOCKS)
        return {
            "P": run_load("P: receive, hash, encode, 9 fdatasync", put, server[0]),
            "H": _measure_h(server, clients),
        }


def measure_h(clients: int) -> Figure:
    """H now."""
    with limits_server() as server:
        return _measure_h(server, clients)


def _measure_h(server: tuple[int, int], clients: int) -> Figure:
    job = _limit_job(server, "limit_get", clients, 2 * GET_BLOCKS)
    return run_load("H: 4 MiB from memory", job, server[0])


def _limit_job(server: tuple[int, int], op: str, clients: int, count: int) -> Job:
    seed = int.from_bytes(os.urandom(4))
    return Job(op, "127.0.0.1", server[1], "none", clients, seed, 0, count, BLOCK_BYTES_MAX)


def idle_cpu_share(pid: int, seconds: float) -> float:
    """CPU of the whole tree over `seconds` of doing nothing, as a share of one core."""
    before, started = processes.cpu_seconds(pid), time.monotonic()
    time.sleep(seconds)
    return (processes.cpu_seconds(pid) - before) / (time.monotonic() - started)


def settle(pid: int) -> float:
    """Wait until what a start leaves to do is done: until the CPU of a window is no longer well
    below that of the one before.  Seconds it took, at most `SETTLE_S_MAX`."""
    started = time.monotonic()
    before = float("inf")
    while time.monotonic() - started < SETTLE_S_MAX:
        share = idle_cpu_share(pid, SETTLE_WINDOW_S)
        if share > 0.8 * before:
            break
        before = share
    return time.monotonic() - started


SETTLE_WINDOW_S = 5.0
SETTLE_S_MAX = 60.0

SMALL = 1 * KIB
