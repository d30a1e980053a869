"""Step 3 of the life of a put: which open volume takes the block, and who is healthy enough.

Called by `put_path`.  Reads the map and the pool's suspicions; may not talk to a node or to SQL
other than by refreshing the map.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from cluster.block_client_settings import BlockClientSettings
from cluster.block_index import Receipt
from cluster.node_pool import Direction, NodePool
from cluster.topology import VolumeView
from cluster.volume_map import VolumeMap
from erasure.scheme import Scheme
from protocol.clock import Clock
from protocol.errors import NotEnoughNodes
from protocol.ids import NodeId


@dataclass(frozen=True, slots=True)
class Choice:
    """A volume and who is to be written to."""

    volume: VolumeView
    receipts: tuple[Receipt, ...]
    """What each slot's answer must say."""
    missing: tuple[int, ...]
    """Slots that are vacant or whose nodes are avoided: debts, if the block is recorded."""
    may_owe: bool = False
    """No better volume is to be had: debts are accepted, also for slots that fail now."""


class Avoided(NamedTuple):
    """A life of a node that failed the put that asks."""

    why: str
    incarnation: int


Avoid = Mapping[NodeId, Avoided]


REASONS_MAX: Final = 2
"""Nodes whose answers are in the message; the details have all of them."""


class VolumeChooser:
    """Chooses among the open volumes of the map.

    What a put avoids counts as unhealthy for it even after the pool trusts the node again, until
    the map names a new life: placement will open no volume without a node that is well again.

    Patience, per scheme: a put that loses a slot, or finds no open volume without nodes that fail,
    starts a clock, although nodes enough are healthy; a block that is recorded on all its slots
    stops it.  While it runs, puts look for another volume and wait for the placement service; once
    it has run for `debts_after_s`, they leave debts, for placement does not see what is wrong or
    cannot help it.
    """

    def __init__(
        self,
        volume_map: VolumeMap,
        pool: NodePool,
        clock: Clock,
        rng: random.Random,
        settings: BlockClientSettings,
    ) -> None:
        self._map = volume_map
        self._pool = pool
        self._clock = clock
        self._rng = rng
        self._settings = settings
        self._short: dict[Scheme, tuple[float, float]] = {}
        """When the clock was started, and when a put last asked for it."""

    async def choose(self, scheme: Scheme, avoid: Avoid, deadline: float) -> Choice:
        """A volume to write to, waiting a while for the placement service if there is none.

        Raises `NotEnoughNodes`: at once with fewer than `write_minimum` healthy nodes.
        """
        began = self._clock.monotonic()
        give_up_at = min(deadline, began + self._settings.placement_wait_s)
        while True:
            healthy = self.healthy_nodes(avoid)
            choice = self._pick(scheme, avoid)
            if choice is not None:
                # Other puts of the scheme may go well all the while and never let its clock run.
                waited_s = self._clock.monotonic() - began
                patient = waited_s < self._settings.debts_after_s and not self.has_waited(scheme)
                if not choice.missing or healthy < scheme.n or not patient:
                    return replace(choice, may_owe=not patient)
            if healthy < scheme.write_minimum:
                why = _why(self._failing(avoid))
                raise NotEnoughNodes(
                    f"{healthy} storage nodes take writes; {scheme} needs at least "
                    f"{scheme.write_minimum} of {scheme.n} to acknowledge a block{why}",
                    self.details(scheme, avoid),
                )
            if self._clock.monotonic() >= give_up_at:
                raise NotEnoughNodes(
                    f"no open {scheme} volume avoids the nodes that fail now, and the placement "
                    f"service has opened none in time: retry later{_why(self._failing(avoid))}",
                    self.details(scheme, avoid),
                )
            await self._clock.sleep(self._settings.placement_poll_s)
            await self._map.refresh()

    def recorded_whole(self, scheme: Scheme) -> None:
        """A block went to all its slots: the next trouble is a new one."""
        self._short.pop(scheme, None)

    def has_waited(self, scheme: Scheme) -> bool:
        """Whether the placement service had its time to open a volume without the nodes that fail.
        Asking starts the clock, and starts it anew if no put has asked for as long as one lasts."""
        now = self._clock.monotonic()
        since, asked = self._short.get(scheme, (now, now))
        if now - asked > self._settings.put_s:
            since = now
        self._short[scheme] = since, now
        return now - since >= self._settings.debts_after_s

    def healthy_nodes(self, avoid: Avoid) -> int:
        """Failure domains that can take a fragment now."""
        return sum(self._is_usable(node.node_id, avoid) for node in self._map.nodes())

    def details(self, scheme: Scheme, avoid: Avoid) -> dict[str, object]:
        """What an operator wants to know when a put was not taken."""
        return {
            "scheme": scheme.name,
            "healthy_nodes": self.healthy_nodes(avoid),
            "needed_nodes": scheme.n,
            "failed": {str(node_id): why for node_id, why in self._failing(avoid).items()},
        }

    def _failing(self, avoid: Avoid) -> dict[NodeId, str]:
        """What nodes said to this put, and to those before it."""
        said = {node_id: avoided.why for node_id, avoided in avoid.items()}
        return {**self._pool.suspicions(Direction.WRITE), **said}

    def _pick(self, scheme: Scheme, avoid: Avoid) -> Choice | None:
        """An open volume with all slots usable, at random, or the one with the most; None if no
        volume has `write_minimum` of them."""
        volumes = list(self._map.open_volumes(scheme))
        self._rng.shuffle(volumes)
        best: VolumeView | None = None
        best_slots: list[int] = []
        for volume in volumes:
            slots = [
                slot
                for slot, node_id in enumerate(volume.slots)
                if node_id is not None and self._is_usable(node_id, avoid)
            ]
            if len(slots) == scheme.n:
                return self._choice(volume, slots)
            if len(slots) > len(best_slots):
                best, best_slots = volume, slots
        if best is None or len(best_slots) < scheme.write_minimum:
            return None
        return self._choice(best, best_slots)

    def _is_usable(self, node_id: NodeId, avoid: Avoid) -> bool:
        avoided = avoid.get(node_id)
        if avoided is not None and avoided.incarnation == self._map.node(node_id).incarnation:
            return False
        return self._pool.is_trusted(node_id, Direction.WRITE)

    def _choice(self, volume: VolumeView, slots: Sequence[int]) -> Choice:
        receipts = []
        for slot in slots:
            node_id = volume.slots[slot]
            assert node_id is not None
            receipts.append(Receipt(slot, node_id, self._map.node(node_id).incarnation))
        missing = tuple(slot for slot in range(volume.scheme.n) if slot not in slots)
        return Choice(volume, tuple(receipts), missing)


def _why(failing: Mapping[NodeId, str]) -> str:
    """The end of a refusal: what nodes said, the first few of them."""
    said = [f"{node_id}: {why}" for node_id, why in sorted(failing.items())]
    more = f"; and {len(said) - REASONS_MAX} more" if len(said) > REASONS_MAX else ""
    return f" ({'; '.join(said[:REASONS_MAX])}{more})" if said else ""
