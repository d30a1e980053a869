"""What happened in a cell, for people who ask afterwards: `haversack why`, the status page.

Written inside the transactions that made it happen (placement, repair, verifier, jobs), so an event
is there exactly if the change is.  Nothing decides by them.  Functions over a connection; imports
neither Ray nor a clock.

The table holds the last `EVENTS_KEPT` events and at most `_PRUNE_EVERY` more; alarms, which stand
until they are cleared, are kept `_ALARMS_KEPT_TIMES` as long.  A loss of many blocks must not push
everything else out: one event tells of a volume and a count, not one of each block.
"""

from __future__ import annotations

import enum
from typing import Final, NamedTuple

from sqlalchemy import Connection, delete, insert, select

from cluster.schema import events
from protocol.ids import BlockHash, NodeId, VolumeId

EVENTS_KEPT: Final = 50_000
"""About 10 MB: some weeks of a cell in which a few things happen each hour."""

DETAIL_CHARACTERS_MAX: Final = 300

_PRUNE_EVERY: Final = 256
"""Events between two prunings: each deletes about so many rows from the old end of the key."""

_ALARMS_KEPT_TIMES: Final = 10

CELL: Final = "cell"
"""Subject of what concerns no single node, volume, block or job."""


class EventKind(enum.StrEnum):
    """What can happen.  Values are shown to people and kept in the table: never renamed."""

    NODE_ADDED = "node added"
    NODE_REGISTERED = "node registered"
    """A process opened its store: a new incarnation."""
    NODE_STATE = "node state"
    VOLUME_OPENED = "volume opened"
    VOLUME_SEALED = "volume sealed"
    VOLUME_REMOVED = "volume removed"
    MOVE_BEGUN = "move begun"
    MOVE_PUBLISHED = "move published"
    MOVE_ENDED = "move ended"
    """Without being published: another target is planned, or none is needed."""
    DEBT_FOUND = "debt found"
    DEBT_REPAID = "debt repaid"
    UNREPAIRABLE = "unrepairable"
    REPAIRABLE_AGAIN = "repairable again"
    FRAGMENT_SET_ASIDE = "fragment set aside"
    """A scrub, a read or the verifier found it corrupt or wrong."""
    STRAYS_REMOVED = "strays removed"
    PASS_ENDED = "pass ended"
    """Of a verifier or a scrubber."""
    JOB_STATE = "job state"
    LEADER = "leader"
    """A process took a role."""
    ALARM_RAISED = "alarm raised"
    ALARM_CLEARED = "alarm cleared"


class Event(NamedTuple):
    """One row: `at` in seconds of the wall clock, `subject` and `detail` as written."""

    event_id: int
    at: float
    kind: EventKind
    subject: str
    detail: str


Subject = NodeId | VolumeId | BlockHash | str
"""What an event is about: `node-03`, `v12`, a block's hash, `job-7`, or `CELL`."""


def record_event(
    connection: Connection, at: float, kind: EventKind, subject: Subject, detail: str = ""
) -> None:
    """Note that something happened at `at` (wall clock).  `detail` is one line for people, cut to
    `DETAIL_CHARACTERS_MAX`."""
    row = connection.execute(
        insert(events).values(at=at, kind=kind.value, subject=str(subject), detail=_short(detail))
    ).inserted_primary_key
    assert row is not None
    (event_id,) = row
    if event_id % _PRUNE_EVERY == 0:
        _prune(connection, event_id)


def read_events(
    connection: Connection, subject: Subject | None = None, limit: int = 50
) -> list[Event]:
    """The last `limit` events of one subject, or of all, newest first."""
    query = select(events).order_by(events.c.event_id.desc()).limit(limit)
    if subject is not None:
        query = query.where(events.c.subject == str(subject))
    return [
        Event(row.event_id, row.at, EventKind(row.kind), row.subject, row.detail)
        for row in connection.execute(query)
    ]


def _prune(connection: Connection, newest: int) -> None:
    """An alarm and its clearing go together: one without the other would say the opposite."""
    alarms = (EventKind.ALARM_RAISED.value, EventKind.ALARM_CLEARED.value)
    old = events.c.event_id <= newest - EVENTS_KEPT
    connection.execute(delete(events).where(old, events.c.kind.not_in(alarms)))
    older = events.c.event_id <= newest - _ALARMS_KEPT_TIMES * EVENTS_KEPT
    connection.execute(delete(events).where(older))


def _short(detail: str) -> str:
    if len(detail) <= DETAIL_CHARACTERS_MAX:
        return detail
    return detail[: DETAIL_CHARACTERS_MAX - 1] + "…"
