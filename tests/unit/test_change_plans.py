"""Planners of changes: where slots go, what stays, and what is in the way."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest

from cluster.change.layout import HEADROOM_SHARE, slot_bytes
from cluster.change.plans import (
    TOLERANCE,
    MovePlan,
    plan_drain,
    plan_json,
    plan_rebalance,
    plan_replace,
    plan_transcode,
)
from cluster.placement import fair_shares, plan_slots
from cluster.topology import CellView, NodeState, NodeView, VolumeState, VolumeView
from erasure.scheme import Scheme
from protocol.ids import NodeId, VolumeId

RS = Scheme.rs(6, 3)
GIB = 1 << 30


def node(number: int, rack: str = "", weight: float = 1.0, capacity: int = 1 << 44) -> NodeView:
    node_id = NodeId.numbered(number)
    return NodeView(
        node_id=node_id,
        store_id=f"store-{number}",
        directory=f"/disks/{node_id}",
        host=f"host-{number}",
        rack=rack or f"rack-{number}",
        weight=weight,
        state=NodeState.UP,
        state_since=0.0,
        incarnation=1,
        endpoint="127.0.0.1:1",
        pid=1,
        capacity_bytes=capacity,
        free_bytes=capacity,
        used_bytes=0,
        fragments=0,
        detail="",
    )


def filled(
    nodes: Sequence[NodeView], count: int, scheme: Scheme = RS, seed: int = 1, size: int = GIB
) -> CellView:
    """Sealed volumes of `size` bytes, laid out by the placement planner."""
    slots = plan_slots(nodes, scheme, count, random.Random(seed))
    volumes = [
        VolumeView(VolumeId(number), scheme, VolumeState.SEALED, 1, chosen, size, 256)
        for number, chosen in enumerate(slots, start=1)
    ]
    return CellView(tuple(nodes), tuple(volumes))


def after(view: CellView, plan: MovePlan) -> CellView:
    """The cell when all moves are done; checks each on the way."""
    slots = {volume.volume_id: list(volume.slots) for volume in view.volumes}
    for move in plan.moves:
        assert move.target not in slots[move.volume], "two slots of a volume on one node"
        if move.source is not None:
            assert slots[move.volume][move.slot] == move.source
        slots[move.volume][move.slot] = move.target
    volumes = tuple(
        replace(volume, slots=tuple(slots[volume.volume_id])) for volume in view.volumes
    )
    return CellView(view.nodes, volumes)


def held(view: CellView) -> Counter[NodeId]:
    """Bytes per node."""
    found: Counter[NodeId] = Counter({each.node_id: 0 for each in view.nodes})
    for volume in view.volumes:
        for node_id in volume.slots:
            if node_id is not None:
                found[node_id] += slot_bytes(volume)
    return found


def rack_heights(view: CellView) -> list[int]:
    """Per volume: the most slots in one rack."""
    racks = {each.node_id: each.rack for each in view.nodes}
    return [
        max(Counter(racks[node_id] for node_id in volume.slots if node_id).values())
        for volume in view.volumes
    ]


def with_state(view: CellView, node_id: NodeId, state: NodeState) -> CellView:
    nodes = (replace(each, state=state) if each.node_id == node_id else each for each in view.nodes)
    return CellView(tuple(nodes), view.volumes)


def racks(count: int, each: int) -> list[NodeView]:
    return [
        node(rack * each + number + 1, f"rack-{rack}")
        for rack in range(count)
        for number in range(each)
    ]


# -- drain ---------------------------------------------------------------------------------------


def test_a_drain_moves_every_slot_of_the_node_and_no_other() -> None:
    nodes = [node(number) for number in range(1, 13)]
    view = filled(nodes, 200)
    gone = nodes[2].node_id
    plan = plan_drain(with_state(view, gone, NodeState.DRAINING), gone)
    assert plan.blocked == ()
    assert {move.source for move in plan.moves} == {gone}
    assert plan.units == sum(gone in volume.slots for volume in view.volumes)
    assert held(after(view, plan))[gone] == 0


def test_a_drain_spreads_what_it_moves() -> None:
    nodes = [node(number) for number in range(1, 21)]
    view = filled(nodes, 1_000)
    gone = nodes[0].node_id
    rest = held(after(view, plan_drain(view, gone)))
    del rest[gone]
    assert max(rest.values()) < 1.02 * min(rest.values())


def test_a_drain_with_no_node_to_spare_says_what_blocks_every_volume() -> None:
    view = filled([node(number) for number in range(1, 10)], 5)
    plan = plan_drain(view, NodeId("node-04"))
    assert plan.moves == ()
    assert [blocked.volume for blocked in plan.blocked] == [VolumeId(n) for n in range(1, 6)]
    assert {blocked.reason for blocked in plan.blocked} == {
        "no node may take the slot: 8 hold another slot of the volume; add a node"
    }
    assert plan_json(plan)["blocked"][0]["volume"] == "v1"


def test_a_drain_leaves_the_headroom_of_repair_alone() -> None:
    nodes = [node(number) for number in range(1, 11)]
    view = filled(nodes, 9)
    spare_gib = slot_bytes(view.volumes[0])
    tight = [
        replace(each, free_bytes=int(HEADROOM_SHARE * each.capacity_bytes) + spare_gib - 1)
        for each in nodes
    ]
    plan = plan_drain(CellView(tuple(tight), view.volumes), nodes[0].node_id)
    assert plan.moves == ()
    assert "1 have no room above the headroom of repair" in plan.blocked[0].reason


def test_open_volumes_and_volumes_in_motion_wait() -> None:
    nodes = [node(number) for number in range(1, 13)]
    view = filled(nodes, 12)
    first, second = [v for v in view.volumes if nodes[0].node_id in v.slots][:2]
    volumes = tuple(
        replace(v, state=VolumeState.OPEN) if v.volume_id == first.volume_id else v
        for v in view.volumes
    )
    plan = plan_drain(CellView(view.nodes, volumes), nodes[0].node_id, {second.volume_id})
    assert {waits.volume for waits in plan.waiting} == {first.volume_id, second.volume_id}
    assert plan.blocked == ()
    assert not {move.volume for move in plan.moves} & {first.volume_id, second.volume_id}


def test_an_open_volume_without_a_target_is_blocked_and_does_not_merely_wait() -> None:
    view = filled([node(number) for number in range(1, 10)], 1)
    opened = CellView(view.nodes, (replace(view.volumes[0], state=VolumeState.OPEN),))
    for plan in (
        plan_drain(opened, NodeId("node-04")),
        plan_replace(opened, NodeId("node-04"), NodeId("node-05")),
    ):
        assert (plan.moves, plan.waiting) == ((), ())
        assert [blocked.volume for blocked in plan.blocked] == [VolumeId(1)]
        assert plan_json(plan)["waiting"] == []


@pytest.mark.parametrize("lost", range(1, 13))
def test_four_racks_of_three_stay_at_three_slots_a_rack_whoever_is_drained(lost: int) -> None:
    view = filled(racks(4, 3), 60)
    plan = plan_drain(view, NodeId.numbered(lost))
    assert plan.blocked == ()
    assert max(rack_heights(after(view, plan))) <= 3


# -- replace -------------------------------------------------------------------------------------


def test_a_replaced_disk_gives_all_its_slots_to_the_new_one() -> None:
    nodes = [node(number) for number in range(1, 10)]
    view = filled(nodes, 40)
    new = replace(node(10), rack=nodes[3].rack, host=nodes[3].host)
    wide = CellView((*view.nodes, new), view.volumes)
    plan = plan_replace(wide, nodes[3].node_id, new.node_id)
    assert plan.blocked == ()
    assert {move.target for move in plan.moves} == {new.node_id}
    assert held(after(wide, plan))[new.node_id] == held(view)[nodes[3].node_id]


def test_a_dead_disk_is_replaced_without_reading_it() -> None:
    nodes = [node(number) for number in range(1, 10)]
    view = filled(nodes, 10)
    wide = CellView((*view.nodes, node(10)), view.volumes)
    dead = with_state(wide, nodes[3].node_id, NodeState.DOWN)
    plan = plan_replace(dead, nodes[3].node_id, NodeId.numbered(10))
    assert plan.units == 10
    assert {move.source for move in plan.moves} == {None}


def test_a_replacement_that_is_not_up_blocks_and_says_so() -> None:
    nodes = [node(number) for number in range(1, 10)]
    view = filled(nodes, 3)
    plan = plan_replace(view, nodes[0].node_id, NodeId("node-77"))
    assert {blocked.reason for blocked in plan.blocked} == {"node-77 takes no slots now"}


# -- rebalance -----------------------------------------------------------------------------------


def off_by(view: CellView) -> float:
    """The largest distance of a node from its share, as a part of the share."""
    weights = [each.weight * each.capacity_bytes for each in view.nodes]
    share = fair_shares(view.nodes, RS, weights)
    total = sum(slot_bytes(volume) for volume in view.volumes)
    bytes_held = held(view)
    return max(abs(bytes_held[n] - share[n] * total) / (share[n] * total) for n in share)


def test_new_nodes_get_their_share_and_nobody_else_gets_anything() -> None:
    old = [node(number) for number in range(1, 13)]
    view = filled(old, 400)
    new = [node(number) for number in range(13, 16)]
    wide = CellView((*view.nodes, *new), view.volumes)
    plan = plan_rebalance(wide)
    assert {move.target for move in plan.moves} <= {each.node_id for each in new}
    done = after(wide, plan)
    assert off_by(done) <= TOLERANCE + 0.01
    least = sum(sorted(held(done)[each.node_id] for each in new))
    assert plan.bytes == least, "a byte moved more than once, or to a node that did not lack it"


def test_weights_and_capacities_are_followed() -> None:
    nodes = [node(n, weight=1 + n % 2, capacity=(1 + n % 3) << 43) for n in range(1, 41)]
    view = filled([replace(each, weight=1.0, capacity_bytes=1 << 43) for each in nodes], 2_000)
    uneven = CellView(tuple(nodes), view.volumes)
    done = after(uneven, plan_rebalance(uneven))
    assert off_by(uneven) > 0.5
    assert off_by(done) <= TOLERANCE + 0.01


def test_a_balanced_cell_is_left_alone() -> None:
    assert plan_rebalance(filled([node(number) for number in range(1, 13)], 400)).moves == ()


def test_volumes_with_lost_slots_wait_for_repair() -> None:
    old = [node(number) for number in range(1, 13)]
    view = filled(old, 100)
    wide = CellView((*view.nodes, node(13)), view.volumes)
    hurt = with_state(wide, old[0].node_id, NodeState.DOWN)
    whole = {v.volume_id for v in view.volumes if old[0].node_id not in v.slots}
    assert {move.volume for move in plan_rebalance(hurt).moves} <= whole


def test_a_rebalance_over_a_hundred_thousand_volumes_is_planned_in_seconds() -> None:
    old = [node(number, f"rack-{number % 20}") for number in range(1, 181)]
    view = filled(old, 100_000)
    new = [node(number, f"rack-{number % 20}") for number in range(181, 201)]
    wide = CellView((*view.nodes, *new), view.volumes)
    started = time.process_time()
    plan = plan_rebalance(wide)
    assert time.process_time() - started < 30
    assert plan.units > 80_000
    assert off_by(after(wide, plan)) <= TOLERANCE + 0.01


# -- transcode -----------------------------------------------------------------------------------


def test_transcode_takes_sealed_volumes_of_the_scheme_and_names_open_ones() -> None:
    nodes = [node(number) for number in range(1, 13)]
    view = filled(nodes, 3)
    other = filled(nodes, 2, Scheme.rs(4, 2), seed=2)
    volumes = (
        *view.volumes[:2],
        replace(view.volumes[2], state=VolumeState.OPEN),
        *(replace(v, volume_id=VolumeId(v.volume_id + 10)) for v in other.volumes),
    )
    plan = plan_transcode(CellView(view.nodes, volumes), RS, Scheme.rs(4, 2))
    assert plan.volumes == (VolumeId(1), VolumeId(2))
    assert plan.bytes == 2 * GIB
    assert [blocked.volume for blocked in plan.blocked] == [VolumeId(3)]
    assert plan_json(plan)["volumes"] == ["v1", "v2"]
