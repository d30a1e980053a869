"""Fail the n-th call to the disk, for every n until nothing fails: no acknowledged record is lost,
and none that was refused for good reason is called absent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from node_parts import HandClock, fragment_record, node_on

from protocol.errors import HaversackError
from protocol.messages import ItemStatus
from storage_node.memory_store import Disk, MemoryStore, PowerLost
from storage_node.service_state import ServiceState

RECORDS = 6
Fault = Callable[[Disk, int], None]


async def run_with(fault: Fault, number: int) -> tuple[Disk, set[int], bool]:
    """Puts one by one, reopening after a failure.  The acknowledged ones; did the fault fire?"""
    disk = Disk()
    clock = HandClock()
    node = node_on(MemoryStore(disk), clock)
    await node.lease(1, 1e6)
    fault(disk, number)
    acknowledged: set[int] = set()
    fired = False
    for record in range(RECORDS):
        for _ in range(4):
            try:
                outcome = await node.put(1, [fragment_record(record, epoch=1 + record)[1]])
            except HaversackError:
                fired = True
                if node.state is ServiceState.FAILED:
                    await node.detach()
                    node.attach(MemoryStore(disk))
                    await node.lease(1, 1e6)
            else:
                assert outcome.statuses == [ItemStatus.OK]
                acknowledged.add(record)
                break
    await node.close()
    disk.failing.clear()  # a number beyond the last call
    return disk, acknowledged, fired


@pytest.mark.parametrize("fault", [Disk.fail_call, Disk.fill_at_call])
def test_every_acknowledged_put_survives_the_failure_of_any_one_call(fault: Fault) -> None:
    number = 1
    fired = True
    while fired:
        disk, acknowledged, fired = asyncio.run(run_with(fault, number))
        assert acknowledged == set(range(RECORDS))
        store = MemoryStore(disk)
        for record in acknowledged:
            key, data = fragment_record(record, epoch=1 + record)
            (answer,) = store.get_many([key])
            assert (answer.status, answer.record) == (ItemStatus.OK, data)
        assert disk.state["epoch/v1"] == RECORDS.to_bytes(8, "big")
        number += 1
    assert number > RECORDS


@pytest.mark.parametrize("kept", range(4))
def test_a_group_torn_by_a_power_cut_is_not_acknowledged(kept: int) -> None:
    async def scenario() -> None:
        disk = Disk()
        node = node_on(MemoryStore(disk), HandClock())
        await node.lease(1, 1e6)
        await node.put(1, [fragment_record(0)[1]])
        disk.tear_next_put(kept)
        with pytest.raises(PowerLost):
            await node.put(1, [fragment_record(n)[1] for n in (1, 2, 3)])
        again = MemoryStore(disk)
        keys = [fragment_record(n)[0] for n in range(4)]
        found = [answer.status is ItemStatus.OK for answer in again.get_many(keys)]
        assert found == [True, *(n <= kept for n in (1, 2, 3))]

    asyncio.run(scenario())
