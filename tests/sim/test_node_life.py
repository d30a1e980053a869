"""Who is down is found out by the placement service and by gateways, and by neither alone.

A whole simulated cell of twelve nodes, two gateways that put and get all the time, and links that
are cut between some of them.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import pytest

from chaos import faults
from chaos.faults import Fault
from chaos.sim.cell import Parts, prepare_directory
from chaos.sim.options import SCENARIOS, draw_options
from chaos.sim.run import SimRun
from cluster import map_rows
from cluster.events import EventKind, read_events
from cluster.topology import NodeState
from protocol.errors import HaversackError
from protocol.ids import BlockHash, NodeId
from sql.database import Database
from sql.engine import sqlite_url

CUT_S = 80.0
OUT_AFTER_S = 30.0
NOTICED_S = 25.0
"""By then everybody has said what they see, and the placement service has believed it."""

SEEDS = range(1, 4)
NODE = NodeId.numbered(3)
NODES = [NodeId.numbered(number) for number in range(1, 13)]
GATEWAYS = ("gateway-1", "gateway-2")


class CutLinks(SimRun):
    """Looks at the node table all the time while links are cut."""

    def __init__(self, seed: int, cuts: Sequence[Fault], directory: Path) -> None:
        options = SCENARIOS["unwritable"](draw_options(seed))
        options = dataclasses.replace(
            options,
            clock_drift=0.0,
            lease_interval_s=1.0,
            map_age_s=1.0,
            gateways=2,
            out_after_s=OUT_AFTER_S,
            hosts=12,
            changes_gap_s=0.0,
        )
        super().__init__(options, Parts(), prepare_directory(directory))
        self._cuts = cuts
        self.seen: list[tuple[float, dict[NodeId, NodeState]]] = []
        """Seconds since the cut, states."""
        self.details: list[str] = []
        """Of the node's changes."""
        self.moved = 0
        self.errors: list[str] = []

    async def main(self) -> None:
        await self.cell.create()
        self.injector.arm()
        await self._until_whole_puts("ready", 60.0)
        for number in range(6):
            await self._put_and_get(GATEWAYS[0], number)
        began = self.loop.time()
        for cut in self._cuts:
            self.injector.inject(cut)
        number = 100
        while self.loop.time() - began < CUT_S + 60.0:
            for name in GATEWAYS:
                number += 1
                await self._put_and_get(name, number)
            self._look(self.loop.time() - began)
            await asyncio.sleep(1.0)

    def _look(self, at: float) -> None:
        database = Database(sqlite_url(self.cell._directory / "cell.db"), inline=True)
        nodes = database.read_now(map_rows.read_nodes)
        self.seen.append((at, {node.node_id: node.state for node in nodes}))
        events = database.read_now(lambda c: read_events(c, NODE, 20))
        self.details = [event.detail for event in events]
        everything = database.read_now(lambda c: read_events(c, None, 500))
        self.moved = sum(event.kind == EventKind.MOVE_BEGUN for event in everything)
        database.close()

    async def _put_and_get(self, name: str, number: int) -> None:
        data = self._rng(f"put-{number}").randbytes(200_000 if number % 2 else 100)
        block = BlockHash(hashlib.sha256(data).digest())
        life = self.cell.hosts[name].life
        assert life is not None
        blocks = self.cell.gateways[name].blocks
        try:
            await life.process.ask(blocks.put(7, block, (data,), len(data)), "put")
            read = await life.process.ask(blocks.get(block), "get")
            assert bytes(read) == data
        except HaversackError as error:
            self.errors.append(f"{name}: {error}")

    def states(self, since: float, until: float, node: NodeId = NODE) -> set[NodeState]:
        """Of a node in a part of the run."""
        return {states[node] for at, states in self.seen if since <= at <= until}


def run_with(seed: int, tmp_path: Path, *cuts: tuple[Sequence[str], Sequence[str]]) -> CutLinks:
    partitions = [faults.Partition(tuple(one), tuple(two), False, CUT_S) for one, two in cuts]
    run = CutLinks(seed, partitions, tmp_path / "cell")
    try:
        run.loop.run_until_complete(run.main())
    finally:
        run.loop.close()
        run.cell.close()
    assert run.states(CUT_S + 55.0, CUT_S + 70.0) == {NodeState.UP}, "it is taken back"
    others = set(NODES) - {NODE}
    assert {state for node in others for state in run.states(0, CUT_S, node)} == {NodeState.UP}
    return run


@pytest.mark.parametrize("seed", SEEDS)
def test_a_node_that_no_gateway_reaches_is_down_and_not_out(seed: int, tmp_path: Path) -> None:
    run = run_with(seed, tmp_path, (GATEWAYS, [NODE]))
    assert run.states(NOTICED_S, CUT_S - 1) == {NodeState.DOWN}
    assert any("answers the placement service, but gateway" in said for said in run.details)
    assert run.moved == 0, "repair hears it"
    assert run.errors == []


@pytest.mark.parametrize("seed", SEEDS)
def test_a_node_that_one_of_two_gateways_reaches_stays_in_use(seed: int, tmp_path: Path) -> None:
    run = run_with(seed, tmp_path, (GATEWAYS[:1], [NODE]))
    assert run.states(NOTICED_S, CUT_S - 1) == {NodeState.UP}
    assert run.moved == 0
    assert run.errors == []


@pytest.mark.parametrize("seed", SEEDS)
def test_a_gateway_without_a_network_takes_nobody_down(seed: int, tmp_path: Path) -> None:
    run = run_with(seed, tmp_path, (GATEWAYS[:1], NODES))
    assert run.states(0, CUT_S) == {NodeState.UP}
    assert run.moved == 0
    assert [error for error in run.errors if error.startswith(GATEWAYS[1])] == []


@pytest.mark.parametrize("seed", SEEDS)
def test_a_node_that_only_gateways_reach_is_down_and_not_out(seed: int, tmp_path: Path) -> None:
    run = run_with(seed, tmp_path, (["placement", "repair"], [NODE]))
    assert run.states(NOTICED_S, CUT_S - 1) == {NodeState.DOWN}
    assert run.moved == 0, "gateways reach it"
    assert run.errors == []


@pytest.mark.parametrize("seed", SEEDS)
def test_a_node_that_nobody_reaches_is_out_and_comes_back_fenced(seed: int, tmp_path: Path) -> None:
    run = run_with(seed, tmp_path, (["placement", "repair", *GATEWAYS], [NODE]))
    assert run.states(NOTICED_S, CUT_S - 1) == {NodeState.DOWN}
    assert run.moved > 0
    assert run.errors == []
