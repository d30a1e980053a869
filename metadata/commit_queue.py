"""Single commits that wait for the same namespace become one batch.

Between `Tree.commit` and the transaction.  A commit alone costs some eight statements; in a batch
the statements are shared, so a busy namespace takes several times as many commits a second, and a
quiet one waits for nothing.  Called by `metadata.tree` only.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from metadata.batch import CommitResult
from metadata.changes import Change
from protocol.errors import HaversackError, Overloaded
from protocol.limits import COMMIT_ENTRIES_MAX

Outcome = CommitResult | HaversackError
"""What became of one entry of a batch."""

WAITING_COMMITS_MAX = 4 * COMMIT_ENTRIES_MAX
"""Single commits that wait for one namespace before callers are told to slow down."""


class _Waiting(NamedTuple):
    change: Change
    future: asyncio.Future[Outcome]


class CommitQueue:
    """One line of waiting commits for each busy namespace."""

    def __init__(self, run: Callable[[int, list[Change]], Awaitable[list[Outcome]]]) -> None:
        """`run(namespace, changes)` carries out a batch in one transaction."""
        self._run = run
        self._lines: dict[int, deque[_Waiting]] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}

    async def commit(self, namespace_id: int, change: Change) -> Outcome:
        """Carry out `change` with those that wait beside it; what `run` raises, for it alone.

        A caller that is cancelled does not stop its change.  Raises `Overloaded`.
        """
        line = self._lines.setdefault(namespace_id, deque())
        if len(line) >= WAITING_COMMITS_MAX:
            raise Overloaded("too many commits are waiting for this namespace: retry later")
        loop = asyncio.get_running_loop()
        waiting = _Waiting(change, loop.create_future())
        line.append(waiting)
        if namespace_id not in self._tasks:
            self._tasks[namespace_id] = loop.create_task(self._work_off(namespace_id, line))
        return await waiting.future

    async def _work_off(self, namespace_id: int, line: deque[_Waiting]) -> None:
        try:
            while line:
                count = min(len(line), COMMIT_ENTRIES_MAX)
                await self._run_group(namespace_id, [line.popleft() for _ in range(count)])
        finally:
            del self._tasks[namespace_id], self._lines[namespace_id]
            for waiting in line:  # only if this task was cancelled
                waiting.future.cancel()

    async def _run_group(self, namespace_id: int, group: list[_Waiting]) -> None:
        """All at once; if that fails for a reason that is one change's, each by itself."""
        try:
            outcomes = await self._run(namespace_id, [waiting.change for waiting in group])
        except asyncio.CancelledError:
            for waiting in group:
                waiting.future.cancel()
            raise
        except HaversackError as error:
            for waiting in group:
                _settle(waiting, error)
        except Exception as error:  # noqa: BLE001 - handed to the caller it belongs to
            if len(group) > 1:
                for waiting in group:
                    await self._run_group(namespace_id, [waiting])
            elif not group[0].future.done():
                group[0].future.set_exception(error)
        else:
            for waiting, outcome in zip(group, outcomes, strict=True):
                _settle(waiting, outcome)


def _settle(waiting: _Waiting, outcome: Outcome) -> None:
    if not waiting.future.done():
        waiting.future.set_result(outcome)
