"""How much may be broken at once, and what faults are to blame for.

`FaultAtlas` remembers every durable fragment that a fault took, so that whatever else is missing
is a bug; `Impairments` remembers which processes could not work when, so that a read that fails
without an excuse is one too.  Filled by injectors, asked by `chaos/nemesis.py` before it draws and
by engines when they judge.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from chaos.evidence import Stripe
from protocol.ids import NodeId
from storage_node.interface import FragmentKey


class FaultAtlas:
    """Fragments that faults destroyed where they lay, and disks that will not come back."""

    def __init__(self) -> None:
        self._destroyed: dict[tuple[NodeId, FragmentKey], float] = {}
        self._ever: dict[FragmentKey, None] = {}
        self._lost_disks: dict[NodeId, float] = {}

    def destroy(self, node: NodeId, keys: Iterable[FragmentKey], now: float) -> None:
        """These were durable on the disk of `node`, and a fault took or damaged them."""
        for key in keys:
            self._destroyed.setdefault((node, key), now)
            self._ever[key] = None

    def restore(self, node: NodeId, keys: Iterable[FragmentKey]) -> None:
        """These were written there again."""
        for key in keys:
            self._destroyed.pop((node, key), None)

    def lose_disk(self, node: NodeId, keys: Iterable[FragmentKey], now: float) -> None:
        """A disk is gone with all it held."""
        self._lost_disks[node] = now
        self.destroy(node, keys, now)

    def is_destroyed(self, node: NodeId, key: FragmentKey) -> bool:
        """Whether a fault is to blame if this fragment cannot be read from there."""
        return (node, key) in self._destroyed

    def destroyed_at(self, node: NodeId, key: FragmentKey) -> float | None:
        """When a fault took this fragment there; None if none did."""
        return self._destroyed.get((node, key))

    def was_destroyed(self, key: FragmentKey) -> bool:
        """Whether a fault ever took this fragment, wherever it lay."""
        return key in self._ever

    def lost_disks(self) -> list[NodeId]:
        """In the order in which they were lost."""
        return list(self._lost_disks)

    def last_loss(self) -> float:
        """When the newest disk was lost; minus infinity if none was."""
        return max(self._lost_disks.values(), default=-math.inf)

    @property
    def destroyed(self) -> int:
        """Fragments lost so far."""
        return len(self._ever)


def spare_after_loss(stripes: Iterable[Stripe], node: NodeId) -> int:
    """Spare fragments of the worst stripe if `node` lost its disk now; negative: data is lost.

    Stripes that `node` holds no healthy fragment of do not count.
    """
    worst = math.inf
    for stripe in stripes:
        mine = {slot for slot, holder in enumerate(stripe.nodes) if holder == node}
        if mine - stripe.lost:
            worst = min(worst, stripe.scheme.m - len(stripe.lost | mine))
    return 99 if worst is math.inf else int(worst)


@dataclass(slots=True)
class _Interval:
    target: str
    why: str
    start: float
    end: float = math.inf


class Impairments:
    """Intervals during which a process, or a direction of work of it, could not do its part."""

    def __init__(self) -> None:
        self._intervals: dict[int, _Interval] = {}
        self._active: dict[int, None] = {}
        self._next = 0

    def begin(self, target: str, why: str, now: float) -> int:
        """A process is impaired from now on; the number ends it."""
        self._next += 1
        self._intervals[self._next] = _Interval(target, why, now)
        self._active[self._next] = None
        return self._next

    def finish(self, number: int, now: float) -> None:
        """It works again.  Idempotent."""
        if number in self._active:
            del self._active[number]
            self._intervals[number].end = now

    def active(self) -> dict[str, str]:
        """Impaired processes now, with one reason each."""
        return {
            self._intervals[number].target: self._intervals[number].why for number in self._active
        }

    def touched(self, start: float, end: float) -> dict[str, str]:
        """Processes impaired at any instant from `start` to `end`, with one reason each."""
        return {
            interval.target: interval.why
            for interval in self._intervals.values()
            if interval.start <= end and interval.end >= start
        }
