"""Parts of a storage node for tests: records, directories, nodes, ports."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from erasure.fragment import pack_header
from erasure.scheme import Scheme
from protocol.clock import Clock, SystemClock
from protocol.ids import BlockHash, NodeId, VolumeId
from protocol.limits import KIB
from storage_node.identity import Identity, initialise
from storage_node.interface import FragmentKey, FragmentStore
from storage_node.node import StorageNode
from storage_node.port_client import SocketPort
from storage_node.port_server import DataPort, serve
from storage_node.rocks_options import StoreOptions
from storage_node.rocks_store import RocksStore, open_store
from storage_node.space import SpaceShares

CLUSTER_ID = "cluster-1"
SECRET = b"a secret of thirty-two bytes, 32"
IDENTITY = Identity(CLUSTER_ID, NodeId("node-01"), "store-1")
WHOLE_DISK = SpaceShares(1.0, 1.0, 1.0)
"""Thresholds that are none."""

LARGE = 300 * KIB
"""Goes into an extent of its own."""


def fragment_key(number: int, *, volume: int = 1, slot: int = 0) -> FragmentKey:
    """The same key for the same number."""
    digest = hashlib.sha256(b"%d" % number).digest()
    return FragmentKey(VolumeId(volume), BlockHash(digest), slot)


def noise(number: int, size: int) -> bytes:
    """Bytes that differ from record to record and can be made again."""
    return random.Random(number).randbytes(size)


def fragment_record(
    number: int, size: int = 1 * KIB, *, volume: int = 1, epoch: int = 1
) -> tuple[FragmentKey, bytes]:
    """A well-formed record of `size` bytes of payload, and its key."""
    key = fragment_key(number, volume=volume)
    payload = noise(number, size)
    header = pack_header(Scheme.replica(2), 0, key.block, key.volume, epoch, size, payload)
    return key, header + payload


def formatted(directory: Path, identity: Identity = IDENTITY) -> Path:
    """A node directory, never opened."""
    initialise(directory, identity)
    return directory


def rocks(directory: Path, **options: Any) -> RocksStore:
    """Open the store of `IDENTITY`, formatting the directory if there is none."""
    if not directory.exists():
        formatted(directory)
    whole = {"reserve_bytes": 0, "ballast_bytes": 0, "shares": WHOLE_DISK}
    return open_store(directory, IDENTITY, StoreOptions(**{**whole, **options}))


async def at_once(work: Callable[..., Any], *arguments: Any) -> Any:
    """The `run` of a node whose disk takes no time."""
    return work(*arguments)


async def until(condition: Callable[[], bool], deadline_s: float = 20.0) -> None:
    """Let the loop run until something has come true."""
    loop = asyncio.get_running_loop()
    late = loop.time() + deadline_s
    while not condition():
        assert loop.time() < late, "waited in vain"
        await asyncio.sleep(0.001)


class HandClock:
    """Monotonic time that moves when a test says so; sleeping really waits for the loop only."""

    def __init__(self) -> None:
        self.now = 1000.0

    def wall(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


def node_on(store: FragmentStore | None, clock: Clock | None = None) -> StorageNode:
    """A node with no lease yet."""
    return StorageNode(IDENTITY, store, clock or SystemClock(), at_once)


@asynccontextmanager
async def listening(node: StorageNode) -> AsyncIterator[DataPort]:
    """The node behind a real socket on loopback."""
    port = await serve(node, "127.0.0.1", 0, SECRET, entropy=os.urandom)
    try:
        yield port
    finally:
        await port.close()


@asynccontextmanager
async def connected(port: DataPort, *, secret: bytes = SECRET) -> AsyncIterator[SocketPort]:
    """A client of the port."""
    client = SocketPort(IDENTITY.node_id, port.endpoint, CLUSTER_ID, secret, SystemClock())
    try:
        yield client
    finally:
        await client.close()
