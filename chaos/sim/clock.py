"""`protocol.clock.Clock` over a virtual-time loop, with the faults that clocks of hosts have.

One per simulated host.  Each host's monotonic clock starts somewhere else and runs a little fast
or slow, so that code which compares clocks of two hosts fails; its wall clock is skewed and may
jump.  Created by `chaos/sim/world.py`.
"""

from __future__ import annotations

import asyncio

WALL_START = 1_795_305_600.0
"""What an unskewed wall clock shows when a simulation starts: 2026-11-22 00:00 UTC."""


class VirtualClock:
    """A host's clocks.  `rate` is its seconds per true second; `skew_s` is added to its wall."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        monotonic_start: float = 0.0,
        rate: float = 1.0,
        skew_s: float = 0.0,
    ) -> None:
        assert rate > 0
        self._loop = loop
        self._created = loop.time()
        self._monotonic_start = monotonic_start
        self._rate = rate
        self._skew_s = skew_s

    def wall(self) -> float:
        """Seconds since 1970 as this host believes."""
        return WALL_START + self._elapsed() + self._skew_s

    def monotonic(self) -> float:
        """Seconds from this host's own start; not touched by `jump`."""
        return self._monotonic_start + self._elapsed()

    async def sleep(self, seconds: float) -> None:
        """Suspend the caller for `seconds` of this host."""
        await asyncio.sleep(seconds / self._rate)

    def jump(self, seconds: float) -> None:
        """The wall clock is set forward or back."""
        self._skew_s += seconds

    def _elapsed(self) -> float:
        return (self._loop.time() - self._created) * self._rate
