"""Many concurrent calls, a few groups under way: what comes while they run goes together, next.

Used by `block_client` so that small puts that are waiting at the same time share frames and
receipts, and by `shared_reads` so that small reads of one node share a frame.  Pure asyncio; knows
nothing of blocks.

How it differs from `coalescer`: several groups run at a time, each call is answered as soon as its
own answer is there, and a group that nobody waits for any more is cancelled.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from protocol.errors import Overloaded

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class GroupCall(Generic[Item, Answer]):
    """One call of a group, as `run` sees it."""

    __slots__ = ("answer", "group", "item")

    def __init__(self, item: Item, answer: asyncio.Future[Answer]) -> None:
        self.item = item
        self.answer = answer
        self.group: _Group | None = None
        """None while it waits."""

    def settle(self, answer: Answer) -> None:
        """Answer this call now, whatever becomes of the others.  Only the first answer counts."""
        if not self.answer.done():
            self.answer.set_result(answer)


class _Group:
    """Calls that run together."""

    __slots__ = ("holds_lane", "task", "waited_for")

    def __init__(self) -> None:
        self.holds_lane = True
        self.task: asyncio.Task[None] | None = None
        self.waited_for = 0
        """Callers that are still there."""


class Grouping(Generic[Item, Answer]):
    """Calls `run` with groups of calls; `run` settles every one of them, or raises.

    A call that finds a free lane starts in this turn of the loop, together with the others of this
    turn; else it waits, and goes with all that wait when a lane is free.  A group that has not
    ended after `late_s` gives its lane back, so that one bad node does not hold up what has
    nothing to do with it.

    A caller that is cancelled leaves: before its group has started its item is dropped; afterwards
    the group runs on for the others, and is cancelled when it was the last.  An error of `run` goes
    to every call of that group that has no answer yet.
    """

    def __init__(
        self,
        run: Callable[[Sequence[GroupCall[Item, Answer]]], Awaitable[None]],
        *,
        items_max: int,
        calls_max: int,
        lanes: int,
        late_s: float,
    ) -> None:
        """`items_max` bounds a group, `calls_max` all calls that wait or run."""
        assert 0 < items_max <= calls_max
        self._run = run
        self._items_max = items_max
        self._calls_max = calls_max
        self._lanes_free = lanes
        self._late_s = late_s
        self._waiting: deque[GroupCall[Item, Answer]] = deque()
        self._is_starting = False
        self._calls = 0

    async def submit(self, item: Item) -> Answer:
        """The answer to one item.  Raises `Overloaded` when too many calls wait or run, and
        what `run` raises."""
        if self._calls >= self._calls_max:
            raise Overloaded("too many small requests wait for storage nodes: retry later")
        call = GroupCall[Item, Answer](item, asyncio.get_running_loop().create_future())
        self._waiting.append(call)
        self._calls += 1
        self._start_group()
        try:
            return await call.answer
        except asyncio.CancelledError:
            await self._abandon(call)
            raise
        finally:
            self._calls -= 1
            if call.group is not None:
                call.group.waited_for -= 1

    async def _abandon(self, call: GroupCall[Item, Answer]) -> None:
        """The caller gives up.  Nothing is left running for nobody."""
        if call.answer.done() and not call.answer.cancelled():
            call.answer.exception()  # it came in the same instant, and nobody else fetches it
        group = call.group
        if group is None:
            self._waiting.remove(call)
            return
        task = group.task
        if group.waited_for == 1 and task is not None and not task.done():
            task.cancel()
            await asyncio.wait((task,))

    # -- groups --------------------------------------------------------------------------------

    def _start_group(self) -> None:
        """Start one if there is a lane; its calls are those that wait when it runs, one turn of the
        loop from now."""
        if self._is_starting or not self._waiting or self._lanes_free <= 0:
            return
        self._is_starting = True
        self._lanes_free -= 1
        group = _Group()
        group.task = asyncio.get_running_loop().create_task(self._run_group(group))

    async def _run_group(self, group: _Group) -> None:
        calls = self._take(group)
        self._is_starting = False
        if not calls:
            self._end_lane(group)
            return
        self._start_group()
        late = asyncio.get_running_loop().call_later(self._late_s, self._end_lane, group)
        try:
            await self._run(calls)
            assert all(call.answer.done() for call in calls), "every call is settled"
        except asyncio.CancelledError:
            for call in calls:
                call.answer.cancel()
            raise
        except Exception as error:  # noqa: BLE001 - handed to every caller that has no answer
            for call in calls:
                if not call.answer.done():
                    call.answer.set_exception(error)
        finally:
            late.cancel()
            self._end_lane(group)

    def _take(self, group: _Group) -> list[GroupCall[Item, Answer]]:
        """Calls for one group, oldest first."""
        taken: list[GroupCall[Item, Answer]] = []
        while self._waiting and len(taken) < self._items_max:
            call = self._waiting.popleft()
            call.group = group
            taken.append(call)
        group.waited_for = len(taken)
        return taken

    def _end_lane(self, group: _Group) -> None:
        if group.holds_lane:
            group.holds_lane = False
            self._lanes_free += 1
            self._start_group()
