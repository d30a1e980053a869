"""Turns what reads find wrong with fragments into debts: bounded, together, never in a read's way.

`ProblemLog.report` is the `ReportFragment` of a gateway's block client; called once per fragment
that a get could not use.  A task writes what has gathered in one transaction, a moment later.
Repair looks at each again before it believes it.  May not import Ray.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

import structlog
from sqlalchemy import Connection

from cluster import map_rows
from cluster.block_client_settings import FragmentProblem, ProblemKind
from cluster.block_sql import Debt
from cluster.debts import DebtReason, record_debts
from protocol.clock import Clock
from protocol.errors import HaversackError
from sql.database import Database

PROBLEMS_MAX: Final = 4_096
"""Problems waiting to be written; more are dropped: the next read, or a scrub, finds them again."""

GATHER_S: Final = 0.5
"""From the first problem to its transaction."""

RETRY_S: Final = 5.0
"""Before a transaction that failed is tried again."""

_REASONS: Final = {
    ProblemKind.MISSING: DebtReason.MISSING,
    ProblemKind.CORRUPT: DebtReason.CORRUPT,
    ProblemKind.IO_ERROR: DebtReason.UNREADABLE,
    ProblemKind.LIAR: DebtReason.LYING,
}
assert set(_REASONS) == set(ProblemKind)

log = structlog.get_logger()


class ProblemLog:
    """One per gateway; one event loop."""

    def __init__(self, db: Database, clock: Clock) -> None:
        self._db = db
        self._clock = clock
        self._waiting: dict[Debt, FragmentProblem] = {}
        self._writing: asyncio.Task[None] | None = None
        self.dropped = 0
        """Problems that found no room."""

    def report(self, problem: FragmentProblem) -> None:
        """Remember one fragment; returns at once."""
        debt = Debt(problem.volume, problem.slot, problem.block)
        if debt not in self._waiting and len(self._waiting) >= PROBLEMS_MAX:
            self.dropped += 1
            return
        self._waiting[debt] = problem
        if self._writing is None or self._writing.done():
            self._writing = asyncio.get_running_loop().create_task(self._write(), name="problems")

    async def _write(self) -> None:
        await self._clock.sleep(GATHER_S)
        while self._waiting:
            batch, self._waiting = list(self._waiting.values()), {}
            now = self._clock.wall()
            try:
                await self._db.write(lambda c, batch=batch, now=now: write_problems(c, batch, now))  # type: ignore[misc]
            except HaversackError as error:
                log.warning("fragment problems not recorded yet", error=error.message)
                for problem in batch:
                    debt = Debt(problem.volume, problem.slot, problem.block)
                    self._waiting.setdefault(debt, problem)
                await self._clock.sleep(RETRY_S)

    async def aclose(self) -> None:
        """Write no more.  What is lost is found again."""
        if self._writing is not None:
            self._writing.cancel()
            await asyncio.gather(self._writing, return_exceptions=True)


def write_problems(connection: Connection, problems: Sequence[FragmentProblem], now: float) -> None:
    """Make debts of problems, unless the slot has another node by now than the read asked."""
    views = {
        view.volume_id: view
        for view in map_rows.read_volumes(connection, {item.volume for item in problems})
    }
    for reason in DebtReason:
        rows = [
            Debt(item.volume, item.slot, item.block)
            for item in problems
            if _REASONS[item.kind] is reason
            and item.volume in views
            and views[item.volume].slots[item.slot] == item.node_id
        ]
        record_debts(connection, rows, now, reason)
