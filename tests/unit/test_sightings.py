"""What gateways say of nodes, and what it means for them."""

from __future__ import annotations

import random
from typing import Any

import pytest
from block_cell import BlockCell, data_of, simulate
from repair_cell import moves, new_repair, set_since

from cluster.lookout import LOOK_S, REFRESH_S, Lookout
from cluster.node_pool import Direction, NodePool
from cluster.sightings import (
    FORGOTTEN_S,
    FRESH_S,
    Sighting,
    SightingBook,
    read_sightings,
    replace_sightings,
    unreachable,
)
from cluster.topology import NodeState
from protocol.ids import NodeId

NODE = NodeId.numbered(1)


def said(
    gateway: str = "a",
    *,
    reachable: bool = False,
    reached: int = 8,
    missed: int = 1,
    incarnation: int = 1,
    written: float = 1.0,
) -> Sighting:
    return Sighting(
        gateway, NODE, incarnation, reachable, "no answer", reached, missed, 0.0, written
    )


YES, NO = said(reachable=True), said()
CUT_OFF = said("cut off", reached=0, missed=9)
HALF = said("half", reached=2, missed=7)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], False),
        ([NO], True),
        ([YES], False),
        ([NO, said("b")], True),
        ([NO, said("b", reachable=True)], False),
        ([CUT_OFF], False),
        ([CUT_OFF, said("also cut off", reached=0, missed=9)], False),
        ([CUT_OFF, NO], True),
        ([CUT_OFF, YES], False),
        ([HALF], False),
        ([HALF, said("other half", reached=2, missed=7)], True),
        ([HALF, CUT_OFF], False),
        ([HALF, YES], False),
        ([said(reached=4, missed=5)], False),
        ([said(reached=5, missed=4)], True),
    ],
)
def test_a_node_is_unreachable_if_all_say_so_who_have_a_network(
    rows: list[Sighting], expected: bool
) -> None:
    assert unreachable(rows) is expected
    assert unreachable(rows[::-1]) is expected


def test_a_row_counts_while_it_changes_on_the_readers_own_clock() -> None:
    book = SightingBook()
    book.update([said(written=9e9)], 100.0)  # the gateway's clock is far ahead
    assert list(book.unreachable({NODE: 1}, 100.0)) == [NODE]
    book.update([said(written=9e9)], 100.0 + FRESH_S)
    assert book.unreachable({NODE: 1}, 100.0 + FRESH_S) == {}
    assert book.reached(100.0 + FRESH_S) == frozenset()
    book.update([said(written=5.0)], 140.0)  # and is set back
    assert book.unreachable({NODE: 1}, 140.0) == {NODE: "a cannot reach it: no answer"}
    assert book.unreachable({NODE: 2}, 140.0) == {}, "said of an earlier life"
    assert book.forgotten(140.0 + FORGOTTEN_S - 1) == []
    assert book.forgotten(140.0 + FORGOTTEN_S) == ["a"]


def new_lookout(cell: BlockCell, name: str, pool: NodePool) -> Lookout:
    return Lookout(name, cell.db, pool._map, pool, cell.clock, random.Random(name))


def rows_of(cell: BlockCell) -> dict[str, dict[NodeId, bool]]:
    found: dict[str, dict[NodeId, bool]] = {}
    for row in cell.db.read_now(read_sightings):
        found.setdefault(row.gateway, {})[row.node] = row.reachable
    return found


def test_a_gateway_tells_what_it_suspects_and_others_look_for_themselves() -> None:
    async def main(cell: BlockCell) -> None:
        data = data_of(1)
        await cell.put(data)
        pool, _ = cell.new_client(7)
        one, two = new_lookout(cell, "one", cell.pool), new_lookout(cell, "two", pool)
        transactions = cell.db.stats().transactions
        await one.look()
        await two.look()
        assert cell.db.stats().transactions == transactions, "nothing is amiss"
        victim = (await cell.slots_of(data))[0]
        cell.kill(victim)
        await cell.get(data)
        assert cell.pool.is_suspected(victim, Direction.READ)
        await one.look()
        assert rows_of(cell) == {"one": {victim: False}}
        (row,) = cell.db.read_now(read_sightings)
        assert row.reached > row.missed == 1
        # The other one has read nothing: it asks.
        await two.look()
        assert rows_of(cell)["two"] == {victim: False}
        before = cell.db.read_now(read_sightings)
        await one.look()
        assert cell.db.read_now(read_sightings) == before, "nothing new"
        await cell.clock.sleep(REFRESH_S + 1)
        await one.look()
        assert cell.db.read_now(read_sightings)[0].written > before[0].written
        assert cell.db.read_now(read_sightings)[0].since == before[0].since
        cell.heal()
        await cell.clock.sleep(30)
        await one.look()
        await two.look()
        await one.look()
        await two.look()
        assert rows_of(cell) == {}, "nobody misses it any more"
        await pool.aclose()

    simulate(main)


def test_a_node_that_the_map_calls_down_is_asked_by_every_gateway() -> None:
    async def main(cell: BlockCell) -> None:
        node = cell.node_ids[2]
        cell.set_state(node, NodeState.DOWN)
        lookout = new_lookout(cell, "one", cell.pool)
        await cell.clock.sleep(LOOK_S)
        await lookout.look()
        assert rows_of(cell) == {"one": {node: True}}
        await lookout.withdraw()
        assert rows_of(cell) == {}

    simulate(main)


def test_a_gateway_without_a_network_is_not_heard() -> None:
    async def main(cell: BlockCell) -> None:
        await cell.put(data_of(1))
        lookout = new_lookout(cell, "one", cell.pool)
        await cell.clock.sleep(60)
        cell.kill(*cell.node_ids)
        with pytest.raises(Exception, match=r".*"):
            await cell.get(data_of(1))
        await lookout.look()
        rows = cell.db.read_now(read_sightings)
        assert rows
        assert not any(row.is_heard for row in rows)
        cell.heal()

    simulate(main)


def test_a_node_that_a_gateway_reaches_is_not_out_and_is_once_nobody_does() -> None:
    async def main(cell: BlockCell) -> None:
        await cell.put(data_of(1))
        victim = (await cell.slots_of(data_of(1)))[0]
        cell.kill(victim)  # as repair meets it
        cell.set_state(victim, NodeState.DOWN)
        set_since(cell, victim, cell.clock.wall() - 1e6)
        service = new_repair(cell)
        await service.start()

        def say(**values: Any) -> None:
            row = said(written=cell.clock.wall(), **values)._replace(node=victim)
            cell.db.transact(lambda c: replace_sightings(c, "a", [row]))

        say(reachable=True)
        assert (await service.view()).out == frozenset()
        await cell.clock.sleep(FRESH_S)
        say(reachable=True)
        assert (await service.view()).out == frozenset()
        say(reachable=False)
        assert (await service.view()).out == {victim}
        say(reachable=True)
        assert (await service.view()).out == frozenset()
        await cell.clock.sleep(FRESH_S)
        assert (await service.view()).out == {victim}, "the gateway has fallen silent"
        assert moves(cell) == []
        await service._pool.aclose()

    simulate(main, nodes=10)
