"""Leases that reach a node out of order.  Found by simulation seed 199."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from protocol.clock import SystemClock
from protocol.errors import StaleIncarnation
from protocol.ids import NodeId
from storage_node.identity import Identity
from storage_node.memory_store import Disk, MemoryStore
from storage_node.node import StorageNode


async def _run(work: object, *arguments: object) -> object:
    await asyncio.sleep(0)
    assert callable(work)
    return work(*arguments)


@pytest.mark.parametrize("order", list(itertools.permutations((2, 3, 4))))
async def test_the_highest_incarnation_offered_stays_durable(order: tuple[int, ...]) -> None:
    disk = Disk()
    identity = Identity("cell", NodeId("node-01"), "store-1")
    node = StorageNode(identity, MemoryStore(disk), SystemClock(), _run)
    answers = await asyncio.gather(
        *(node.lease(incarnation, 10.0) for incarnation in order), return_exceptions=True
    )
    assert node.incarnation == 4
    refused = [answer for answer in answers if isinstance(answer, BaseException)]
    assert all(isinstance(answer, StaleIncarnation) for answer in refused)
    await node.close()
    again = StorageNode(identity, MemoryStore(disk), SystemClock(), _run)
    assert again.incarnation == 4
