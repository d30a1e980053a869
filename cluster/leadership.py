"""Roles that one process at a time may hold, fenced by an epoch in SQL.

Called inside transactions by the placement service, and by whatever else must not run twice
(repair, garbage).  Ray can run two copies of one named actor; this row decides which of them
counts.  Functions over a connection; imports no Ray.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import Connection, bindparam, insert, select, update

from cluster.schema import leaders
from protocol.errors import NotLeader

_HELD: Final = (
    select(leaders.c.epoch, leaders.c.holder)
    .where(leaders.c.role == bindparam("role"))
    .with_for_update()
)


def take_role(connection: Connection, role: str, holder: str, now: float) -> int:
    """Make `holder` the leader, whoever was before; returns its epoch.

    The one before finds out at its next transaction (`check_role`) and stops itself.
    """
    changed = connection.execute(
        update(leaders)
        .where(leaders.c.role == role)
        .values(epoch=leaders.c.epoch + 1, holder=holder, since=now)
    )
    if changed.rowcount == 0:
        connection.execute(insert(leaders).values(role=role, epoch=1, holder=holder, since=now))
    epoch: int = connection.execute(
        select(leaders.c.epoch).where(leaders.c.role == role)
    ).scalar_one()
    return epoch


def check_role(connection: Connection, role: str, epoch: int) -> None:
    """First statement of every transaction of a leader.  Raises `NotLeader` for an older epoch.

    Holds the row until the end of the transaction, so that nobody can take the role in between.
    """
    row = connection.execute(_HELD, {"role": role}).one()
    if row.epoch != epoch:
        raise NotLeader(
            f"{row.holder} has been {role} leader since epoch {row.epoch}, this process held "
            f"epoch {epoch}: it stops; ask the new leader",
            {"role": role, "epoch": row.epoch},
        )
