"""Planners: which volumes are sealed and what is opened instead."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from cell_rows import RS, SMALL, node_ids

from cluster.placement import (
    SealReason,
    StockTarget,
    plan_seals,
    plan_slots,
    plan_volumes,
)
from cluster.topology import CellView, NodeState, NodeView, VolumeState, VolumeView
from erasure.scheme import Scheme
from protocol.ids import NodeId, VolumeId
from protocol.limits import VOLUME_BLOCKS_MAX, VOLUME_BYTES_TARGET


def node(
    number: int, state: NodeState = NodeState.UP, *, rack: str = "rack", free_bytes: int = 1 << 40
) -> NodeView:
    return NodeView(
        node_id=NodeId.numbered(number),
        store_id=f"store-{number}",
        directory=f"/disks/{number}",
        host=f"host-{number}",
        rack=rack,
        weight=1.0,
        state=state,
        state_since=0.0,
        incarnation=1,
        endpoint="127.0.0.1:7000",
        pid=1,
        capacity_bytes=1 << 40,
        free_bytes=free_bytes,
        used_bytes=0,
        fragments=0,
        detail="",
    )


def nodes(count: int) -> tuple[NodeView, ...]:
    return tuple(node(number) for number in range(1, count + 1))


def volume(
    number: int, slots: tuple[NodeId | None, ...], *, stored_bytes: int = 0, blocks: int = 1
) -> VolumeView:
    scheme = RS if len(slots) == RS.n else Scheme.replica(len(slots))
    return VolumeView(VolumeId(number), scheme, VolumeState.OPEN, 1, slots, stored_bytes, blocks)


def reasons(view: CellView) -> dict[int, SealReason]:
    return {int(seal.volume_id): seal.reason for seal in plan_seals(view).seals}


# -- seals ---------------------------------------------------------------------------------------


def test_a_healthy_volume_with_room_stays_open() -> None:
    assert reasons(CellView(nodes(9), (volume(1, node_ids(9)),))) == {}


def test_a_volume_is_sealed_at_its_bytes_and_at_its_blocks() -> None:
    full = (
        volume(1, node_ids(9), stored_bytes=VOLUME_BYTES_TARGET),
        volume(2, node_ids(9), blocks=VOLUME_BLOCKS_MAX),
        volume(3, node_ids(9), stored_bytes=VOLUME_BYTES_TARGET - 1, blocks=VOLUME_BLOCKS_MAX - 1),
    )
    assert reasons(CellView(nodes(9), full)) == {1: SealReason.FULL, 2: SealReason.FULL}


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (NodeState.DOWN, SealReason.NODE_LOST),
        (NodeState.DRAINING, SealReason.NODE_LEAVING),
        (NodeState.DRAINED, SealReason.NODE_LEAVING),
        (NodeState.GONE, SealReason.NODE_LOST),
    ],
)
def test_a_volume_with_a_node_that_takes_no_writes_is_sealed(
    state: NodeState, reason: SealReason
) -> None:
    view = CellView((node(1, state), *nodes(9)[1:]), (volume(1, node_ids(9)),))
    assert reasons(view) == {1: reason}


def test_a_lost_node_is_the_reason_also_where_another_one_is_leaving() -> None:
    some = (node(1, NodeState.DOWN), node(2, NodeState.DRAINING), *nodes(9)[2:])
    assert reasons(CellView(some, (volume(1, node_ids(9)),))) == {1: SealReason.NODE_LOST}


def test_suspicion_alone_seals_nothing() -> None:
    view = CellView((node(1, NodeState.SUSPECT), *nodes(9)[1:]), (volume(1, node_ids(9)),))
    assert reasons(view) == {}


def names(*numbers: int) -> frozenset[NodeId]:
    return frozenset(NodeId.numbered(number) for number in numbers)


def test_a_volume_with_an_unwritable_node_is_sealed_if_there_are_others() -> None:
    held = (volume(1, node_ids(9)),)
    assert reasons(CellView(nodes(9), held, names(1))) == {}
    assert reasons(CellView(nodes(10), held, names(10))) == {}
    assert reasons(CellView(nodes(10), held, names(1))) == {1: SealReason.NODE_UNWRITABLE}
    assert reasons(CellView(nodes(10), held, names(1, 2, 10))) == {}
    assert reasons(CellView(nodes(12), held, names(1, 2, 3, 4))) == {1: SealReason.NODE_UNWRITABLE}
    idle = (*nodes(9), replace(node(10), weight=0.0))
    assert reasons(CellView(idle, held, names(1))) == {}


def test_a_volume_with_a_vacant_slot_is_sealed_once_there_is_a_node_for_it() -> None:
    vacant = volume(1, (*node_ids(8), None))
    assert reasons(CellView(nodes(8), (vacant,))) == {}
    assert reasons(CellView(nodes(9), (vacant,))) == {1: SealReason.WIDER}
    weightless = replace(node(9), weight=0.0)
    assert reasons(CellView((*nodes(8), weightless), (vacant,))) == {}


# -- stock ---------------------------------------------------------------------------------------


def test_the_stock_is_filled_up_and_no_further() -> None:
    targets = [StockTarget(RS, 3), StockTarget(SMALL, 2)]
    view = CellView(nodes(9), (volume(1, node_ids(9)),))
    plan = plan_volumes(view, targets, random.Random(1))
    assert [opening.scheme for opening in plan.openings] == [RS, RS, SMALL, SMALL]
    assert plan.unmet == ()
    assert all(len(opening.slots) == opening.scheme.n for opening in plan.openings)


def test_open_volumes_have_different_nodes_while_there_are_nodes_to_choose_from() -> None:
    for seed in range(50):
        plan = plan_volumes(CellView(nodes(10), ()), [StockTarget(RS, 4)], random.Random(seed))
        assert len({frozenset(opening.slots) for opening in plan.openings}) == 4


def test_a_new_volume_differs_from_those_already_open() -> None:
    stock = tuple(volume(n, node_ids(9)) for n in (1, 2))
    for seed in range(50):
        plan = plan_volumes(CellView(nodes(10), stock), [StockTarget(RS, 3)], random.Random(seed))
        (opening,) = plan.openings
        assert frozenset(opening.slots) != frozenset(node_ids(9))


def test_too_few_nodes_leave_slots_vacant_down_to_the_write_minimum() -> None:
    for count in (8, 7):
        plan = plan_volumes(CellView(nodes(count), ()), [StockTarget(RS, 1)], random.Random(1))
        (opening,) = plan.openings
        assert sorted(filter(None, opening.slots)) == list(node_ids(count))
        assert opening.slots[count:] == (None,) * (9 - count), "parity is what goes missing"


def test_below_the_write_minimum_nothing_is_opened() -> None:
    plan = plan_volumes(CellView(nodes(6), ()), [StockTarget(RS, 1)], random.Random(1))
    assert plan.openings == ()
    assert plan.unmet == (RS,)


def test_only_nodes_that_are_up_get_slots() -> None:
    others = [
        node(20 + number, state)
        for number, state in enumerate(NodeState)
        if state is not NodeState.UP
    ]
    slots = plan_slots([*nodes(9), *others], RS, 20, random.Random(3))
    assert {node_id for chosen in slots for node_id in chosen} == set(node_ids(9))


def test_unwritable_nodes_get_slots_only_for_want_of_others() -> None:
    for count in range(9, 14):
        for bad in range(count + 1):
            unwritable = names(*range(1, bad + 1))
            for slots in plan_slots(nodes(count), RS, 20, random.Random(bad), unwritable):
                assert len(set(slots)) == RS.n
                assert None not in slots
                assert len(set(slots) - unwritable) == min(RS.n, count - bad)


def test_a_cell_whose_disks_are_all_full_still_has_volumes() -> None:
    full = [node(number, free_bytes=0) for number in range(1, 10)]
    assert plan_slots(full, RS, 1, random.Random(1)) != []


def test_no_nodes_no_slots() -> None:
    assert plan_slots([], RS, 3, random.Random(1)) == []


def test_racks_that_are_too_few_are_used_as_evenly_as_they_allow() -> None:
    two_racks = [node(number, rack=f"rack-{number % 2}") for number in range(1, 13)]
    rack_of = {view.node_id: view.rack for view in two_racks}
    for slots in plan_slots(two_racks, RS, 40, random.Random(5)):
        racks = [rack_of[node_id] for node_id in slots if node_id is not None]
        assert sorted((racks.count("rack-0"), racks.count("rack-1"))) == [4, 5]


def test_every_node_gets_data_slots_and_parity_slots_alike() -> None:
    planned = plan_slots(nodes(9), RS, 900, random.Random(1))
    for node_id in node_ids(9):
        data = sum(1 for slots in planned if slots.index(node_id) < RS.k)
        assert abs(data - 600) <= 30


def test_crowded_nodes_are_left_out_while_the_rest_are_as_wide_and_spread_as_well() -> None:
    def chosen(*views: NodeView) -> set[NodeId]:
        plan = plan_volumes(CellView(views, ()), [StockTarget(RS, 20)], random.Random(3))
        assert len(plan.openings) == 20
        assert all(None not in opening.slots for opening in plan.openings)
        return {name for opening in plan.openings for name in opening.slots if name is not None}

    def crowded(view: NodeView) -> NodeView:
        return replace(view, placement_free_bytes=0)

    roomy = nodes(12)
    assert chosen(*map(crowded, roomy[:3]), *roomy[3:]) == set(node_ids(12)[3:])
    # Eight are too few for nine slots, and nine of one rack would all be lost with it.
    assert chosen(*map(crowded, roomy[:4]), *roomy[4:]) == set(node_ids(12))
    racks = [node(number, rack=f"rack-{(number - 1) // 9}") for number in range(1, 28)]
    assert chosen(*racks[:9], *map(crowded, racks[9:])) == set(node_ids(27))
