"""SQL of the watchers: which acknowledged blocks are read again, when, and what came of it.

Several gateways share the table: a look is taken by moving its `due` ahead in a transaction, and
whoever took it writes the result only if `due` is still the one it set.  Functions over a
connection; no clock, no event loop, no Ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, bindparam, delete, func, insert, select, update

from cluster.events import EventKind, Subject
from cluster.schema import events, watched
from cluster.verify.pass_rows import CELL, PassRow, read_pass, write_pass
from protocol.ids import BlockHash

WATCH: Final = "watch"
"""Kind of the row of `passes` that holds the sums."""

_HASHES_PER_QUERY: Final = 500


class WatchedBlock(NamedTuple):
    """A block whose next look was taken."""

    hash: BlockHash
    acknowledged: float
    step: int
    tries: int
    due: float
    """Until when it is taken."""


class Look(NamedTuple):
    """What came of a look."""

    taken: WatchedBlock
    outcome: str
    failed: bool
    next_step: int
    next_due: float | None
    """None: this was the last one."""
    tries: int


def watch_blocks(
    connection: Connection, found: Sequence[BlockHash], now: float, due: float, rows_max: int
) -> int:
    """Have these read again from `due` on, as far as the table has room; returns how many."""
    held: int = connection.execute(select(func.count()).select_from(watched)).scalar_one()
    wanted = sorted(set(found))[: max(0, rows_max - held)]
    known: set[bytes] = set()
    for start in range(0, len(wanted), _HASHES_PER_QUERY):
        part = [bytes(block) for block in wanted[start : start + _HASHES_PER_QUERY]]
        query = select(watched.c.hash).where(watched.c.hash.in_(part))
        known |= set(connection.execute(query).scalars())
    rows = [
        {"hash": bytes(block), "acknowledged": now, "step": 0, "due": due, "tries": 0}
        for block in wanted
        if bytes(block) not in known
    ]
    if rows:
        connection.execute(insert(watched), rows)
    return len(rows)


def is_look_due(connection: Connection, now: float) -> bool:
    """Whether `take_looks` would find anything."""
    return connection.execute(select(watched.c.due).where(watched.c.due <= now)).first() is not None


def take_looks(connection: Connection, now: float, until: float, limit: int) -> list[WatchedBlock]:
    """Looks that are due, taken until `until`: if nothing is heard of them they are due again."""
    query = (
        select(watched).where(watched.c.due <= now).order_by(watched.c.due).limit(limit)
    ).with_for_update(skip_locked=True)
    rows = connection.execute(query).all()
    if rows:
        connection.execute(
            update(watched).where(watched.c.hash == bindparam("at")).values(due=until),
            [{"at": row.hash} for row in rows],
        )
    return [
        WatchedBlock(BlockHash(row.hash), row.acknowledged, row.step, row.tries, until)
        for row in rows
    ]


def settle_look(connection: Connection, look: Look, now: float) -> bool:
    """Write down a look and add it to the sums; False if somebody else has taken it since."""
    mine = (watched.c.hash == bytes(look.taken.hash), watched.c.due == look.taken.due)
    if look.next_due is None:
        done = connection.execute(delete(watched).where(*mine))
    else:
        done = connection.execute(
            update(watched)
            .where(*mine)
            .values(step=look.next_step, due=look.next_due, tries=look.tries)
        )
    if done.rowcount == 0:
        return False
    held = read_pass(connection, WATCH, CELL) or PassRow(0, now, None, {"failures": []})
    body: dict[str, Any] = {**held.body, look.outcome: held.body.get(look.outcome, 0) + 1}
    if look.failed:
        told = {"block": str(look.taken.hash), "outcome": look.outcome, "at": now}
        body["failures"] = [told, *body["failures"]][:10]
    write_pass(connection, WATCH, CELL, PassRow(held.number + 1, held.begun, None, body))
    return True


def is_raised(connection: Connection, subject: Subject) -> bool:
    """Whether the last alarm about a subject was not cleared."""
    kinds = (EventKind.ALARM_RAISED.value, EventKind.ALARM_CLEARED.value)
    query = (
        select(events.c.kind)
        .where(events.c.subject == str(subject), events.c.kind.in_(kinds))
        .order_by(events.c.event_id.desc())
        .limit(1)
    )
    return connection.execute(query).scalar_one_or_none() == EventKind.ALARM_RAISED.value


def forget_watched(connection: Connection, blocks: Sequence[BlockHash]) -> None:
    """These leave the index on purpose: nobody is to miss them.  For whoever deletes their rows,
    in the same transaction."""
    if blocks:
        connection.execute(
            delete(watched).where(watched.c.hash == bindparam("at")),
            [{"at": bytes(block)} for block in blocks],
        )


def watching_of(connection: Connection, now: float) -> dict[str, Any]:
    """What an operator sees of the watchers: plain data."""
    rows = connection.execute(
        select(watched.c.step, func.count(), func.min(watched.c.due)).group_by(watched.c.step)
    ).all()
    sums = read_pass(connection, WATCH, CELL)
    late_s = max((now - due for _, _, due in rows), default=0.0)
    return {
        "blocks": sum(count for _, count, _ in rows),
        "by_step": {str(step): count for step, count, _ in rows},
        "late_s": max(0.0, late_s),
        "looks": {} if sums is None else sums.body,
    }
