"""When to try again: bounded attempts, bounded time, jittered exponential back-off.

Used by `client.transport` for whole calls and by `client.api` for single items of a batch.  May
import `protocol` only.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from protocol.clock import Clock
from protocol.errors import HaversackError


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How patient a client is.  The default outlives the restart of a whole cell."""

    attempts_max: int = 20
    total_s: float = 60.0
    """No attempt is started later than this after the first one."""
    first_delay_s: float = 0.1
    delay_max_s: float = 5.0

    def __post_init__(self) -> None:
        assert self.attempts_max >= 1
        assert 0 < self.first_delay_s <= self.delay_max_s

    def delay_s(self, attempt: int, rng: random.Random) -> float:
        """Seconds to wait after failed attempt number `attempt` (1-based), jittered by half."""
        assert attempt >= 1
        full = min(self.delay_max_s, self.first_delay_s * 2.0 ** min(attempt - 1, 32))
        return full * (0.5 + rng.random() / 2)


IMPATIENT = RetryPolicy(attempts_max=3, total_s=2.0)
"""For a person who waits for an answer: `haversack status`, `ls`, `rm`."""


class Backoff:
    """The attempts of one call."""

    def __init__(self, policy: RetryPolicy, clock: Clock, rng: random.Random) -> None:
        self._policy = policy
        self._clock = clock
        self._rng = rng
        self._started = clock.monotonic()
        self.attempts = 0

    async def pause(self, error: HaversackError) -> None:
        """Wait before the next attempt, at least as long as the server asked for.

        Raises `error` itself when no attempt is left, or the next would start too late.
        """
        self.attempts += 1
        if self.attempts >= self._policy.attempts_max:
            raise error
        delay = self._policy.delay_s(self.attempts, self._rng)
        asked = error.details.get("retry_after_s")
        if isinstance(asked, int | float):
            delay = max(delay, float(asked))
        if self._clock.monotonic() + delay - self._started > self._policy.total_s:
            raise error
        await self._clock.sleep(delay)
