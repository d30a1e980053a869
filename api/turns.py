"""How many requests are worked on at once: the rest wait a little, and then are told to.

Called through `call.Call` for every request that is not public.  A turn is held while we work on a
request, not while its peer sends or reads: slow peers hold memory, never turns.  Bounding what is
worked on bounds threads and database work; a queue without a bound would only turn load into
latency.
"""

from __future__ import annotations

import asyncio
from collections import deque

from protocol.errors import Overloaded


class Turns:
    """A counter with a bounded queue, first come first served.  One event loop."""

    def __init__(self, active_max: int, queued_max: int, wait_s: float) -> None:
        assert active_max > 0, "nobody could ever have a turn"
        self._active_max = active_max
        self._queued_max = queued_max
        self._wait_s = wait_s
        self._active = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def active(self) -> int:
        """Requests that have a turn."""
        return self._active

    @property
    def queued(self) -> int:
        """Requests that wait for one."""
        return len(self._waiting)

    def take_now(self) -> bool:
        """A turn without waiting, if one is free and nobody waits."""
        if self._active >= self._active_max or self._waiting:
            return False
        self._active += 1
        return True

    async def take(self) -> None:
        """A turn.  Raises `Overloaded` if the queue is full, or if no turn comes in time."""
        if self.take_now():
            return
        if len(self._waiting) >= self._queued_max:
            raise Overloaded("too many requests are waiting: retry later")
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            async with asyncio.timeout(self._wait_s):
                await turn
        except TimeoutError as error:
            self._give_up(turn)
            raise Overloaded(f"no turn within {self._wait_s:g} s: retry later") from error
        except asyncio.CancelledError:
            self._give_up(turn)
            raise

    def give_back(self) -> None:
        """End a turn; the next in line gets it."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._active -= 1

    def _give_up(self, turn: asyncio.Future[None]) -> None:
        """Leave the queue; a turn that came in the same instant goes to the next."""
        if turn.done() and not turn.cancelled():
            self.give_back()
        elif turn in self._waiting:
            self._waiting.remove(turn)
