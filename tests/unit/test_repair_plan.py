"""What repair does next: order, targets, caps, headroom, and who is out."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Sequence

import pytest

from cluster.debts import VolumeDebts
from cluster.move_rows import MoveRow
from cluster.repair.plan import (
    REASON_LOST,
    NodeWord,
    RepairBudget,
    RepairPlan,
    RepairView,
    is_out,
    plan_repair,
    volumes_before,
)
from cluster.repair.settings import RepairSettings
from cluster.topology import NodeState, NodeView, VolumeState, VolumeView
from erasure.scheme import Scheme
from protocol.ids import NodeId, VolumeId
from protocol.limits import GIB

RS = Scheme.rs(6, 3)
NOW = 1_000_000.0
BUDGET = RepairBudget(volumes_max=1_000, headroom_share=0.02)
SETTINGS = RepairSettings()


def node(number: int, **changes: object) -> NodeView:
    view = NodeView(
        node_id=NodeId.numbered(number),
        store_id="",
        directory="",
        host=f"h{number}",
        rack=f"h{number}",
        weight=1.0,
        state=NodeState.UP,
        state_since=0.0,
        incarnation=1,
        endpoint="127.0.0.1:1",
        pid=1,
        capacity_bytes=100 * GIB,
        free_bytes=50 * GIB,
        used_bytes=0,
        fragments=0,
        detail="",
    )
    return dataclasses.replace(view, **changes)  # type: ignore[arg-type]


def volume(
    number: int, slots: Sequence[int | None], state: VolumeState = VolumeState.SEALED
) -> VolumeView:
    names = tuple(None if slot is None else NodeId.numbered(slot) for slot in slots)
    return VolumeView(VolumeId(number), RS, state, 1, names, GIB, 100)


def plan(
    nodes: Sequence[NodeView],
    volumes: Sequence[VolumeView],
    *,
    debts: Sequence[VolumeDebts] = (),
    moves: Sequence[MoveRow] = (),
    avoid: frozenset[NodeId] = frozenset(),
    budget: RepairBudget = BUDGET,
) -> RepairPlan:
    out = frozenset(item.node_id for item in nodes if is_out(item, NOW, SETTINGS))
    view = RepairView(tuple(nodes), out, tuple(volumes), tuple(debts), tuple(moves), avoid)
    return plan_repair(view, budget, random.Random(1))


def down(number: int, **changes: object) -> NodeView:
    return node(number, state=NodeState.DOWN, **changes)


@pytest.mark.parametrize("state", [state for state in NodeState if state not in ("down", "gone")])
def test_a_node_in_any_other_state_is_never_out(state: NodeState) -> None:
    assert not is_out(node(1, state=state, disk_failed=True), NOW, SETTINGS)


def test_out_is_a_matter_of_time_or_of_a_bad_disk() -> None:
    early = NOW - SETTINGS.out_after_s + 1
    assert not is_out(down(1, state_since=early), NOW, SETTINGS)
    assert is_out(down(1, state_since=early - 1), NOW, SETTINGS)
    assert is_out(down(1, state_since=early, disk_failed=True), NOW, SETTINGS)
    assert is_out(node(1, state=NodeState.GONE, state_since=NOW), NOW, SETTINGS)


def test_a_node_that_somebody_reads_from_or_that_answers_is_not_out() -> None:
    gone = down(1, state_since=0.0)
    assert not is_out(gone, NOW, SETTINGS, is_read=True)
    assert not is_out(gone, NOW, SETTINGS, NodeWord.SERVES)
    refusing = dataclasses.replace(gone, state_since=NOW - 2 * SETTINGS.out_after_s)
    assert not is_out(refusing, NOW, SETTINGS, NodeWord.REFUSES)
    long_ago = NOW - SETTINGS.refusing_out_after_s
    assert is_out(down(1, state_since=long_ago), NOW, SETTINGS, NodeWord.REFUSES)


def test_fewest_spare_fragments_come_first_then_shared_hosts_then_age() -> None:
    nodes = [down(1, state_since=10.0), down(2, state_since=20.0)]
    nodes += [node(number, host=f"h{number // 2}") for number in range(3, 30)]
    apart = [1, 3, 5, 7, 9, 11, 13, 15, 17]
    together = [1, 4, 5, 7, 9, 11, 13, 14, 15]
    both = [1, 2, 5, 7, 9, 11, 13, 15, 17]
    later = [2, 3, 5, 7, 9, 11, 13, 15, 17]
    made = plan(nodes, [volume(1, later), volume(2, apart), volume(3, together), volume(4, both)])
    assert [item.volume for item in made.repairs] == [4, 3, 2, 1]
    assert made.repairs[0].spare == 1


def test_a_debt_costs_a_spare_fragment_too() -> None:
    nodes = [down(1), *(node(number) for number in range(2, 20))]
    owing = volume(7, range(2, 11))
    lost = volume(3, range(1, 10))
    debts = [VolumeDebts(VolumeId(7), 2, 5, 1.0), VolumeDebts(VolumeId(7), 3, 1, 1.0)]
    made = plan(nodes, [lost, owing], debts=debts)
    assert [(item.volume, item.spare) for item in made.repairs] == [(7, 1), (3, 2)]
    assert made.repairs[0].debts == (2, 3)
    assert made.repairs[0].moves == ()


def test_targets_are_distinct_and_keep_the_spread_cap() -> None:
    nodes = [down(1, rack="r0"), down(2, rack="r0")]
    nodes += [node(number, rack=f"r{number % 4}") for number in range(3, 31)]
    slots = [1, 2, 4, 8, 5, 9, 6, 10, 7]  # racks 0, 0 (lost), 0 0, 1 1, 2 2, 3
    made = plan(nodes, [volume(number, slots) for number in range(200)])
    racks = {item.node_id: item.rack for item in nodes}
    for repair in made.repairs:
        assert len(repair.moves) == 2
        targets = [move.target for move in repair.moves]
        held = [NodeId.numbered(slot) for slot in slots[2:]] + targets
        assert len(set(held)) == 9
        assert max(Counter(racks[name] for name in held).values()) <= 3


def test_the_cap_gives_way_before_a_slot_stays_lost() -> None:
    nodes = [down(1, rack="r1"), *(node(number, rack="r2") for number in range(2, 12))]
    made = plan(nodes, [volume(1, range(1, 10))])
    assert len(made.repairs[0].moves) == 1


def test_targets_follow_weight_and_free_space() -> None:
    nodes = [down(1), *(node(number) for number in range(2, 10))]
    nodes += [node(20, free_bytes=10 * GIB), node(21, free_bytes=40 * GIB), node(22, weight=0.0)]
    tiny = [dataclasses.replace(volume(n, range(1, 10)), stored_bytes=6) for n in range(1_000)]
    made = plan(nodes, tiny)
    load = Counter(move.target for repair in made.repairs for move in repair.moves)
    assert set(load) == {NodeId.numbered(20), NodeId.numbered(21)}
    assert 3.0 < load[NodeId.numbered(21)] / load[NodeId.numbered(20)] < 5.5


def test_the_headroom_stays_free_also_when_many_slots_are_planned_at_once() -> None:
    nodes = [down(1), *(node(number) for number in range(2, 10))]
    nodes.append(node(20, free_bytes=3 * GIB))  # of 100 GiB: one above the headroom
    made = plan(nodes, [volume(number, range(1, 10)) for number in range(20)])
    slot_bytes = RS.chunk_bytes(GIB)
    planned = sum(len(item.moves) for item in made.repairs)
    assert planned == GIB // slot_bytes
    assert len(made.blocked) == 20 - planned
    assert "headroom" in made.blocked[0].reason


def test_a_move_under_way_keeps_its_target_while_it_is_fit() -> None:
    nodes = [down(1), *(node(number) for number in range(2, 30))]
    lost = volume(1, range(1, 10))
    target = NodeId.numbered(25)
    row = MoveRow(VolumeId(1), 0, target, 1, REASON_LOST, None, 0.0)
    assert plan(nodes, [lost], moves=[row]).repairs[0].moves[0].target == target
    other = plan(nodes, [lost], moves=[row], avoid=frozenset({target})).repairs[0].moves[0]
    assert other.target != target
    nodes[24] = down(25, state_since=NOW)
    assert plan(nodes, [lost], moves=[row]).repairs[0].moves[0].target != target


def test_moves_of_a_node_that_is_back_are_abandoned_and_those_of_jobs_are_not() -> None:
    nodes = [node(number) for number in range(1, 20)]
    whole = volume(1, range(1, 10))
    mine = MoveRow(VolumeId(1), 0, NodeId.numbered(15), 1, REASON_LOST, None, 0.0)
    drain = MoveRow(VolumeId(1), 1, NodeId.numbered(16), 1, "drain", 7, 0.0)
    made = plan(nodes, [whole], moves=[mine, drain])
    assert made.abandon == ((VolumeId(1), 0),)
    assert made.repairs == ()


def test_vacant_slots_are_repaired_in_sealed_volumes_only() -> None:
    nodes = [node(number) for number in range(1, 20)]
    slots = [*range(1, 9), None]
    made = plan(nodes, [volume(1, slots), volume(2, slots, VolumeState.OPEN)])
    assert [(item.volume, item.moves[0].slot) for item in made.repairs] == [(1, 8)]


def test_debts_on_a_node_that_is_away_wait_for_it() -> None:
    nodes = [down(1, state_since=NOW - 5), *(node(number) for number in range(2, 20))]
    debts = [VolumeDebts(VolumeId(1), 0, 3, 1.0)]
    made = plan(nodes, [volume(1, range(1, 10))], debts=debts)
    assert made.repairs == ()
    assert "not yet out" in made.blocked[0].reason


def test_a_plan_takes_on_no_more_than_its_budget_and_the_worst_first() -> None:
    nodes = [down(1), down(2), *(node(number) for number in range(3, 40))]
    one, two = [1, *range(3, 11)], [1, 2, *range(3, 10)]
    volumes = [volume(number, two if number % 10 == 0 else one) for number in range(100)]
    made = plan(nodes, volumes, budget=RepairBudget(10, 0.02))
    assert sorted(item.volume for item in made.repairs) == list(range(0, 100, 10))
    assert made.left == 90


def test_a_volume_s_place_in_the_order_is_where_the_plan_takes_it_on() -> None:
    nodes = [down(1), down(2), *(node(number) for number in range(3, 40))]
    one, two = [1, *range(3, 11)], [1, 2, *range(3, 10)]
    volumes = [volume(number, two if number % 10 == 0 else one) for number in range(40)]
    volumes.append(volume(99, range(3, 12)))
    view = RepairView(tuple(nodes), frozenset({NodeId.numbered(1), NodeId.numbered(2)}),
                      tuple(volumes))  # fmt: skip
    made = plan_repair(view, RepairBudget(100, 0.02), random.Random(1))
    places = [volumes_before(view, item.volume) for item in made.repairs]
    assert places == list(range(40))
    assert volumes_before(view, VolumeId(99)) is None, "it lost nothing"


def test_the_same_view_and_seed_give_the_same_plan() -> None:
    nodes = [down(1), *(node(number) for number in range(2, 30))]
    volumes = [volume(number, range(1, 10)) for number in range(50)]
    assert plan(nodes, volumes) == plan(nodes, volumes)
