"""CPU and wall time of one node behind its data port: a real socket, process, store and disk.

`python -m bench.data_port [--directory DIR] [--threads]` prints the figures of
`docs/design/006-data-port.md`: put and get of 700 KB fragments by number of callers, and of 1 KB
records in frames of 250.  CPU is that of the node process alone; the caller's is given apart.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import uvloop

from erasure.fragment import pack_header
from erasure.scheme import Scheme
from protocol.allocator import reuse_large_buffers
from protocol.clock import SystemClock
from protocol.ids import BlockHash, NodeId, VolumeId
from protocol.limits import KIB, MIB
from storage_node.identity import Identity, initialise
from storage_node.interface import FragmentKey
from storage_node.node import StorageNode
from storage_node.port_client import SocketPort
from storage_node.port_server import serve
from storage_node.rocks_options import StoreOptions
from storage_node.rocks_store import open_store

_IDENTITY = Identity("bench", NodeId("node-01"), "bench")
_SECRET = b"s" * 32
_Records = list[tuple[FragmentKey, list[bytes]]]
_PHASES = [
    *[("700 KiB", 700 * KIB, 192, 1, callers) for callers in (1, 2, 4, 8, 16)],
    *[("1 KiB in frames of 250", 1 * KIB, 20_000, 250, callers) for callers in (1, 4)],
    *[("1 KiB one by one", 1 * KIB, 2_000, 1, callers) for callers in (1, 16, 64)],
]
"""Name, record bytes, records, records in a frame, callers."""


def _node_process(directory: Path, threaded: bool, ready: Connection) -> None:
    reuse_large_buffers(64 * MIB)
    uvloop.run(_serve(directory, threaded, ready))


async def _serve(directory: Path, threaded: bool, ready: Connection) -> None:
    threads = ThreadPoolExecutor(4)
    loop = asyncio.get_running_loop()

    async def in_thread(work: Callable[..., Any], *arguments: Any) -> Any:
        return await loop.run_in_executor(threads, work, *arguments)

    async def at_once(work: Callable[..., Any], *arguments: Any) -> Any:
        return work(*arguments)

    initialise(directory, _IDENTITY)
    store = open_store(directory, _IDENTITY, StoreOptions(reserve_bytes=0))
    node = StorageNode(
        _IDENTITY,
        store,
        SystemClock(),
        in_thread if threaded else at_once,
        run_slow=in_thread,
    )
    port = await serve(node, "127.0.0.1", 0, _SECRET, entropy=os.urandom)
    ready.send(port.endpoint)
    await loop.run_in_executor(None, ready.recv)
    await port.close()
    await node.close()
    ready.send("closed")


async def _parallel(count: int, callers: int, call: Callable[[int], Awaitable[None]]) -> None:
    numbers = iter(range(count))

    async def caller() -> None:
        for number in numbers:
            await call(number)

    await asyncio.gather(*(caller() for _ in range(callers)))


def _records(size: int, count: int) -> _Records:
    scheme = Scheme.parse("replica-1")
    payload = os.urandom(size)
    made = []
    for _ in range(count):
        block = BlockHash(os.urandom(32))
        header = pack_header(scheme, 0, block, VolumeId(1), 1, size, payload)
        made.append((FragmentKey(VolumeId(1), block, 0), [header, payload]))
    return made


class _Meter:
    """Prints what a piece of work cost the node and the caller, per record."""

    def __init__(self, node: psutil.Process) -> None:
        self._node = node

    async def run(self, label: str, records: int, work: Awaitable[None]) -> None:
        node, own, wall = self._cpu(), time.process_time(), time.perf_counter()
        await work
        wall = time.perf_counter() - wall
        own = time.process_time() - own
        node = self._cpu() - node
        print(
            f"| {label} | {1e3 * node / records:.3f} | {1e3 * own / records:.3f} | "
            f"{1e3 * wall / records:.3f} | {records / wall:,.0f} |",
            flush=True,
        )

    def _cpu(self) -> float:
        times = self._node.cpu_times()
        return times.user + times.system


def _put(port: SocketPort, records: _Records, frame: int) -> Callable[[int], Awaitable[None]]:
    async def put(number: int) -> None:
        part = records[frame * number : frame * (number + 1)]
        outcome = await port.put(1, [pieces for _, pieces in part], 30)
        assert not any(outcome.statuses)

    return put


def _get(port: SocketPort, records: _Records, frame: int) -> Callable[[int], Awaitable[None]]:
    async def get(number: int) -> None:
        part = records[frame * number : frame * (number + 1)]
        answers = await port.get([key for key, _ in part], 30)
        assert all(answer.record is not None for answer in answers)

    return get


async def _measure(endpoint: str, pid: int) -> None:
    port = SocketPort(_IDENTITY.node_id, endpoint, "bench", _SECRET, SystemClock())
    await port.lease(1, 3600, 5)
    meter = _Meter(psutil.Process(pid))
    print("| work | node CPU ms | caller CPU ms | wall ms | records/s |")
    print("|---|---|---|---|---|")
    for label, size, count, frame, callers in _PHASES:
        records = _records(size, count)
        frames = count // frame
        put, get = _put(port, records, frame), _get(port, records, frame)
        name = f"{label}, {callers} callers"
        before = (await port.summary(5)).counters
        await meter.run(f"put {name}", count, _parallel(frames, callers, put))
        after = (await port.summary(5)).counters
        await _parallel(frames, callers, get)  # once cold: an extent leaves the page cache
        await meter.run(f"get {name}", count, _parallel(frames, callers, get))
        groups = after["groups"] - before["groups"]
        print(
            f"| | | | | {(after['jobs_grouped'] - before['jobs_grouped']) / groups:.1f} a group |"
        )
    memory = psutil.Process(pid).memory_full_info()
    print(f"node USS {memory.uss / MIB:.1f} MiB, RSS {memory.rss / MIB:.1f} MiB")
    await port.close()


def main() -> None:
    """Start a node process, measure it, stop it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, default=None)
    parser.add_argument("--threads", action="store_true", help="store calls in threads")
    arguments = parser.parse_args()
    reuse_large_buffers(64 * MIB)
    root = Path(tempfile.mkdtemp(prefix="haversack-bench-", dir=arguments.directory))
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_node_process, args=(root / "node", arguments.threads, there), daemon=True
    )
    process.start()
    try:
        endpoint = here.recv()
        assert process.pid is not None
        uvloop.run(_measure(endpoint, process.pid))
        here.send("stop")
        here.recv()
        process.join(10)
    finally:
        process.kill()
        shutil.rmtree(root)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / KIB
    print(f"node peak RSS {peak:.1f} MiB")


if __name__ == "__main__":
    main()
