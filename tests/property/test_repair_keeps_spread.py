"""Repair puts no more of a block into one rack than the next loss of a rack may take."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Callable, Sequence

from hypothesis import example, given, settings
from hypothesis import strategies as st

from cluster.placement import plan_slots, spread_cap
from cluster.repair.plan import RepairBudget, RepairPlan, RepairView, plan_repair
from cluster.topology import NodeState, NodeView, VolumeState, VolumeView
from erasure.scheme import Scheme
from protocol.ids import NodeId, VolumeId
from protocol.limits import GIB

VOLUMES = 40
BUDGET = RepairBudget(volumes_max=VOLUMES, headroom_share=0.02)
RS = Scheme.rs(6, 3)

Slots = tuple[NodeId | None, ...]


def _node(number: int, racks: int, hosts: int) -> NodeView:
    return NodeView(
        node_id=NodeId.numbered(number + 1),
        store_id="",
        directory="",
        host=f"h{number // racks % hosts}",
        rack=f"r{number % racks}",
        weight=1.0,
        state=NodeState.UP,
        state_since=0.0,
        incarnation=1,
        endpoint="127.0.0.1:1",
        pid=1,
        capacity_bytes=1_000 * GIB,
        free_bytes=900 * GIB,
        used_bytes=0,
        fragments=0,
        detail="",
    )


def _lose(nodes: Sequence[NodeView], lost: Callable[[NodeView], bool]) -> list[NodeView]:
    return [
        dataclasses.replace(node, state=NodeState.GONE) if lost(node) else node for node in nodes
    ]


def _repair(
    nodes: Sequence[NodeView], scheme: Scheme, held: Sequence[Slots], seed: int
) -> tuple[RepairPlan, list[Slots]]:
    """The plan, and the slots of each volume when it has been carried out."""
    volumes = tuple(
        VolumeView(VolumeId(number + 1), scheme, VolumeState.SEALED, 1, slots, GIB, 100)
        for number, slots in enumerate(held)
    )
    out = frozenset(node.node_id for node in nodes if node.state is NodeState.GONE)
    plan = plan_repair(RepairView(tuple(nodes), out, volumes), BUDGET, random.Random(seed))
    after = [[None if name in out else name for name in slots] for slots in held]
    for repair in plan.repairs:
        for move in repair.moves:
            assert after[repair.volume - 1][move.slot] is None, "only lost slots are made"
            after[repair.volume - 1][move.slot] = move.target
    return plan, [tuple(slots) for slots in after]


def _check(nodes: Sequence[NodeView], scheme: Scheme, held: Sequence[Slots]) -> None:
    """All slots that there are nodes for are filled, on distinct nodes, within the spread cap."""
    alive = {node.node_id: node for node in nodes if node.takes_new_volumes}
    cap = spread_cap(list(alive.values()), scheme)
    for slots in held:
        names = [name for name in slots if name is not None]
        assert len(names) == len(set(names)) == min(scheme.n, len(alive))
        racks = Counter(alive[name].rack for name in names)
        hosts = Counter((alive[name].rack, alive[name].host) for name in names)
        assert max(racks.values()) <= cap
        assert max(hosts.values()) <= cap


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    racks=st.integers(2, 6),
    per_rack=st.integers(2, 6),
    hosts=st.integers(1, 3),
    scheme=st.sampled_from((RS, Scheme.rs(4, 2), Scheme.replica(3))),
)
@example(seed=1, racks=4, per_rack=3, hosts=3, scheme=RS)
def test_after_a_node_and_then_a_rack_repair_leaves_no_rack_more_than_the_topology_asks_for(
    seed: int, racks: int, per_rack: int, hosts: int, scheme: Scheme
) -> None:
    rng = random.Random(seed)
    nodes = [_node(number, racks, hosts) for number in range(racks * per_rack)]
    held: list[Slots] = [tuple(slots) for slots in plan_slots(nodes, scheme, VOLUMES, rng)]
    _check(nodes, scheme, held)
    gone = rng.choice(nodes).node_id
    nodes = _lose(nodes, lambda node: node.node_id == gone)
    _, held = _repair(nodes, scheme, held, seed)
    _check(nodes, scheme, held)
    rack = f"r{rng.randrange(racks)}"
    nodes = _lose(nodes, lambda node: node.rack == rack)
    _, held = _repair(nodes, scheme, held, seed)
    _check(nodes, scheme, held)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), per_rack=st.integers(3, 5))
@example(seed=1, per_rack=3)
def test_four_racks_stay_within_m_of_every_block_after_each_of_two_losses(
    seed: int, per_rack: int
) -> None:
    """rs-6-3: a node is lost, then a whole rack.  Every block stays readable throughout, and no
    rack ever holds more than m fragments of it."""
    rng = random.Random(seed)
    nodes = [_node(number, 4, 3) for number in range(4 * per_rack)]
    rack_of = {node.node_id: node.rack for node in nodes}
    held: list[Slots] = [tuple(slots) for slots in plan_slots(nodes, RS, VOLUMES, rng)]
    gone, rack = rng.choice(nodes).node_id, f"r{rng.randrange(4)}"
    losses: tuple[Callable[[NodeView], bool], ...] = (
        lambda node: node.node_id == gone,
        lambda node: node.rack == rack,
    )
    for lost in losses:
        nodes = _lose(nodes, lost)
        plan, held = _repair(nodes, RS, held, seed)
        assert all(repair.spare >= 0 for repair in plan.repairs), "nothing became unreadable"
        for slots in held:
            there = Counter(rack_of[name] for name in slots if name is not None)
            assert max(there.values()) <= RS.m
