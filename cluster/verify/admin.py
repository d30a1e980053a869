"""What a gateway does about verification: show it, ask for it.  SQL only: the verifier may be away.

Called by `api.verify_routes`.
"""

from __future__ import annotations

from typing import Any

from cluster.verify.pass_rows import request_pass, verification_of
from protocol.clock import Clock
from sql.database import Database


class Verification:
    """One per gateway."""

    def __init__(self, db: Database, clock: Clock) -> None:
        self._db = db
        self._clock = clock

    async def read(self) -> dict[str, Any]:
        """See `pass_rows.verification_of`.  Raises `DatabaseBusy`."""
        return await self._db.read(verification_of)

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
