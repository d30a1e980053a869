"""Answers `what-if` in a gateway: reads the slot table when somebody asks, keeps it for a moment.

Called by `api.explain_routes`.  One question is worked on at a time, on a reader thread of the
database, so that memory is bounded by one table and one answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from cluster.explain.domains import Level, resolve
from protocol.clock import Clock
from sql.database import Database

if TYPE_CHECKING:
    from cluster.explain.slot_table import SlotTable

KEPT_S: Final = 10.0
"""Somebody who tries several losses in a row waits for one reading of the table."""


class Losses:
    """One per gateway and event loop."""

    def __init__(self, db: Database, clock: Clock) -> None:
        self._db = db
        self._clock = clock
        self._table: SlotTable | None = None
        self._read_at = float("-inf")
        self._turn = asyncio.Lock()

    async def lose(self, names: Sequence[str]) -> dict[str, Any]:
        """What the loss of all of these would leave.  Raises `InvalidRequest` for a name that is
        none, `DatabaseBusy`."""

        def work(table: SlotTable) -> dict[str, Any]:
            from cluster.explain.what_if import lose

            domains = [resolve(name, table.nodes) for name in names]
            return lose(table, domains).to_json()

        return await self._ask(work)

    async def worst(self, level: Level) -> dict[str, Any]:
        """The worst that the loss of any one domain of a level would leave, in full, and those
        that come next.  Raises `DatabaseBusy`."""

        def work(table: SlotTable) -> dict[str, Any]:
            from cluster.explain.what_if import histogram_json, lose, worst_of

            risks = worst_of(table, level)
            return {
                **lose(table, [risk.domain for risk in risks[:1]]).to_json(),
                "worst": [
                    {"domain": str(risk.domain), "after": histogram_json(risk.after)}
                    for risk in risks
                ],
            }

        return await self._ask(work)

    async def _ask(self, work: Any) -> dict[str, Any]:
        # NumPy is loaded by the first question, not by every gateway at its start.
        async with self._turn:
            now = self._clock.monotonic()
            if now - self._read_at >= KEPT_S:
                self._table = None

            def answer(connection: Any) -> dict[str, Any]:
                from cluster.explain.slot_table import read_slot_table

                if self._table is None:
                    self._table = read_slot_table(connection)
                    self._read_at = now
                found: dict[str, Any] = work(self._table)
                return found

            return await self._db.read(answer)
