"""Time as a parameter: wall clock, monotonic clock and sleep.

Nothing outside this file and `chaos/sim` reads a clock of the system.  Durations are float
seconds; instants on the wall are float seconds since the epoch, UTC.
"""

from __future__ import annotations

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """What the core asks of time."""

    def wall(self) -> float:
        """Seconds since 1970, UTC.  May jump: never used to order events of two hosts."""
        ...

    def monotonic(self) -> float:
        """Seconds from an arbitrary start; never goes back.  Leases and deadlines use this."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Suspend the caller."""
        ...


class SystemClock:
    """The real clock."""

    def wall(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
