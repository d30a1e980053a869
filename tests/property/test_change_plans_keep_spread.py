"""Whatever the cell looks like: plans end, keep volumes spread, and are done when they are done."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.change.layout import slot_bytes
from cluster.change.plans import MovePlan, plan_drain, plan_rebalance
from cluster.placement import plan_slots, spread_cap
from cluster.topology import CellView, NodeState, NodeView, VolumeState, VolumeView
from erasure.scheme import Scheme
from protocol.ids import NodeId, VolumeId

SCHEMES = (Scheme.rs(6, 3), Scheme.rs(4, 2), Scheme.replica(3))


def _node(number: int, draw: st.DrawFn) -> NodeView:
    capacity = draw(st.sampled_from((1 << 40, 2 << 40, 5 << 40)))
    return NodeView(
        node_id=NodeId.numbered(number),
        store_id=f"store-{number}",
        directory="",
        host=f"host-{draw(st.integers(0, 7))}",
        rack=f"rack-{draw(st.integers(0, 4))}",
        weight=draw(st.sampled_from((0.0, 0.5, 1.0, 1.0, 1.0, 3.0))),
        state=draw(st.sampled_from((NodeState.UP,) * 6 + (NodeState.DOWN, NodeState.SUSPECT))),
        state_since=0.0,
        incarnation=1,
        endpoint="127.0.0.1:1",
        pid=1,
        capacity_bytes=capacity,
        free_bytes=draw(st.sampled_from((capacity, capacity, capacity // 2, capacity // 9))),
        used_bytes=0,
        fragments=0,
        detail="",
    )


@st.composite
def cells(draw: st.DrawFn) -> CellView:
    """Up to 20 nodes in up to 5 racks; volumes that were laid out over some of them."""
    nodes = [_node(number, draw) for number in range(1, draw(st.integers(1, 20)) + 1)]
    rng = random.Random(draw(st.integers(0, 1 << 20)))
    volumes: list[VolumeView] = []
    for scheme in SCHEMES:
        before = [
            replace(node, state=NodeState.UP, weight=1.0) for node in nodes if rng.random() < 0.8
        ]
        for slots in plan_slots(before, scheme, draw(st.integers(0, 12)), rng):
            state = VolumeState.OPEN if rng.random() < 0.1 else VolumeState.SEALED
            size = rng.choice((0, 1 << 20, 1 << 29, 1 << 30))
            number = VolumeId(len(volumes) + 1)
            volumes.append(VolumeView(number, scheme, state, 1, slots, size, int(size > 0)))
    return CellView(tuple(nodes), tuple(volumes))


def _apply(view: CellView, plan: MovePlan) -> CellView:
    slots = {volume.volume_id: list(volume.slots) for volume in view.volumes}
    gained: Counter[NodeId] = Counter()
    for move in plan.moves:
        slots[move.volume][move.slot] = move.target
        gained[move.target] += move.bytes
        if move.source is not None:
            gained[move.source] -= move.bytes
    nodes = tuple(
        replace(node, free_bytes=node.free_bytes - gained[node.node_id]) for node in view.nodes
    )
    volumes = tuple(
        replace(volume, slots=tuple(slots[volume.volume_id])) for volume in view.volumes
    )
    return CellView(nodes, volumes)


def _check_spread(before: CellView, after: CellView, cap_of: dict[Scheme, int]) -> None:
    racks = {node.node_id: node.rack for node in before.nodes}
    hosts = {node.node_id: (node.rack, node.host) for node in before.nodes}
    for old, new in zip(before.volumes, after.volumes, strict=True):
        held = [node_id for node_id in new.slots if node_id is not None]
        assert len(held) == len(set(held)), "two slots of a volume on one node"
        if old.slots == new.slots:
            continue
        assert new.state is VolumeState.SEALED
        for domain in (racks, hosts):
            was = Counter(domain[node_id] for node_id in old.slots if node_id is not None)
            now = Counter(domain[node_id] for node_id in held)
            for name, count in now.items():
                assert count <= max(cap_of[new.scheme], was[name]), (
                    "a domain holds more than it may"
                )


def _caps(view: CellView, leaving: NodeId | None = None) -> dict[Scheme, int]:
    takers = [n for n in view.nodes if n.takes_new_volumes and n.node_id != leaving]
    return {scheme: spread_cap(takers, scheme) if takers else 0 for scheme in SCHEMES}


@settings(max_examples=300, deadline=None)
@given(cells())
def test_a_rebalance_keeps_volumes_spread_helps_and_has_nothing_left_to_do(view: CellView) -> None:
    plan = plan_rebalance(view)
    done = _apply(view, plan)
    _check_spread(view, done, _caps(view))
    assert plan_rebalance(done).moves == ()
    by_number = {node.node_id: node for node in view.nodes}
    assert all(by_number[move.target].takes_new_volumes for move in plan.moves)
    assert all(move.source is not None and move.bytes > 0 for move in plan.moves)


@settings(max_examples=300, deadline=None)
@given(cells(), st.data())
def test_a_drain_moves_or_explains_every_slot_of_its_node(
    view: CellView, data: st.DataObject
) -> None:
    gone = data.draw(st.sampled_from([node.node_id for node in view.nodes]))
    plan = plan_drain(view, gone)
    done = _apply(view, plan)
    _check_spread(view, done, _caps(view, gone))
    touched = {volume.volume_id for volume in view.volumes if gone in volume.slots}
    moved = {move.volume for move in plan.moves}
    held_back = {entry.volume for entry in (*plan.blocked, *plan.waiting)}
    assert moved | held_back == touched
    assert not moved & held_back
    assert all(gone not in v.slots for v in done.volumes if v.volume_id in moved)
    left = plan_drain(done, gone)
    assert left.moves == ()
    assert {entry.volume for entry in (*left.blocked, *left.waiting)} == held_back
    assert plan.bytes == sum(slot_bytes(v) for v in view.volumes if v.volume_id in moved)
