"""What is known of repair that fails again and again, for the alarm of it.

Called by `RepairService` after each of its passes.  A failure that nobody expected ends the
service, and its process makes another: the count is in SQL, so that it lasts.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

import structlog
from sqlalchemy import Connection

from cluster.verify.pass_rows import CELL, PassRow, forget_pass, read_pass, write_pass
from protocol.clock import Clock
from protocol.errors import HaversackError, NotLeader

log = structlog.get_logger()

FAILING: Final = "repair failing"
"""Kind of the row; there is one as long as the last pass failed."""

ERROR_CHARACTERS_MAX: Final = 300

Guarded = Callable[[Callable[[Connection], None]], Awaitable[Any]]
"""A transaction under the role of repair."""


class FailureBook:
    """Counts passes that failed, one after the other."""

    def __init__(self, clock: Clock, lead: Guarded) -> None:
        self._clock = clock
        self._lead = lead
        self._is_clear = False
        """There is no row.  An earlier process may have left one."""

    async def failed(self, error: Exception) -> None:
        """One more.  Never raises for want of a database: the next failure is noted then."""
        self._is_clear = False
        now = self._clock.wall()
        said = error.message if isinstance(error, HaversackError) else repr(error)

        def work(connection: Connection) -> None:
            last = read_pass(connection, FAILING, CELL) or PassRow(0, now, None, {})
            body = {"error": said[:ERROR_CHARACTERS_MAX], "at": now}
            row = PassRow(last.number + 1, last.begun, None, body)
            write_pass(connection, FAILING, CELL, row)

        try:
            await self._lead(work)
        except NotLeader:
            raise
        except HaversackError as unnoted:
            log.warning("failure of repair not noted", error=unnoted.message)

    async def worked(self) -> None:
        """A whole pass went well.  Raises what a transaction raises."""
        if not self._is_clear:
            await self._lead(lambda connection: forget_pass(connection, FAILING, CELL))
            self._is_clear = True


def read_failing(connection: Connection) -> PassRow | None:
    """Since when, how often in a row (`number`) and the last error (`error`); None if the last
    pass went well."""
    return read_pass(connection, FAILING, CELL)
