"""Where new volumes lie and which volumes take no more blocks: pure planners, frozen plans.

Called by `placement_service` (before step 3 of a put there must be open volumes), by what-if
questions and by capacity planning.  May not import SQL, asyncio or Ray; randomness is a parameter.

How slots are chosen.  Every node gets a *share*: the slots it should have per volume, in proportion
to its weight, but at most one a node and at most m a host and a rack, as long as the topology
allows.  The shares, host by host and rack by rack in random order, are laid end to end on a line of
length n; a comb with n teeth one apart, put down at a random place, picks the nodes.  A piece of
length L is hit by floor(L) or ceil(L) teeth: so nodes are distinct, no host or rack gets more than
its share rounded up, and the long-run load is exactly the share (systematic sampling with unequal
probabilities; `docs/design/007-placement.md`).  A volume costs n binary searches, whatever the
number of nodes.
"""

from __future__ import annotations

import enum
import random
from bisect import bisect_right
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from math import ceil, gcd
from typing import Final

from cluster.topology import CellView, NodeState, NodeView, VolumeView
from erasure.scheme import Scheme
from protocol.ids import NodeId, VolumeId
from protocol.limits import VOLUME_BLOCKS_MAX, VOLUME_BYTES_TARGET

Slots = tuple[NodeId | None, ...]

_UNIT: Final = 1 << 32
"""One slot on the integer line: fine enough for any weight, exact in every sum."""

_ROUND_VOLUMES_MIN: Final = 16
"""Volumes that share one random order, at least: the comb's places are then spread evenly."""

_ROUND_TURNS: Final = 4
"""How often a round uses every node, about: an order costs as much as a volume per node."""

_DISTINCT_TRIES: Final = 8
"""Draws for a node set that no open volume has, before a repeated one is accepted."""

_GOLDEN: Final = 0.6180339887
"""Multiples of it, modulo one, stay as far from each other as they can."""

_SHARE_STEPS: Final = 60
"""Halvings of the search for shares: below the rounding of the integer line."""


@dataclass(frozen=True, slots=True)
class StockTarget:
    """How many open volumes of a scheme there should be."""

    scheme: Scheme
    open_volumes: int


@dataclass(frozen=True, slots=True)
class Opening:
    """A volume to open.  A slot is None for want of a node."""

    scheme: Scheme
    slots: Slots


@dataclass(frozen=True, slots=True)
class OpenVolumesPlan:
    """Volumes to open, and schemes that need some and can have none: too few nodes."""

    openings: tuple[Opening, ...]
    unmet: tuple[Scheme, ...]


class SealReason(enum.StrEnum):
    """Why a volume takes no more blocks."""

    FULL = "full"
    NODE_LOST = "node lost"
    """A slot's node is down or gone."""
    NODE_LEAVING = "node leaving"
    """A slot's node is being drained, or was."""
    NODE_UNWRITABLE = "node unwritable"
    """A slot's node is full or fails writes, and a new volume holds fewer of such nodes."""
    WIDER = "wider"
    """A slot is vacant, and there is a node for it now: in a new volume."""
    RETIRED = "retired"
    """New blocks get another scheme now."""


@dataclass(frozen=True, slots=True)
class Seal:
    """A volume to take out of the open ones."""

    volume_id: VolumeId
    reason: SealReason


@dataclass(frozen=True, slots=True)
class SealPlan:
    """In volume order."""

    seals: tuple[Seal, ...]


def plan_seals(view: CellView, kept: Collection[Scheme] | None = None) -> SealPlan:
    """Which of the open volumes in `view` to seal.  Volumes of schemes that are not `kept` are;
    None keeps all."""
    nodes = {node.node_id: node for node in view.nodes}
    takers = {node.node_id for node in view.nodes if node.takes_new_volumes}
    seals = []
    for volume in view.volumes:
        reason = _seal_reason(volume, nodes, takers, view.unwritable)
        if reason is None and kept is not None and volume.scheme not in kept:
            reason = SealReason.RETIRED
        if reason is not None:
            seals.append(Seal(volume.volume_id, reason))
    return SealPlan(tuple(seals))


def _seal_reason(
    volume: VolumeView,
    nodes: dict[NodeId, NodeView],
    takers: set[NodeId],
    unwritable: frozenset[NodeId],
) -> SealReason | None:
    if volume.stored_bytes >= VOLUME_BYTES_TARGET or volume.blocks >= VOLUME_BLOCKS_MAX:
        return SealReason.FULL
    held = [node_id for node_id in volume.slots if node_id is not None]
    away = {nodes[node_id].state for node_id in held if not nodes[node_id].takes_writes}
    if away:
        leaving = away <= {NodeState.DRAINING, NodeState.DRAINED}
        return SealReason.NODE_LEAVING if leaving else SealReason.NODE_LOST
    # As many as `plan_slots` is sure to find, and no more: what is opened instead must stay open.
    to_be_had = min(len(volume.slots), len(takers - unwritable))
    if len(set(held) - unwritable) < to_be_had and not unwritable.isdisjoint(held):
        return SealReason.NODE_UNWRITABLE
    if len(held) < len(volume.slots) and takers.difference(held):
        return SealReason.WIDER
    return None


def plan_volumes(
    view: CellView, targets: Sequence[StockTarget], rng: random.Random
) -> OpenVolumesPlan:
    """Volumes that bring every scheme's stock of open volumes up to its target.

    With fewer nodes than a scheme has slots the volumes get vacant slots; with fewer than its write
    minimum there is none.  Node sets differ from each other and from the open volumes' where the
    number of nodes permits.
    """
    takers = sum(1 for node in view.nodes if node.takes_new_volumes)
    openings: list[Opening] = []
    unmet: list[Scheme] = []
    for target in targets:
        scheme = target.scheme
        stock = [volume for volume in view.volumes if volume.scheme == scheme]
        count = target.open_volumes - len(stock)
        if count <= 0:
            continue
        if takers < scheme.write_minimum:
            unmet.append(scheme)
            continue
        taken = {_node_set(volume.slots) for volume in stock}
        shunned = view.unwritable | _crowded(view, scheme)
        for slots in plan_slots(view.nodes, scheme, count, rng, shunned):
            chosen = _unlike(taken, slots, view, shunned, scheme, rng)
            taken.add(_node_set(chosen))
            openings.append(Opening(scheme, chosen))
    return OpenVolumesPlan(tuple(openings), tuple(unmet))


def _crowded(view: CellView, scheme: Scheme) -> frozenset[NodeId]:
    """Nodes to leave out because they are rather full: none unless the others make volumes that
    are as wide and spread as well."""
    usable = [
        node
        for node in view.nodes
        if node.takes_new_volumes and node.node_id not in view.unwritable
    ]
    rest = [node for node in usable if not node.is_crowded]
    if len(rest) == len(usable) or len(rest) < scheme.n:
        return frozenset()
    if spread_cap(rest, scheme) > spread_cap(usable, scheme):
        return frozenset()
    return frozenset(node.node_id for node in usable if node.is_crowded)


def _node_set(slots: Slots) -> frozenset[NodeId]:
    return frozenset(node_id for node_id in slots if node_id is not None)


def _unlike(
    taken: set[frozenset[NodeId]],
    slots: Slots,
    view: CellView,
    shunned: frozenset[NodeId],
    scheme: Scheme,
    rng: random.Random,
) -> Slots:
    """`slots`, or another draw if an open volume has the same nodes and there is a choice."""
    choices = sum(1 for node in view.nodes if node.takes_new_volumes)
    tries = 0
    while choices > scheme.n and tries < _DISTINCT_TRIES and _node_set(slots) in taken:
        (slots,) = plan_slots(view.nodes, scheme, 1, rng, shunned)
        tries += 1
    return slots


def plan_slots(
    nodes: Iterable[NodeView],
    scheme: Scheme,
    count: int,
    rng: random.Random,
    unwritable: frozenset[NodeId] = frozenset(),
) -> list[Slots]:
    """Slots of `count` new volumes over the nodes that take new volumes.

    Those in `unwritable` get slots that would otherwise be vacant, or all if there are no others:
    their trouble may pass.  The same arguments and seed give the same answer.  Empty if no node
    takes any.
    """
    every = sorted(
        (node for node in nodes if node.takes_new_volumes), key=lambda node: node.node_id
    )
    takers = [node for node in every if node.node_id not in unwritable] or every
    spare = [node.node_id for node in every if node not in takers]
    width = min(scheme.n, len(takers))
    if width == 0:
        return []
    tree = _Tree(takers, [node.placement_weight for node in takers])
    units = tree.share_out(width, spread_cap=tree.spread_cap(width, max(scheme.m, 1)))
    total = width * _UNIT
    vacant = scheme.n - width
    period = len(takers) // gcd(len(takers), width)  # after which equal nodes are exactly even
    at_least = max(_ROUND_VOLUMES_MIN, _ROUND_TURNS * len(takers) // width)
    round_volumes = period * ceil(at_least / period)
    planned: list[Slots] = []
    while len(planned) < count:
        order = tree.random_order(rng)
        names = [takers[index].node_id for index in order]
        ends = list(accumulate(units[index] for index in order))
        in_round = min(round_volumes, count - len(planned))
        first = rng.randrange(_UNIT)
        stride = _stride(in_round)
        for number in range(in_round):
            place = number * stride % in_round
            start = (first + place * _UNIT // in_round) % _UNIT
            chosen = [names[bisect_right(ends, tooth)] for tooth in range(start, total, _UNIT)]
            # Turned, so that every node gets data slots and parity slots alike.
            turn = len(planned) % width
            padding = rng.sample(spare, min(vacant, len(spare)))
            empty = (None,) * (vacant - len(padding))
            planned.append((*chosen[turn:], *chosen[:turn], *padding, *empty))
    return planned


def _stride(places: int) -> int:
    """A step that visits all places of the comb and takes neighbours far apart: next to each other
    they pick almost the same nodes."""
    stride = max(1, round(places * _GOLDEN))
    while gcd(stride, places) != 1:
        stride += 1
    return stride


def spread_cap(nodes: Sequence[NodeView], scheme: Scheme) -> int:
    """The most slots of one volume that a host or a rack may hold, if the volume is to lie on
    `nodes`: m, or as few more as their topology allows."""
    width = min(scheme.n, len(nodes))
    return _Tree(nodes, [1.0] * len(nodes)).spread_cap(width, max(scheme.m, 1))


def fair_shares(
    nodes: Sequence[NodeView], scheme: Scheme, weights: Sequence[float]
) -> dict[NodeId, float]:
    """Slots per volume that each node should have: in proportion to its weight (positive), at
    most one a node and `spread_cap` a host and a rack."""
    if not nodes:
        return {}
    width = min(scheme.n, len(nodes))
    tree = _Tree(nodes, weights)
    units = tree.share_out(width, spread_cap=tree.spread_cap(width, max(scheme.m, 1)))
    return {node.node_id: share / _UNIT for node, share in zip(nodes, units, strict=True)}


class _Tree:
    """Racks, hosts in them, nodes on those; nodes are indices into the given sequence."""

    def __init__(self, nodes: Sequence[NodeView], weights: Sequence[float]) -> None:
        self._weights = weights
        racks: dict[str, dict[str, list[int]]] = {}
        for index, node in enumerate(nodes):
            racks.setdefault(node.rack, {}).setdefault(node.host, []).append(index)
        self._racks = [list(hosts.values()) for hosts in racks.values()]

    def spread_cap(self, width: int, wanted: int) -> int:
        """The most slots that one host or rack must be given: `wanted` if the topology allows."""
        cap = wanted
        while self._room(cap) < width:
            cap += 1
        return cap

    def _room(self, cap: int) -> int:
        return sum(min(cap, sum(min(cap, len(host)) for host in hosts)) for hosts in self._racks)

    def share_out(self, width: int, spread_cap: int) -> list[int]:
        """Each node's share in units: `width * _UNIT` in all, in proportion to weight, at most one
        slot a node and `spread_cap` slots a host and a rack."""
        low = width / sum(self._weights)
        shares = self._shares(low, spread_cap)
        if sum(shares) < width:
            high = 1.0 / min(self._weights)
            for _ in range(_SHARE_STEPS):
                middle = (low * high) ** 0.5
                if sum(self._shares(middle, spread_cap)) <= width:
                    low = middle
                else:
                    high = middle
            shares = self._shares(low, spread_cap)
        units = [int(share * _UNIT) for share in shares]
        self._give_rest(units, width * _UNIT - sum(units), spread_cap * _UNIT)
        return units

    def _shares(self, slots_per_weight: float, spread_cap: int) -> list[float]:
        shares = [min(1.0, weight * slots_per_weight) for weight in self._weights]
        for hosts in self._racks:
            for host in hosts:
                _scale_down(shares, host, spread_cap)
            _scale_down(shares, list(chain.from_iterable(hosts)), spread_cap)
        return shares

    def _give_rest(self, units: list[int], rest: int, cap: int) -> None:
        """Hand out what rounding left over.  One pass is enough: caps on nested sets leave no
        dead end (a polymatroid's maximal vectors all have the same sum)."""
        assert rest >= 0
        for hosts in self._racks:
            rack_room = cap - sum(units[index] for host in hosts for index in host)
            for host in hosts:
                host_room = cap - sum(units[index] for index in host)
                for index in host:
                    given = min(rest, _UNIT - units[index], host_room, rack_room)
                    units[index] += given
                    rest -= given
                    host_room -= given
                    rack_room -= given
        assert rest == 0, "the caps leave room for every slot"

    def random_order(self, rng: random.Random) -> list[int]:
        """All nodes, those of a host and of a rack together, otherwise shuffled."""
        order: list[int] = []
        for hosts in rng.sample(self._racks, len(self._racks)):
            for host in rng.sample(hosts, len(hosts)):
                order.extend(rng.sample(host, len(host)))
        return order


def _scale_down(shares: list[float], members: Sequence[int], cap: int) -> None:
    total = sum(shares[index] for index in members)
    if total > cap:
        for index in members:
            shares[index] *= cap / total
