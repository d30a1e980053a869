"""A bound on bytes in flight: the first step of every put and get of the block client.

A gateway's memory is what its requests hold at once, so each request takes its share before it
allocates and waits its turn, first come first served, for a bounded time.  Pure asyncio.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator

from protocol.errors import Overloaded


class ByteBudget:
    """`capacity` bytes, shared by the requests of one event loop."""

    def __init__(self, what: str, capacity: int, wait_s: float) -> None:
        assert capacity > 0
        self._what = what
        self._capacity = capacity
        self._free = capacity
        self._wait_s = wait_s
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def free(self) -> int:
        """Bytes that nobody holds."""
        return self._free

    @contextlib.asynccontextmanager
    async def hold(self, wanted: int) -> AsyncIterator[None]:
        """Hold `wanted` bytes for the body of an `async with`.

        A request for more than the whole capacity waits for the whole of it and runs alone.
        Raises `Overloaded` if its turn does not come in time.
        """
        taken = min(wanted, self._capacity)
        await self._acquire(taken)
        try:
            yield
        finally:
            self._release(taken)

    async def _acquire(self, taken: int) -> None:
        if not self._waiting and self._free >= taken:
            self._free -= taken
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((taken, turn))
        try:
            async with asyncio.timeout(self._wait_s):
                await turn
        except TimeoutError as error:
            self._give_up(taken, turn)
            raise Overloaded(
                f"{self._what} in flight fill their budget of {self._capacity} bytes: retry later",
                {"budget_bytes": self._capacity, "waited_s": self._wait_s},
            ) from error
        except asyncio.CancelledError:
            self._give_up(taken, turn)
            raise

    def _give_up(self, taken: int, turn: asyncio.Future[None]) -> None:
        """Leave the queue; if the turn had come in the same instant, pass it on."""
        if turn.done() and not turn.cancelled():
            self._release(taken)
            return
        with contextlib.suppress(ValueError):  # `_wake` may have dropped it already
            self._waiting.remove((taken, turn))
        self._wake()

    def _release(self, taken: int) -> None:
        self._free += taken
        self._wake()

    def _wake(self) -> None:
        while self._waiting and self._waiting[0][0] <= self._free:
            taken, turn = self._waiting.popleft()
            if turn.cancelled():
                continue
            self._free -= taken
            turn.set_result(None)
