"""What holds for the slots of new volumes, whatever the topology, the weights and the seed."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.placement import Slots, StockTarget, plan_seals, plan_slots, plan_volumes
from cluster.topology import CellView, NodeState, NodeView, VolumeState, VolumeView
from erasure.scheme import Scheme
from protocol.ids import NodeId, VolumeId

SCHEMES = [
    Scheme.parse(name)
    for name in ("rs-6-3", "rs-2-1", "rs-10-4", "rs-16-6", "replica-1", "replica-3", "replica-4")
]


def node(number: int, rack: str, host: str, weight: float = 1.0, free: int = 1 << 40) -> NodeView:
    return NodeView(
        node_id=NodeId.numbered(number),
        store_id=f"store-{number}",
        directory="",
        host=host,
        rack=rack,
        weight=weight,
        state=NodeState.UP,
        state_since=0.0,
        incarnation=1,
        endpoint="127.0.0.1:7000",
        pid=1,
        capacity_bytes=1 << 40,
        free_bytes=free,
        used_bytes=0,
        fragments=0,
        detail="",
    )


@st.composite
def topologies(draw: st.DrawFn) -> list[NodeView]:
    racks = draw(st.integers(1, 6))
    hosts = draw(st.integers(1, 4))
    count = draw(st.integers(1, 40))
    places = st.tuples(st.integers(0, racks - 1), st.integers(0, hosts - 1))
    weights = draw(st.sampled_from([[1.0], [1.0, 2.0], [0.01, 1.0, 100.0]]))
    views = []
    for number in range(1, count + 1):
        rack, host = draw(places)
        weight = draw(st.sampled_from(weights))
        free = draw(st.sampled_from([0, 1, 1 << 30, 1 << 42]))
        views.append(node(number, f"rack-{rack}", f"host-{host}", weight, free))
    return views


def spread(slots: Slots, views: list[NodeView], *, by_host: bool) -> Counter[object]:
    """Slots per rack, or per host of a rack."""
    domains = {view.node_id: view.domain for view in views}
    named = [domains[node_id] for node_id in slots if node_id is not None]
    return Counter(domain if by_host else domain.rack for domain in named)


def least_cap(views: list[NodeView], width: int, wanted: int) -> int:
    """The smallest bound per rack and host, from `wanted` on, that leaves room for `width`."""
    nodes_of = Counter(view.domain for view in views)
    for cap in range(wanted, wanted + width + 1):
        racks: Counter[str] = Counter()
        for domain, count in nodes_of.items():
            racks[domain.rack] += min(cap, count)
        if sum(min(cap, count) for count in racks.values()) >= width:
            return cap
    raise AssertionError("a cap of `width` always has room")


@settings(max_examples=300, deadline=None)
@given(topologies(), st.sampled_from(SCHEMES), st.integers(0, 2**32))
def test_slots_are_distinct_nodes_spread_as_far_as_the_topology_allows(
    views: list[NodeView], scheme: Scheme, seed: int
) -> None:
    width = min(scheme.n, len(views))
    cap = least_cap(views, width, max(scheme.m, 1))
    planned = plan_slots(views, scheme, 7, random.Random(seed))
    assert len(planned) == 7
    for slots in planned:
        held = [node_id for node_id in slots if node_id is not None]
        assert len(slots) == scheme.n
        assert len(held) == len(set(held)) == width, "no vacant slot while there is a node for it"
        assert max(spread(slots, views, by_host=False).values()) <= cap
        assert max(spread(slots, views, by_host=True).values()) <= cap


@settings(max_examples=50, deadline=None)
@given(topologies(), st.sampled_from(SCHEMES), st.integers(0, 2**32), st.integers(0, 100))
def test_a_seed_gives_the_same_slots_whatever_the_order_of_the_nodes(
    views: list[NodeView], scheme: Scheme, seed: int, shuffle: int
) -> None:
    shuffled = list(views)
    random.Random(shuffle).shuffle(shuffled)
    planned = plan_slots(views, scheme, 5, random.Random(seed))
    assert planned == plan_slots(shuffled, scheme, 5, random.Random(seed))


@given(st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_losing_one_of_four_racks_never_takes_more_than_three_fragments(seed: int) -> None:
    views = [node(n, f"rack-{n % 4}", f"host-{n}") for n in range(1, 13)]
    for slots in plan_slots(views, Scheme.rs(6, 3), 50, random.Random(seed)):
        assert max(spread(slots, views, by_host=False).values()) <= 3


@given(st.integers(0, 2**32), st.sampled_from([12, 17, 30]))
@settings(max_examples=20, deadline=None)
def test_the_load_follows_the_weights(seed: int, count: int) -> None:
    """Within a few percent, while no node's share exceeds a whole slot of every volume."""
    views = [
        node(n, f"rack-{n % 6}", f"host-{n % 3}", weight=1 + n % 2) for n in range(1, count + 1)
    ]
    volumes = 8_000  # rounds err independently: far fewer leave some node 5 % off
    scheme = Scheme.rs(4, 2)
    planned = plan_slots(views, scheme, volumes, random.Random(seed))
    load = Counter(node_id for slots in planned for node_id in slots)
    total = sum(view.weight for view in views)
    for view in views:
        expected = volumes * scheme.n * view.weight / total
        assert abs(load[view.node_id] - expected) <= 0.05 * expected


@given(st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_equal_nodes_carry_equal_loads(seed: int) -> None:
    views = [node(n, f"rack-{n % 5}", f"host-{n}") for n in range(1, 26)]
    planned = plan_slots(views, Scheme.rs(6, 3), 2_500, random.Random(seed))
    load = Counter(node_id for slots in planned for node_id in slots)
    assert max(load.values()) - min(load.values()) <= 5


@settings(max_examples=200, deadline=None)
@given(topologies(), st.sampled_from(SCHEMES), st.data(), st.integers(0, 2**32))
def test_what_is_opened_around_unwritable_nodes_is_not_sealed_again(
    views: list[NodeView], scheme: Scheme, data: st.DataObject, seed: int
) -> None:
    unwritable = frozenset(data.draw(st.sets(st.sampled_from([view.node_id for view in views]))))
    empty = CellView(tuple(views), (), unwritable)
    plan = plan_volumes(empty, [StockTarget(scheme, 4)], random.Random(seed))
    opened = tuple(
        VolumeView(VolumeId(number), scheme, VolumeState.OPEN, 1, opening.slots, 0, 0)
        for number, opening in enumerate(plan.openings, 1)
    )
    assert plan_seals(CellView(tuple(views), opened, unwritable)).seals == ()
