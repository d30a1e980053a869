"""What would be lost, and could the rest make it whole: `haversack what-if`.

Pure array operations over a `SlotTable`; nothing is asked of a node and nothing changes.  A
fragment counts as there if its node serves reads now and is not among the lost ones, and no debt
says that it is missing.  `spare` is fragments there minus k: below zero a block cannot be read.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from cluster.explain.domains import Domain, Level, domains_at, name_at
from cluster.explain.slot_table import Int32s, Int64s, SlotTable
from cluster.placement import spread_cap
from cluster.topology import SERVES_READS
from protocol.ids import NodeId, VolumeId

Flags: TypeAlias = npt.NDArray[np.bool_]

EXAMPLES_MAX: Final = 10
"""Volumes that an answer names; the rest is counted."""

WORST_MAX: Final = 5
"""Domains that `worst_of` lists."""

_CELLS_MAX: Final = 20_000_000
"""Counters of one chunk of volumes by domains: bounds the memory of an answer."""


@dataclass(frozen=True, slots=True)
class Amount:
    """How much is in one class.  `volumes` counts a volume by its worst block."""

    volumes: int = 0
    blocks: int = 0
    stored_bytes: int = 0
    """Before coding."""


Histogram: TypeAlias = dict[int, Amount]
"""By fragments to spare."""


@dataclass(frozen=True, slots=True)
class Rebuilding:
    """What making everything whole again would take, after the loss."""

    slots: int
    """Slots to be made: vacant ones, those of lost nodes, and those of nodes that are away."""
    fragment_bytes: int
    """To be written, about."""
    slots_without_target: int
    """No node is left that holds no other slot of their volume."""
    slots_beyond_spread: int
    """A node is left, but then one rack (or host) would hold more slots of a volume than m, than
    any holds now, and than the topology of now asks for: the loss makes the spread worse."""
    lost_slots: int
    """Of volumes that cannot be read: nothing can be made of them."""
    nodes: int
    """That would take slots."""
    room_bytes: int
    """Free on those."""

    @property
    def possible(self) -> bool:
        """Whether there are nodes and room for all that can still be made."""
        return not self.slots_without_target and self.fragment_bytes <= self.room_bytes


@dataclass(frozen=True, slots=True)
class LossReport:
    """The answer."""

    lost: tuple[Domain, ...]
    nodes: tuple[NodeId, ...]
    before: Histogram
    after: Histogram
    unreadable: tuple[VolumeId, ...]
    """The first of them."""
    fragments_of_one_block_max: int
    """Most fragments of any one block that the loss takes."""
    rebuilding: Rebuilding

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        rebuilding = self.rebuilding
        return {
            "lost": [str(domain) for domain in self.lost],
            "nodes": [str(node_id) for node_id in self.nodes],
            "before": histogram_json(self.before),
            "after": histogram_json(self.after),
            "unreadable": {
                **_amount_json(unreadable(self.after)),
                "examples": [str(volume_id) for volume_id in self.unreadable],
            },
            "fragments_of_one_block_max": self.fragments_of_one_block_max,
            "rebuilding": {
                "possible": rebuilding.possible,
                "slots": rebuilding.slots,
                "fragment_bytes": rebuilding.fragment_bytes,
                "slots_without_target": rebuilding.slots_without_target,
                "slots_beyond_spread": rebuilding.slots_beyond_spread,
                "lost_slots": rebuilding.lost_slots,
                "nodes": rebuilding.nodes,
                "room_bytes": rebuilding.room_bytes,
            },
        }


@dataclass(frozen=True, slots=True)
class DomainRisk:
    """What the loss of one domain alone would leave."""

    domain: Domain
    after: Histogram
    """`volumes` are not counted here."""


def unreadable(histogram: Histogram) -> Amount:
    """The classes below zero, together."""
    below = [amount for spare, amount in histogram.items() if spare < 0]
    return Amount(
        sum(amount.volumes for amount in below),
        sum(amount.blocks for amount in below),
        sum(amount.stored_bytes for amount in below),
    )


def histogram_json(histogram: Histogram) -> dict[str, dict[str, int]]:
    """JSON-ready, from the worst class to the best."""
    return {str(spare): _amount_json(histogram[spare]) for spare in sorted(histogram)}


def _amount_json(amount: Amount) -> dict[str, int]:
    return {
        "volumes": amount.volumes,
        "blocks": amount.blocks,
        "stored_bytes": amount.stored_bytes,
    }


def lose(table: SlotTable, domains: Sequence[Domain]) -> LossReport:
    """What the loss of all of `domains` together would leave."""
    lost = {node_id for domain in domains for node_id in domain.nodes}
    before, after = _present(table, ()), _present(table, lost)
    spare = _spare(table, after)
    taken = before.sum(axis=1, dtype=np.int32) - after.sum(axis=1, dtype=np.int32)
    unread = np.unique(table.volume_ids[(spare < 0) & (table.blocks > 0)])
    return LossReport(
        lost=tuple(domains),
        nodes=tuple(sorted(lost)),
        before=_histogram(table, _spare(table, before)),
        after=_histogram(table, spare),
        unreadable=tuple(VolumeId(number) for number in unread[:EXAMPLES_MAX].tolist()),
        fragments_of_one_block_max=int(taken[table.blocks > 0].max(initial=0)),
        rebuilding=_rebuilding(table, after, spare, lost),
    )


def worst_of(table: SlotTable, level: Level) -> list[DomainRisk]:
    """The domains of a level whose loss would leave the least, worst first, `WORST_MAX` of them."""
    domains = domains_at(level, table.nodes)
    if not domains:
        return []
    spare = _spare(table, _present(table, ()))
    rows, owners, counts = _held(table, level, domains)
    left = spare[rows] - counts
    low = int(min(left.min(initial=0), spare.min(initial=0)))
    levels = int(spare.max(initial=0)) - low + 1

    def per_domain(weights: Int64s) -> npt.NDArray[np.float64]:
        """[domains, levels] of `weights` (per row) after the loss of each domain."""
        base = np.bincount(spare - low, weights, levels)
        shape = len(domains) * levels
        gone = np.bincount(owners * levels + (spare[rows] - low), weights[rows], shape)
        come = np.bincount(owners * levels + (left - low), weights[rows], shape)
        return np.asarray(base + (come - gone).reshape(len(domains), levels))

    blocks, stored = per_domain(table.blocks), per_domain(table.stored_bytes)
    # Lexicographic: most blocks at the lowest level, then at the next.
    order = np.lexsort([-blocks[:, column] for column in reversed(range(levels))])
    return [
        DomainRisk(
            domains[number],
            {
                low + column: Amount(0, int(blocks[number, column]), int(stored[number, column]))
                for column in range(levels)
                if blocks[number, column] > 0
            },
        )
        for number in order[:WORST_MAX].tolist()
    ]


# -- arrays ------------------------------------------------------------------------------------


def _present(table: SlotTable, lost: Collection[NodeId]) -> Flags:
    """[R, width] whether the fragments of a slot are there.  The two last entries are for
    `NO_SLOT` and `VACANT`, which index from the end."""
    serves = [node.state in SERVES_READS and node.node_id not in lost for node in table.nodes]
    return np.asarray(np.array([*serves, False, False], np.bool_)[table.slots])


def _spare(table: SlotTable, present: Flags) -> Int64s:
    needed = table.per_row([scheme.k for scheme in table.schemes])
    return np.asarray(present.sum(axis=1, dtype=np.int64) - needed)


def _histogram(table: SlotTable, spare: Int64s) -> Histogram:
    if len(spare) == 0:
        return {}
    low = int(spare.min())
    classes = int(spare.max()) - low + 1
    starts = table.volume_starts()
    # A row whose blocks all owe something else says nothing about its volume.
    telling = np.where(table.blocks > 0, spare, np.iinfo(np.int64).max)
    worst = np.minimum.reduceat(telling, starts)
    empty = worst == np.iinfo(np.int64).max
    worst[empty] = spare[starts][empty]
    volumes = np.bincount(worst - low, minlength=classes)
    blocks = np.bincount(spare - low, table.blocks, classes)
    stored = np.bincount(spare - low, table.stored_bytes, classes)
    return {
        low + number: Amount(int(volumes[number]), int(blocks[number]), int(stored[number]))
        for number in range(classes)
        if volumes[number] or blocks[number]
    }


def _held(
    table: SlotTable, level: Level, domains: Sequence[Domain]
) -> tuple[Int64s, Int64s, Int64s]:
    """Triples (row, domain, slots of the row there), for rows that have any there."""
    present = _present(table, ())
    owner = _owner_of(table, level, domains)[table.slots]
    rows = np.broadcast_to(np.arange(len(owner))[:, None], owner.shape)[present]
    pairs, counts = np.unique(rows * len(domains) + owner[present], return_counts=True)
    return pairs // len(domains), pairs % len(domains), counts.astype(np.int64)


def _owner_of(table: SlotTable, level: Level, domains: Sequence[Domain]) -> Int64s:
    """[nodes + 2] number of each node's domain, -1 where it has none."""
    number = {domain.name: index for index, domain in enumerate(domains)}
    owners = [number.get(name_at(level, node), -1) for node in table.nodes]
    return np.array([*owners, -1, -1], np.int64)


# -- making it whole ---------------------------------------------------------------------------


def _rebuilding(
    table: SlotTable, present: Flags, spare: Int64s, lost: Collection[NodeId]
) -> Rebuilding:
    takers = [node.takes_new_volumes and node.node_id not in lost for node in table.nodes]
    room = sum(node.free_bytes for node, takes in zip(table.nodes, takers, strict=True) if takes)
    total = table.per_row([scheme.n for scheme in table.schemes])
    missing = total - present.sum(axis=1, dtype=np.int32)
    makeable = np.flatnonzero((spare >= 0) & (missing > 0))
    # A slot is placed once, however many rows of its volume lack it.
    starts = table.volume_starts()
    first = np.zeros(len(missing), np.bool_)
    first[starts] = True
    by_volume = makeable[first[makeable]]
    homeless, crowded = _targets(table, present, by_volume, missing, np.array(takers, np.bool_))
    needed = table.per_row([scheme.k for scheme in table.schemes])
    chunk = -(-table.stored_bytes[makeable] // needed[makeable])
    dead = first & (spare < 0)
    return Rebuilding(
        slots=int(missing[by_volume].sum()),
        fragment_bytes=int((chunk * missing[makeable]).sum()),
        slots_without_target=homeless,
        slots_beyond_spread=crowded,
        lost_slots=int(missing[dead].sum()),
        nodes=sum(takers),
        room_bytes=room,
    )


def _targets(
    table: SlotTable, present: Flags, rows: Int64s, missing: Int32s, takers: Flags
) -> tuple[int, int]:
    """Slots that no node can take, and those that only a node beyond the spread of now can."""
    level = Level.RACK if len(domains_at(Level.RACK, table.nodes)) > 1 else Level.HOST
    domains = domains_at(level, table.nodes)
    owner = _owner_of(table, level, domains)
    width = max(len(domains), 1)
    free = np.bincount(owner[:-2][takers & (owner[:-2] >= 0)], minlength=width)
    now = [node for node in table.nodes if node.takes_new_volumes]
    caps = table.per_row(
        [max(scheme.m, 1, spread_cap(now, scheme) if now else 0) for scheme in table.schemes]
    )
    takes = np.concatenate((takers, np.zeros(2, np.bool_)))
    homeless = crowded = 0
    step = max(1, _CELLS_MAX // width)
    for start in range(0, len(rows), step):
        chunk = rows[start : start + step]
        there, slots = present[chunk], table.slots[chunk]
        number = np.broadcast_to(np.arange(len(chunk))[:, None], slots.shape)
        cells = number * width + owner[slots]
        shape = (len(chunk), width)
        held = np.bincount(cells[there], minlength=len(chunk) * width).reshape(shape)
        placed = owner[slots] >= 0
        most = np.bincount(cells[placed], minlength=len(chunk) * width).reshape(shape).max(axis=1)
        cap = np.maximum(caps[chunk], most)
        own = there & takes[slots]
        busy = np.bincount(cells[own], minlength=len(chunk) * width).reshape(shape)
        open_nodes = free - busy
        within = np.minimum(np.maximum(cap[:, None] - held, 0), open_nodes).sum(axis=1)
        lacking = missing[chunk]
        without = np.maximum(lacking - open_nodes.sum(axis=1), 0)
        homeless += int(without.sum())
        crowded += int((np.maximum(lacking - within, 0) - without).sum())
    return homeless, crowded
