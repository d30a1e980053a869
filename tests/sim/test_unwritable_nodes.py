"""Puts go on around nodes that take none, in a cell with more nodes than slots.

A whole simulated cell, with its placement service: some of twelve nodes go bad, so that almost
every open volume holds one of them.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from chaos import faults
from chaos.faults import Fault
from chaos.sim.cell import Parts, prepare_directory
from chaos.sim.options import SCENARIOS, draw_options
from chaos.sim.run import SimRun
from protocol.errors import HaversackError
from protocol.ids import BlockHash, NodeId

NODES = [NodeId.numbered(number) for number in range(1, 13)]
FAULT_S = 90.0
WATCHED_S = 60.0
DETECTED_S = 15.0
"""By then placement knows what it can know: a lease and a pass, or the verdict on a silent node."""


class Put(NamedTuple):
    """One put of one gateway."""

    at: float
    """Seconds since the fault."""
    took_s: float
    degraded: bool
    error: str


class WritesAround(SimRun):
    """Gateways that put small and large blocks all the time while a fault hits `bad` nodes."""

    def __init__(
        self, seed: int, fault: Callable[[NodeId], Fault], bad: int, directory: Path
    ) -> None:
        options = SCENARIOS["unwritable"](draw_options(seed))
        options = dataclasses.replace(options, clock_drift=0.0, lease_interval_s=1.0, map_age_s=1.0)
        super().__init__(options, Parts(), prepare_directory(directory))
        self._faults = [fault(node) for node in NODES[:bad]]
        self.puts: list[Put] = []

    async def main(self) -> None:
        await self.cell.create()
        self.injector.arm()
        await self._until_whole_puts("ready", 60.0)
        began = self.loop.time()
        for fault in self._faults:
            self.injector.inject(fault)
        number = 0
        while self.loop.time() - began < WATCHED_S:
            for name in self.cell.gateways:
                number += 1
                await self._put(name, number, began)
            await asyncio.sleep(0.2)
        await asyncio.sleep(FAULT_S)
        await self._until_whole_puts("converged", 120.0)

    async def _put(self, name: str, number: int, began: float) -> None:
        data = self._rng(f"put-{number}").randbytes(200_000 if number % 3 == 0 else 100)
        block = BlockHash(hashlib.sha256(data).digest())
        life = self.cell.hosts[name].life
        assert life is not None
        blocks = self.cell.gateways[name].blocks
        started = self.loop.time()
        degraded, error = False, ""
        try:
            result = await life.process.ask(blocks.put(7, block, (data,), len(data)), "put")
            degraded = result.degraded
        except HaversackError as caught:
            error = str(caught)
        self.puts.append(Put(started - began, self.loop.time() - started, degraded, error))


def _run(seed: int, fault: Callable[[NodeId], Fault], bad: int, tmp_path: Path) -> list[Put]:
    run = WritesAround(seed, fault, bad, tmp_path / "cell")
    try:
        run.loop.run_until_complete(run.main())
    finally:
        run.loop.close()
        run.cell.close()
    assert len(run.puts) > 50
    assert [put for put in run.puts if put.error] == []
    return run.puts


@pytest.mark.parametrize("seed", range(1, 6))
def test_full_nodes_cost_a_second_and_then_no_debt(seed: int, tmp_path: Path) -> None:
    puts = _run(seed, lambda node: faults.DiskFull(node, FAULT_S), 3, tmp_path)
    assert max(put.took_s for put in puts) < 4.0
    assert [put for put in puts if put.at > DETECTED_S and put.degraded] == []


@pytest.mark.parametrize("seed", range(1, 6))
def test_nodes_that_fail_writes_are_written_around(seed: int, tmp_path: Path) -> None:
    puts = _run(seed, lambda node: faults.SyncFails(node, FAULT_S), 3, tmp_path)
    assert max(put.took_s for put in puts) < 7.0
    assert [put for put in puts if put.at > DETECTED_S and put.degraded] == []


@pytest.mark.parametrize("seed", range(1, 6))
def test_nodes_that_one_gateway_cannot_reach_cost_one_wait_and_then_debts(
    seed: int, tmp_path: Path
) -> None:
    """Placement hears them: it has no reason to open other volumes."""
    puts = _run(
        seed,
        lambda node: faults.Partition(("gateway-1",), (str(node),), False, FAULT_S),
        2,
        tmp_path,
    )
    waited = [put for put in puts if put.took_s > 1.0]
    assert len(waited) <= 4, waited  # each node and scheme at most once
    assert all(put.took_s < 20.0 for put in waited)
