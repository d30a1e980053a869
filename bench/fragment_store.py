"""CPU and wall time of the fragment store, by size of record and of group.

`python -m bench.fragment_store [--directory DIR]` prints the tables of
`docs/design/005-fragment-store.md`, and, alone with `--sizes ""`, that of
`docs/design/014-scrub-and-space.md`.  One process, no network; CPU is user + system of the
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

from erasure.fragment import FRAGMENT_HEADER_BYTES, pack_header
from erasure.scheme import Scheme
from protocol.allocator import reuse_large_buffers
from protocol.hashing import checksum64
from protocol.ids import BlockHash, NodeId, VolumeId
from protocol.limits import GIB, KIB, MIB
from storage_node.identity import Identity, initialise
from storage_node.interface import FragmentKey
from storage_node.rocks_options import StoreOptions
from storage_node.rocks_store import RocksStore, open_store
from storage_node.scrub import read_stretch

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


class ScrubRate(NamedTuple):
    """GiB per second of one core's CPU time."""

    scrub: float
    limit: float
    """XXH3 over the same files, read from the page cache."""


def _measure_scrub(directory: Path, size: int, total: int) -> ScrubRate:
    """Read everything as an unthrottled pass does."""
    initialise(directory, _IDENTITY)
    store = open_store(directory, _IDENTITY, StoreOptions(reserve_bytes=0))
    count = total // size
    for start in range(0, count, 16):
        store.put_group(
            [_fragment(number, size) for number in range(start, min(start + 16, count))]
        )
    store.flush()
    paths = list((directory / "store").glob("*.sst"))
    _hash_files(paths)  # writing an extent drops it from the page cache
    _scrub(store)
    scrubbed = _timed(1, lambda: _scrub(store))
    hashed = _timed(1, lambda: _hash_files(paths))
    file_bytes = sum(path.stat().st_size for path in paths)
    rate = ScrubRate(
        store.stats().fragment_bytes / GIB / scrubbed.cpu * 1e3,
        file_bytes / GIB / hashed.cpu * 1e3,
    )
    store.close()
    return rate


def _fragment(number: int, size: int) -> tuple[FragmentKey, bytes]:
    key = FragmentKey(VolumeId(1), BlockHash(os.urandom(32)), 0)
    payload = os.urandom(size - FRAGMENT_HEADER_BYTES)
    scheme = Scheme.replica(2)
    return key, pack_header(scheme, 0, key.block, key.volume, 1, len(payload), payload) + payload


def _scrub(store: RocksStore) -> None:
    bound: bytes | None = None
    while True:
        stretch = read_stretch(store, bound)
        assert not stretch.bad
        bound = stretch.rest
        if bound is None:
            return


def _hash_files(paths: list[Path]) -> None:
    buffer = memoryview(bytearray(8 * MIB))
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while got := file.readinto(buffer):
                checksum64(buffer[:got])


def _print_scrub(root: Path) -> None:
    print("\n| record | scrub, GiB/s per core | XXH3 of the same files, GiB/s per core |")
    print("|---|---|---|")
    for size, total in ((4 * KIB, 64 * MIB), (64 * KIB, 512 * MIB), (700 * KIB, 1 * GIB)):
        rate = _measure_scrub(root / f"scrub-{size}", size, total)
        print(f"| {size / KIB:g} KiB | {rate.scrub:.2f} | {rate.limit:.2f} |", flush=True)


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
    if arguments.sizes:
        print("| record | group | path | put CPU ms | put wall ms | get CPU ms |")
        print("|---|---|---|---|---|---|")
    try:
        for size in map(int, filter(None, arguments.sizes.split(","))):
            for group in map(int, arguments.groups.split(",")):
                for name, options in (("extent", always), ("batch", never)):
                    put, get = _measure(root / f"{size}-{group}-{name}", size, group, options)
                    print(
                        f"| {size / KIB:g} KiB | {group} | {name} | {put.cpu:.3f} | "
                        f"{put.wall:.3f} | {get.cpu:.3f} |",
                        flush=True,
                    )
        _print_scrub(root)
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
