"""CPU and wall time of the fragment store, by size of record and of group.

`python -m bench.fragment_store [--directory DIR]` prints the tables of
`docs/design/005-fragment-store.md`.  One process, no network; CPU is user + system of the
process, with the background threads of RocksDB, closing included.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from protocol.allocator import reuse_large_buffers
from protocol.ids import BlockHash, NodeId, VolumeId
from protocol.limits import KIB, MIB
from storage_node.identity import Identity, initialise
from storage_node.interface import FragmentKey
from storage_node.rocks_options import StoreOptions
from storage_node.rocks_store import RocksStore, open_store

_BYTES_WRITTEN = 96 * MIB
_IDENTITY = Identity("bench", NodeId("node-01"), "bench")


class Cost(NamedTuple):
    """Milliseconds per record."""

    cpu: float
    wall: float


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _timed(count: int, work: Callable[[], None]) -> Cost:
    cpu, wall = _cpu(), time.perf_counter()
    work()
    return Cost(1e3 * (_cpu() - cpu) / count, 1e3 * (time.perf_counter() - wall) / count)


def _measure(directory: Path, size: int, group: int, options: StoreOptions) -> tuple[Cost, Cost]:
    """Cost of a put and of a get."""
    initialise(directory, _IDENTITY)
    store = open_store(directory, _IDENTITY, options)
    count = max(64, min(2048, _BYTES_WRITTEN // size)) // group * group
    payloads = [os.urandom(size) for _ in range(min(count, 32))]
    records = [
        (FragmentKey(VolumeId(1), BlockHash(os.urandom(32)), 0), payloads[number % len(payloads)])
        for number in range(count)
    ]

    def put() -> None:
        for start in range(0, count, group):
            store.put_group(records[start : start + group])

    def get() -> None:
        for start in range(0, count, group):
            answers = store.get_many([key for key, _ in records[start : start + group]])
            assert all(answer.record is not None for answer in answers)

    written = _timed(count, put)
    get()  # once cold: writing an extent drops it from the page cache
    read = _timed(count, get)
    closed = _close(store, count)
    return Cost(written.cpu + closed.cpu, written.wall), read


def _close(store: RocksStore, count: int) -> Cost:
    return _timed(count, store.close)


def main() -> None:
    """Print one line per size, group and path."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, default=None)
    parser.add_argument("--sizes", default="1024,8192,32768,65536,131072,262144,716800")
    parser.add_argument("--groups", default="1,2,4,8")
    arguments = parser.parse_args()
    reuse_large_buffers(64 * MIB)
    root = Path(tempfile.mkdtemp(prefix="haversack-bench-", dir=arguments.directory))
    always = StoreOptions(reserve_bytes=0, large_record_bytes=0, ingest_bytes=0)
    never = StoreOptions(reserve_bytes=0, large_record_bytes=1 << 40)
    print("| record | group | path | put CPU ms | put wall ms | get CPU ms |")
    print("|---|---|---|---|---|---|")
    try:
        for size in map(int, arguments.sizes.split(",")):
            for group in map(int, arguments.groups.split(",")):
                for name, options in (("extent", always), ("batch", never)):
                    put, get = _measure(root / f"{size}-{group}-{name}", size, group, options)
                    print(
                        f"| {size / KIB:g} KiB | {group} | {name} | {put.cpu:.3f} | "
                        f"{put.wall:.3f} | {get.cpu:.3f} |",
                        flush=True,
                    )
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
