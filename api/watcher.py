"""The watcher: reads a share of acknowledged new blocks again, through the public API.

A task of each gateway, started by `api.gateway`.  After a minute, an hour, a day and a week a block
is asked for over HTTP like any other, by a client that hashes what it gets.  The schedule is in
SQL: it outlives gateways, and no look is made twice.

Nothing that happens to a gateway makes a block suspect: an error that may pass is tried again for
half an hour before it counts.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import Final

import structlog
from sqlalchemy import Connection

from client.retry import RetryPolicy
from cluster.events import EventKind, record_event
from cluster.verify.watch_rows import (
    Look,
    WatchedBlock,
    is_look_due,
    is_raised,
    settle_look,
    take_looks,
    watch_blocks,
)
from protocol.clock import Clock
from protocol.errors import (
    BlockNotFound,
    CorruptReply,
    HaversackError,
    RetryLater,
    UnknownOutcome,
)
from protocol.ids import BlockHash
from sql.database import Database

LOOKS_AFTER_S: Final = (60.0, 3600.0, 24 * 3600.0, 7 * 24 * 3600.0)
"""After the acknowledgement: soon enough to blame a deployment, late enough to meet decay."""

WATCHED_MAX: Final = 100_000
"""Blocks in the schedule: a week of 16 sampled writes a minute; more are not watched."""

NOTICED_MAX: Final = 4_096
"""Blocks noticed since the last step."""

GOOD: Final = "good"
"""Outcome of a look that got the block."""

STEP_S: Final = 1.0
LOOKS_PER_STEP: Final = 16
TAKEN_S: Final = 600.0
"""A gateway that took looks and died keeps them from the others for so long."""

TRIES_MAX: Final = 5
TRY_AGAIN_S: Final = 60.0
"""Doubled with each try: half an hour in all."""

FAILED_AGAIN_S: Final = 24 * 3600.0

WATCH_POLICY: Final = RetryPolicy(attempts_max=5, total_s=30.0)
"""Of each look, by the client."""

log = structlog.get_logger()

Read = Callable[[BlockHash], Awaitable[bytes]]
"""The bytes of a block, hashed; see `HaversackClient.get_block`."""


class WatchSample:
    """Draws the blocks to be watched, where puts are answered."""

    def __init__(self, rng: random.Random, share: float) -> None:
        self._rng = rng
        self._share = share
        self._noticed: list[BlockHash] = []

    def notice(self, block: BlockHash) -> None:
        """A new block was acknowledged."""
        if self._rng.random() < self._share and len(self._noticed) < NOTICED_MAX:
            self._noticed.append(block)

    def take(self) -> list[BlockHash]:
        """What was drawn since the last time."""
        noticed, self._noticed = self._noticed, []
        return noticed


class Watcher:
    """One per gateway.  One event loop."""

    def __init__(
        self,
        db: Database,
        clock: Clock,
        sample: WatchSample,
        read: Read,
        count: Callable[[str], None],
    ) -> None:
        """`count` is told the outcome of each look."""
        self._db = db
        self._clock = clock
        self._sample = sample
        self._read = read
        self._count = count

    async def run(self) -> None:
        """Watch until cancelled."""
        while True:
            try:
                await self.step()
            except (RetryLater, UnknownOutcome) as error:
                log.warning("the watcher's step failed", error=error.message)
            await self._clock.sleep(STEP_S)

    async def step(self) -> int:
        """Schedule what was noticed, then carry out some looks that are due; returns how many.

        Raises `DatabaseBusy`, `UnknownOutcome`.
        """
        noticed = self._sample.take()
        now = self._clock.wall()
        if noticed:
            due = now + LOOKS_AFTER_S[0]
            await self._db.write(lambda c: watch_blocks(c, noticed, now, due, WATCHED_MAX))
        if not await self._db.read(lambda c: is_look_due(c, now)):
            return 0
        taken = await self._db.write(lambda c: take_looks(c, now, now + TAKEN_S, LOOKS_PER_STEP))
        for block in taken:
            await self._look(block)
        return len(taken)

    async def _look(self, block: WatchedBlock) -> None:
        try:
            await self._read(block.hash)
        except HaversackError as error:
            look = failed_look(block, error, self._clock.wall())
        else:
            look = next_look(block, GOOD, self._clock.wall())
        now = self._clock.wall()
        if await self._db.write(lambda connection: _settle(connection, look, now)):
            self._count(look.outcome)
            if look.failed:
                log.error("a block does not read back", block=str(block.hash), why=look.outcome)


def next_look(block: WatchedBlock, outcome: str, now: float, *, failed: bool = False) -> Look:
    """This look is over.  A block that failed its last one is asked for daily until it reads: its
    alarm stands as long."""
    step = block.step + 1
    if step == len(LOOKS_AFTER_S):
        if failed and outcome != BlockNotFound.kind:
            return Look(block, outcome, failed, block.step, now + FAILED_AGAIN_S, 0)
        return Look(block, outcome, failed, step, None, 0)
    due = max(block.acknowledged + LOOKS_AFTER_S[step], now)
    return Look(block, outcome, failed, step, due, 0)


def failed_look(block: WatchedBlock, error: HaversackError, now: float) -> Look:
    """What an error means: at once for a block that is gone or wrong, later for what may pass."""
    final = isinstance(error, BlockNotFound | CorruptReply)
    if final or block.tries + 1 >= TRIES_MAX:
        return next_look(block, error.kind, now, failed=True)
    due = now + TRY_AGAIN_S * 2**block.tries
    return Look(block, "tried again", False, block.step, due, block.tries + 1)


def _settle(connection: Connection, look: Look, now: float) -> bool:
    settled = settle_look(connection, look, now)
    if settled and look.outcome == GOOD and is_raised(connection, look.taken.hash):
        record_event(connection, now, EventKind.ALARM_CLEARED, look.taken.hash, "it reads again")
    if settled and look.failed:
        after = f"{now - look.taken.acknowledged:.0f} s after its write was acknowledged"
        detail = f"watcher: {look.outcome}, {after}"
        record_event(connection, now, EventKind.ALARM_RAISED, look.taken.hash, detail)
    return settled
