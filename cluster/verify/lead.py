"""Transactions that only the leader of the role `repair` may make.

The verifier runs in the process that repairs, under its role: what it writes down is what repair
acts on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar

from sqlalchemy import Connection

from cluster.leadership import check_role
from sql.database import Database

T = TypeVar("T")

ROLE: Final = "repair"


class Lead:
    """A database in the hands of a leader."""

    def __init__(self, db: Database, epoch: Callable[[], int]) -> None:
        """`epoch` is of the role as its holder took it; 0 until then."""
        self.db = db
        self._epoch = epoch

    @property
    def has_role(self) -> bool:
        """Whether the role was taken; it may have been lost since."""
        return self._epoch() > 0

    async def write(self, work: Callable[[Connection], T]) -> T:
        """A transaction.  Raises `NotLeader`, `DatabaseBusy`, `UnknownOutcome`."""
        epoch = self._epoch()

        def guarded(connection: Connection) -> T:
            check_role(connection, ROLE, epoch)
            return work(connection)

        return await self.db.write(guarded)
