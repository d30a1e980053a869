"""When a gateway says that it is ready: the whole cell first, then writes, then reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from api.readiness import WHOLE_S, WRITES_S, ReadinessProbe
from cluster.topology import NodeState
from erasure.scheme import Scheme
from protocol.errors import DatabaseBusy

SCHEMES = (Scheme.parse("rs-6-3"), Scheme.parse("replica-4"))


@dataclass
class _Node:
    serves_reads: bool = True
    takes_writes: bool = True
    state: NodeState = NodeState.UP


@dataclass
class _Map:
    up: int = 9
    all: int = 9
    volumes: bool = True
    busy: bool = False
    drained: int = 0
    schemes: tuple[Scheme, ...] = SCHEMES

    async def refresh(self, _age_s: float) -> None:
        if self.busy:
            raise DatabaseBusy("locked")

    def nodes(self) -> list[_Node]:
        leaving = [_Node(True, False, NodeState.DRAINED) for _ in range(self.drained)]
        return leaving + [_Node(i < self.up, i < self.up) for i in range(self.all)]

    def open_volumes(self, scheme: Scheme) -> list[Scheme]:
        return [scheme] if self.volumes else []

    def writable_slots(self, scheme: Scheme) -> range:
        return range(min(self.up, scheme.n))


@dataclass
class _Database:
    busy: bool = False

    async def read(self, _work: Any) -> None:
        if self.busy:
            raise DatabaseBusy("locked")


@dataclass
class _Cell:
    now: float = 100.0
    map: _Map = field(default_factory=_Map)
    cell: _Database = field(default_factory=_Database)
    metadata: _Database = field(default_factory=_Database)

    def monotonic(self) -> float:
        return self.now

    def probe(self) -> ReadinessProbe:
        databases: Any = {"cell": self.cell, "metadata": self.metadata}
        return ReadinessProbe(databases, self.map, SCHEMES, self)


async def test_whole_cell_is_ready_at_once() -> None:
    answer = await _Cell().probe().ask()
    assert answer.ready
    assert answer.details["whole"]
    assert answer.details["needs"] == {"read": 6, "write": 7}


async def test_a_cell_without_the_nodes_that_were_taken_out_is_whole() -> None:
    answer = await _Cell(map=_Map(drained=2)).probe().ask()
    assert answer.details["whole"]
    assert answer.details["nodes"] == {"all": 9, "reading": 9, "writing": 9}


async def test_the_scheme_of_new_blocks_is_the_maps() -> None:
    new = (Scheme.parse("rs-4-2"), Scheme.parse("replica-3"))
    answer = await _Cell(map=_Map(schemes=new)).probe().ask()
    assert answer.details["needs"] == {"read": 4, "write": 5}


@pytest.mark.parametrize(
    ("up", "volumes", "ready_after_s"),
    [(8, True, WHOLE_S), (7, True, WHOLE_S), (6, True, WRITES_S), (9, False, WRITES_S)],
)
async def test_less_than_whole_is_waited_for(up: int, volumes: bool, ready_after_s: float) -> None:
    cell = _Cell(map=_Map(up=up, volumes=volumes))
    probe = cell.probe()
    cell.now += ready_after_s
    assert not (await probe.ask()).ready
    cell.now += 0.1
    assert (await probe.ask()).ready


async def test_fewer_than_k_nodes_are_never_ready() -> None:
    cell = _Cell(map=_Map(up=5))
    probe = cell.probe()
    cell.now += 10 * WRITES_S
    answer = await probe.ask()
    assert not answer.ready
    assert not answer.details["reads"]


async def test_cell_of_fewer_nodes_than_slots_is_whole_when_all_are_there() -> None:
    answer = await _Cell(map=_Map(up=7, all=7)).probe().ask()
    assert answer.ready
    assert answer.details["whole"]


async def test_settled_gateway_stays_ready_while_reads_work() -> None:
    cell = _Cell()
    probe = cell.probe()
    assert (await probe.ask()).ready
    cell.map.up = 6
    answer = await probe.ask()
    assert answer.ready
    assert not answer.details["writes"]


@pytest.mark.parametrize("part", ["cell", "metadata", "map"])
async def test_database_that_is_away_is_told_and_not_ready(part: str) -> None:
    cell = _Cell()
    probe = cell.probe()
    assert (await probe.ask()).ready
    getattr(cell, part).busy = True
    answer = await probe.ask()
    assert not answer.ready
    assert answer.details["sql"][part] == "locked"
    assert answer.details["reads"] is answer.details["writes"] is False
