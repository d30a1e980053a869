"""The store that a node has open, and who is using it.

`StorageNode` runs every call of the store through here: a store is closed only when nobody uses
it any more, though callers come and go and some work goes on after its caller left.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from storage_node.group_commit import Run
from storage_node.interface import FragmentStore


class StoreUse:
    """At most one open store.  All methods belong to one event loop."""

    def __init__(self, run: Run, run_slow: Run) -> None:
        """`run` carries out what takes a millisecond or so, `run_slow` the rest."""
        self.store: FragmentStore | None = None
        self._run = run
        self._run_slow = run_slow
        self._users = 0
        self._unused = asyncio.Event()
        self._unused.set()

    async def quickly(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Run blocking `work` of the store; it is not closed meanwhile."""
        self._begin()
        try:
            return await self._run(work, *arguments)
        finally:
            self._end()

    async def slowly(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """As `quickly`, off the loop.  A caller that goes away does not end the work."""
        self._begin()
        running = asyncio.ensure_future(self._run_slow(work, *arguments))
        running.add_done_callback(self._end)
        return await asyncio.shield(running)

    async def close(self) -> None:
        """Give the store to nobody from now on; returns when the last user is done with it and it
        is closed."""
        store, self.store = self.store, None
        await self._unused.wait()
        if store is not None:
            await self._run_slow(store.close)

    def _begin(self) -> None:
        self._users += 1
        self._unused.clear()

    def _end(self, _done: object = None) -> None:
        self._users -= 1
        if self._users == 0:
            self._unused.set()
