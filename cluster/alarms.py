"""What an operator has to know of without asking: conditions of the cell, and alarms that were
raised by whoever watches it and not cleared since.

Shown by status, `/metrics` and the status page.  `alarms_of` is pure; an alarm of a condition is
there exactly as long as the condition, so nothing has to clear it.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, func, select

from cluster.change.jobs import Job, JobState
from cluster.events import CELL, EventKind
from cluster.redundancy import Redundancy
from cluster.schema import events
from cluster.topology import NodeState, NodeView
from cluster.verify.pass_rows import PassRow

DEBT_OLD_S: Final = 24 * 3600.0
"""Repair that has not repaid a debt for a day is not getting it done."""

FAILURES_MIN: Final = 3
"""Of repair, in a row: a database that is busy makes a pass fail now and then."""

ALARMS_MAX: Final = 100
"""Of each kind; a cell that has more has one problem."""


class AlarmKind(enum.StrEnum):
    """Worst first.  The values are labels of a metric: append-only."""

    BLOCKS_UNREADABLE = "blocks_unreadable"
    BLOCKS_UNREPAIRABLE = "blocks_unrepairable"
    NO_SPARE = "no_spare"
    """Some blocks cannot lose another fragment, though their scheme has spare ones."""
    NODE_DOWN = "node_down"
    DEBT_OLD = "debt_old"
    REPAIR_FAILING = "repair_failing"
    """Pass after pass of the repair service ends in an error."""
    JOB_BLOCKED = "job_blocked"
    RAISED = "raised"
    """By a watcher: the verifier, canaries, a scrub."""


class Alarm(NamedTuple):
    """`subject` can be asked about with `haversack why`, unless it is `CELL` or a job."""

    kind: AlarmKind
    subject: str
    text: str
    since: float | None

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**self._asdict(), "kind": str(self.kind)}


def read_raised(connection: Connection) -> list[Alarm]:
    """Alarms that were raised and not cleared since; one per subject."""
    kinds = (EventKind.ALARM_RAISED.value, EventKind.ALARM_CLEARED.value)
    last = (
        select(func.max(events.c.event_id))
        .where(events.c.kind.in_(kinds))
        .group_by(events.c.subject)
    )
    query = (
        select(events)
        .where(events.c.event_id.in_(last), events.c.kind == EventKind.ALARM_RAISED.value)
        .order_by(events.c.event_id.desc())
        .limit(ALARMS_MAX)
    )
    return [
        Alarm(AlarmKind.RAISED, row.subject, row.detail, row.at)
        for row in connection.execute(query)
    ]


def alarms_of(
    nodes: Sequence[NodeView],
    redundancy: Redundancy,
    jobs: Iterable[Job],
    raised: Sequence[Alarm],
    now: float,
    failing: PassRow | None = None,
) -> tuple[Alarm, ...]:
    """All of them, worst first; `now` is the wall clock, `failing` what `read_failing` returns."""
    return (
        *_of_blocks(redundancy, now),
        *_of_repair(failing),
        *_of_nodes(nodes),
        *_of_jobs(jobs),
        *raised,
    )


def _of_blocks(redundancy: Redundancy, now: float) -> list[Alarm]:
    found = []
    histogram = redundancy.blocks_by_spare
    unreadable = sum(count for spare, count in histogram.items() if spare < 0)
    if unreadable:
        text = f"{unreadable} blocks cannot be read now: too many of their nodes are away"
        found.append(Alarm(AlarmKind.BLOCKS_UNREADABLE, CELL, text, None))
    if redundancy.unrepairable:
        text = f"{redundancy.unrepairable} blocks cannot be repaired from what is there"
        found.append(Alarm(AlarmKind.BLOCKS_UNREPAIRABLE, CELL, text, None))
    # A cell that never had spare fragments has nothing to be alarmed at.
    if histogram.get(0) and max(histogram) > 0:
        text = f"{histogram[0]} blocks cannot lose another fragment"
        found.append(Alarm(AlarmKind.NO_SPARE, CELL, text, None))
    oldest = redundancy.oldest_debt
    if oldest is not None and now - oldest > DEBT_OLD_S:
        text = f"the oldest of {redundancy.debts} owed fragments is a day old: is repair running?"
        found.append(Alarm(AlarmKind.DEBT_OLD, CELL, text, oldest))
    return found


def _of_repair(failing: PassRow | None) -> list[Alarm]:
    if failing is None or failing.number < FAILURES_MIN:
        return []
    text = (
        f"repair failed {failing.number} times in a row, last with: {failing.body['error']}; "
        "it goes on trying: see logs/repair.log"
    )
    return [Alarm(AlarmKind.REPAIR_FAILING, CELL, text, failing.begun)]


def _of_nodes(nodes: Sequence[NodeView]) -> list[Alarm]:
    down = [node for node in nodes if node.state is NodeState.DOWN][:ALARMS_MAX]
    return [
        Alarm(
            AlarmKind.NODE_DOWN,
            str(node.node_id),
            f"{node.node_id} is down" + (f": {node.detail}" if node.detail else ""),
            node.state_since,
        )
        for node in down
    ]


def _of_jobs(jobs: Iterable[Job]) -> list[Alarm]:
    return [
        Alarm(
            AlarmKind.JOB_BLOCKED,
            job.name,
            f"{job.name} ({job.kind} of {job.subject}): {job.progress.blockers[0].volume}: "
            f"{job.progress.blockers[0].reason}",
            job.changed,
        )
        for job in jobs
        if job.state is JobState.RUNNING and job.progress.blockers
    ]
