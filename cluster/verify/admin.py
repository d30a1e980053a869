"""What a gateway does about verification: show it, ask for it.  SQL only: the verifier may be away.

Called by `api.verify_routes`.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection

from cluster.verify.canaries import canaries_of
from cluster.verify.pass_rows import request_pass, verification_of
from cluster.verify.watch_rows import watching_of
from protocol.clock import Clock
from sql.database import Database


class Verification:
    """One per gateway."""

    def __init__(self, db: Database, clock: Clock) -> None:
        self._db = db
        self._clock = clock

    async def read(self) -> dict[str, Any]:
        """What was found, and what watches.  Raises `DatabaseBusy`."""
        now = self._clock.wall()

        def work(connection: Connection) -> dict[str, Any]:
            return {
                **verification_of(connection),
                "watcher": watching_of(connection, now),
                "canaries": canaries_of(connection),
            }

        return await self._db.read(work)

    async def request(self, *, deep: bool, remove_strays: bool, dry_run: bool) -> int:
        """Ask the verifier for a pass, or for a removal of strays; returns the request's number.

        Raises `DatabaseBusy`, `UnknownOutcome`.
        """
        now = self._clock.wall()
        return await self._db.write(
            lambda connection: request_pass(
                connection, now, deep=deep, remove_strays=remove_strays, dry_run=dry_run
            )
        )
