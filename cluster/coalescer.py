"""Many concurrent calls, one batch at a time: what waits while a batch runs becomes the next one.

Used by `block_index` so that a thousand puts a second share transactions and statements.  Pure
asyncio; knows nothing of SQL.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

from protocol.errors import Overloaded

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class _Call(NamedTuple, Generic[Item, Answer]):
    items: Sequence[Item]
    future: asyncio.Future[list[Answer]]


class Coalescer(Generic[Item, Answer]):
    """Runs `run` over the items of all waiting calls together, never twice at a time.

    A call that is cancelled leaves its items in the batch.  An error of `run` goes to every call
    of that batch.
    """

    def __init__(
        self,
        run: Callable[[list[Item]], Awaitable[list[Answer]]],
        batch_items_max: int,
        waiting_items_max: int,
    ) -> None:
        self._run = run
        self._batch_items_max = batch_items_max
        self._waiting_items_max = waiting_items_max
        self._waiting: deque[_Call[Item, Answer]] = deque()
        self._waiting_items = 0
        self._task: asyncio.Task[None] | None = None

    async def submit(self, items: Sequence[Item]) -> list[Answer]:
        """One answer per item, in order.  Raises `Overloaded` when too many items wait."""
        if self._waiting_items + len(items) > self._waiting_items_max and self._waiting:
            raise Overloaded("too many blocks are waiting for the block index: retry later")
        loop = asyncio.get_running_loop()
        call = _Call[Item, Answer](items, loop.create_future())
        self._waiting.append(call)
        self._waiting_items += len(items)
        if self._task is None:
            self._task = loop.create_task(self._drain())
        return await call.future

    async def _drain(self) -> None:
        try:
            while self._waiting:
                await self._run_batch(self._take())
        finally:
            self._task = None
            for call in self._waiting:  # only when this task itself was cancelled
                call.future.cancel()
            self._waiting.clear()
            self._waiting_items = 0

    def _take(self) -> list[_Call[Item, Answer]]:
        """Calls for one batch, oldest first: at least one, and no more items than the limit."""
        taken = [self._waiting.popleft()]
        count = len(taken[0].items)
        while self._waiting and count + len(self._waiting[0].items) <= self._batch_items_max:
            taken.append(self._waiting.popleft())
            count += len(taken[-1].items)
        self._waiting_items -= count
        return taken

    async def _run_batch(self, calls: list[_Call[Item, Answer]]) -> None:
        items = [item for call in calls for item in call.items]
        try:
            answers = await self._run(items)
        except asyncio.CancelledError:
            for call in calls:
                call.future.cancel()
            raise
        except Exception as error:  # noqa: BLE001 - handed to every caller of the batch
            for call in calls:
                if not call.future.done():
                    call.future.set_exception(error)
            return
        assert len(answers) == len(items), "one answer per item"
        position = 0
        for call in calls:
            end = position + len(call.items)
            if not call.future.done():
                call.future.set_result(answers[position:end])
            position = end
