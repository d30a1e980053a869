"""Commit versions in batches, one batch at a time, while blocks still travel.

Step 4 of the life of a put from a folder.  Called by `client.upload`; may import `protocol` and
`client.api`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from client.api import HaversackClient
from client.entries import Entry, NewEntry
from protocol.errors import HaversackError, InvalidRequest
from protocol.limits import COMMIT_BLOCKS_MAX, COMMIT_ENTRIES_MAX, JSON_BODY_BYTES_MAX

_BATCH_JSON_BYTES = JSON_BODY_BYTES_MAX // 2
_LINGER_S = 2.0
"""A short batch waits this long for more, so that a killed upload repeats little."""

Settled = Callable[[Entry | HaversackError], None]


class _Waiting(NamedTuple):
    new: NewEntry
    json_bytes: int
    settled: Settled


class CommitQueue:
    """Versions waiting for their batch.  An async context manager.

    `settled` of each entry is called with the entry committed or with its error; the error of a
    whole call reaches every entry of the batch.  Bounded: whoever fills a batch waits for it.
    """

    def __init__(self, client: HaversackClient) -> None:
        self._client = client
        self._waiting: deque[_Waiting] = deque()
        self._json_bytes = 0
        self._one_at_a_time = asyncio.Lock()
        self._ticker: asyncio.Task[None] | None = None

    async def __aenter__(self) -> CommitQueue:
        self._ticker = asyncio.create_task(self._tick())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._ticker is not None
        self._ticker.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._ticker

    async def put(self, new: NewEntry, settled: Settled) -> None:
        """Take one version; waits for a commit when there are enough for one."""
        json_bytes = new.json_bytes_at_most()
        blocks = len(new.blocks or ())
        if blocks > COMMIT_BLOCKS_MAX or json_bytes > JSON_BODY_BYTES_MAX - 1024:
            settled(InvalidRequest(f"{new.path!r} has {blocks} blocks: too many for one version"))
            return
        self._waiting.append(_Waiting(new, json_bytes, settled))
        self._json_bytes += json_bytes
        if len(self._waiting) >= COMMIT_ENTRIES_MAX or self._json_bytes >= _BATCH_JSON_BYTES:
            await self._commit_batch()

    async def drain(self) -> None:
        """Commit everything taken so far."""
        while self._waiting or self._one_at_a_time.locked():
            await self._commit_batch()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_LINGER_S)
            await self._commit_batch()

    async def _commit_batch(self) -> None:
        async with self._one_at_a_time:
            batch = self._take()
            if not batch:
                return
            results: list[Entry | HaversackError]
            try:
                results = await self._client.commit_many([item.new for item in batch])
            except HaversackError as error:
                results = [error] * len(batch)
            for item, result in zip(batch, results, strict=True):
                item.settled(result)

    def _take(self) -> list[_Waiting]:
        """The oldest versions, as many as one call may carry."""
        batch: list[_Waiting] = []
        length = 0
        while self._waiting and len(batch) < COMMIT_ENTRIES_MAX:
            length += self._waiting[0].json_bytes
            if batch and length > _BATCH_JSON_BYTES:
                break
            batch.append(self._waiting.popleft())
            self._json_bytes -= batch[-1].json_bytes
        return batch
