"""The nemesis keeps its budget, and a seed draws the same faults again."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest

from chaos import faults
from chaos.budget import FaultAtlas, Impairments, spare_after_loss
from chaos.evidence import SlotState, Stripe
from chaos.faults import FaultKind
from chaos.nemesis import Nemesis, NemesisPlan
from erasure.scheme import Scheme
from protocol.ids import BlockHash, NodeId, VolumeId
from storage_node.interface import FragmentKey

NODES = tuple(NodeId.numbered(number) for number in range(1, 10))


class FakeView:
    """Nine nodes, of which some are out."""

    def __init__(self) -> None:
        self.out: list[str] = []
        self.spare = 3
        self.since = math.inf

    def nodes(self) -> Sequence[NodeId]:
        return NODES

    def gateways(self) -> Sequence[str]:
        return ("gateway-1", "gateway-2")

    def impaired_nodes(self) -> Sequence[str]:
        return self.out

    def spare_after_loss(self, _node: NodeId) -> int:
        return self.spare

    def seconds_since_loss(self) -> float:
        return self.since


def draws(view: FakeView, impaired_max: int, count: int = 400) -> list[faults.Fault]:
    plan = NemesisPlan(dict.fromkeys(FaultKind, 1.0), 10.0, impaired_max)
    nemesis = Nemesis(plan, view, random.Random(5))
    drawn = [nemesis.draw() for _ in range(count)]
    return [fault for fault in drawn if fault is not None]


def test_a_seed_draws_the_same_faults_again() -> None:
    assert draws(FakeView(), 9) == draws(FakeView(), 9)


def test_every_kind_is_drawn() -> None:
    assert {fault.kind for fault in draws(FakeView(), 9)} == set(FaultKind)


def test_with_m_nodes_out_no_other_node_is_touched() -> None:
    view = FakeView()
    view.out = ["node-01", "node-02", "node-03"]
    for fault in draws(view, 3):
        match fault:
            case faults.LoseDisk() | faults.DiskFull() | faults.SlowDisk() | faults.KillAtDisk():
                assert fault.node in view.out
            case faults.Kill() | faults.Pause() | faults.KillAtStep() | faults.DoubleStart():
                assert fault.process in view.out or not fault.process.startswith("node")
            case faults.Partition():
                assert set(fault.side) <= set(view.out)
            case faults.PowerCut():
                pytest.fail("a power cut takes more than m nodes")
            case _:
                pass


def test_no_disk_is_lost_while_a_stripe_has_no_spare_or_another_was_lost_just_now() -> None:
    view = FakeView()
    view.spare = -1
    losses = (faults.LoseDisk, faults.EmptyDisk)
    assert not [fault for fault in draws(view, 9) if isinstance(fault, losses)]
    view.spare, view.since = 0, 10.0
    assert not [fault for fault in draws(view, 9) if isinstance(fault, losses)]
    view.since = 120.0
    assert [fault for fault in draws(view, 9) if isinstance(fault, losses)]


def test_plans_differ_from_seed_to_seed_and_use_every_kind_somewhere() -> None:
    plans = [NemesisPlan.draw(random.Random(seed), 3, 9, 10.0) for seed in range(60)]
    assert {kind for plan in plans for kind in plan.weights} == set(FaultKind)
    assert len({tuple(plan.weights) for plan in plans}) > 30
    assert {plan.impaired_nodes_max for plan in plans} == {3, 9}


def _stripe(nodes: Sequence[NodeId | None], lost: set[int]) -> Stripe:
    scheme = Scheme.parse("rs-2-2")
    block = BlockHash(bytes(32))
    slots = (SlotState.INTACT,) * 4
    return Stripe(block, VolumeId(1), scheme, 1, tuple(nodes), slots, frozenset(lost), frozenset())


def test_what_is_spare_after_a_loss_counts_debts_and_losses_once() -> None:
    whole, owing = _stripe(NODES[:4], set()), _stripe(NODES[1:5], {0, 3})
    assert spare_after_loss([whole], NODES[0]) == 1
    assert spare_after_loss([whole, owing], NODES[2]) == -1
    assert spare_after_loss([owing], NODES[1]) == 99, "its fragment is lost already"
    assert spare_after_loss([whole, owing], NODES[8]) == 99


def test_the_atlas_remembers_what_faults_took() -> None:
    atlas = FaultAtlas()
    key = FragmentKey(VolumeId(1), BlockHash(bytes(32)), 2)
    assert not atlas.is_destroyed(NODES[0], key)
    assert atlas.last_loss() == -math.inf
    atlas.lose_disk(NODES[0], [key], 12.0)
    assert atlas.is_destroyed(NODES[0], key)
    assert not atlas.is_destroyed(NODES[1], key)
    atlas.restore(NODES[0], [key])
    assert not atlas.is_destroyed(NODES[0], key)
    assert atlas.was_destroyed(key)
    assert atlas.lost_disks() == [NODES[0]]
    assert atlas.last_loss() == 12.0


def test_an_impairment_touches_every_instant_of_its_interval() -> None:
    impairments = Impairments()
    first = impairments.begin("node-01", "killed", 10.0)
    impairments.begin("node-02", "paused", 15.0)
    impairments.finish(first, 20.0)
    impairments.finish(first, 99.0)
    assert impairments.active() == {"node-02": "paused"}
    assert impairments.touched(0.0, 9.0) == {}
    assert impairments.touched(0.0, 10.0) == {"node-01": "killed"}
    assert set(impairments.touched(18.0, 30.0)) == {"node-01", "node-02"}
    assert set(impairments.touched(21.0, 30.0)) == {"node-02"}
