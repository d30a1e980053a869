"""How fast repair may write: a token bucket whose rate yields to clients.

`Throttle` is asked by `executor` before each batch.  `LiveWatch` sets its rate: it asks the nodes
that repair works with for their summaries, subtracts what repair itself read and wrote, and so
knows whether anybody else is served there; if so, and if the answers take long (they queue where
client requests queue) or repair's own process is kept waiting for a core, the rate is halved, else
it grows.  Without other traffic there is nobody to yield to, and only the configured maximum holds.
It begins at the minimum, and goes back there when clients come: a burst at the maximum would be
felt before the first look.  No SQL, no Ray.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Final

from protocol.clock import Clock
from protocol.errors import HaversackError
from protocol.ids import NodeId
from storage_node.interface import NodePort

_BURST_S: Final = 0.25
"""Seconds of the present rate that may be spent at once after a pause."""

_NODES_ASKED_MAX: Final = 16
_SUMMARY_S: Final = 2.0
"""Deadline of a summary; a node that misses it counts as slow."""

_GROWTH: Final = 1.25
_LIVE_PER_S: Final = 4.0
"""Requests of others per second and node from which on a node counts as serving clients."""


class Throttle:
    """Bytes per second for everything repair writes.  One event loop."""

    def __init__(self, clock: Clock, rate_max: float, rate_min: float) -> None:
        self._clock = clock
        self._max = rate_max
        self._min = rate_min
        self._rate = rate_min
        self._tokens = rate_min * _BURST_S
        self._at = clock.monotonic()
        self._turn = asyncio.Lock()

    @property
    def rate(self) -> float:
        """Bytes per second that may be written now."""
        return self._rate

    async def take(self, size: int) -> None:
        """Wait until `size` more bytes may be written; first come, first served.

        Paid for beforehand: a repair that is started again and again gets nothing on credit.
        """
        async with self._turn:
            self._refill()
            self._tokens -= size
            while self._tokens < 0:
                await self._clock.sleep(max(0.001, min(0.25, -self._tokens / self._rate)))
                self._refill()

    def _refill(self) -> None:
        now = self._clock.monotonic()
        earned = (now - self._at) * self._rate
        self._tokens = min(self._tokens + earned, self._rate * _BURST_S)
        self._at = now

    def set_free(self) -> None:
        """Nobody is disturbed: as fast as configured."""
        self._change(self._max)

    def begin_low(self) -> None:
        """Somebody came: from the least upwards."""
        self._change(self._min)

    def slow_down(self) -> None:
        """Somebody waits: half of it."""
        self._change(self._rate / 2)

    def speed_up(self) -> None:
        """Nobody waits: a little more."""
        self._change(self._rate * _GROWTH)

    def _change(self, rate: float) -> None:
        self._refill()
        self._rate = min(self._max, max(self._min, rate))


class LiveWatch:
    """Finds out whether clients are served slowly where repair works."""

    def __init__(
        self,
        throttle: Throttle,
        port: Callable[[NodeId], NodePort],
        clock: Clock,
        latency_s: float,
    ) -> None:
        self._throttle = throttle
        self._port = port
        self._clock = clock
        self._latency_s = latency_s
        self._own: Counter[NodeId] = Counter()
        self._seen: dict[NodeId, tuple[float, int, int]] = {}
        """(when, requests the node counts, of them ours)"""
        self._alone = True

    def count(self, node_id: NodeId, requests: int) -> None:
        """Repair is about to send a node so many keys or records."""
        self._own[node_id] += requests

    async def look(self, late_s: float = 0.0) -> None:
        """Ask the nodes in use and set the rate.  `late_s`: how long repair's own process was kept
        waiting after it was due.  Never raises for what nodes answer."""
        names = sorted(self._own)[:_NODES_ASKED_MAX]
        answers = await asyncio.gather(*(self._ask(node_id) for node_id in names))
        known = [answer for answer in answers if answer is not None]
        busy = [took_s for is_live, took_s in known if is_live]
        if not known:
            return  # a node tells nothing of others before it was asked twice
        came, self._alone = self._alone and bool(busy), not busy
        if not busy:
            self._throttle.set_free()
        elif came:
            self._throttle.begin_low()
        elif max([*busy, late_s]) > self._latency_s:
            self._throttle.slow_down()
        else:
            self._throttle.speed_up()

    async def _ask(self, node_id: NodeId) -> tuple[bool, float] | None:
        """Whether others use the node, and how long it took to answer; None: not known yet."""
        began, own = self._clock.monotonic(), self._own[node_id]
        try:
            reply = await self._port(node_id).summary(_SUMMARY_S)
        except HaversackError:
            return False, 0.0  # whoever cannot be reached serves nobody
        now = self._clock.monotonic()
        served = sum(int(reply.counters.get(name, 0)) for name in ("puts", "gets"))
        before = self._seen.get(node_id)
        self._seen[node_id] = (now, served, own)
        if before is None or now <= before[0]:
            return None
        then, served_then, own_then = before
        others = (served - served_then) - (own - own_then)
        return others > _LIVE_PER_S * (now - then), now - began
