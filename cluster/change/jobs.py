"""Jobs: changes that somebody asked for, their progress and their end.

Created by the gateway (`api.change_routes`), carried out by `cluster.change.runner` in the repair
actor.  A job holds what was asked for and never a list of steps: whoever carries it out plans from
the present state, so a restart has nothing to replay.  Functions over a connection; no clock, no
event loop, no Ray.

Life of a job
-------------

               start            finish
    planned ----------> running --------> done
       |  |              |  |  |  fail
       |  | pause  pause |  ^  +--------> failed
       |  |              v  | resume
       |  +----------> paused
       |  cancel         |  cancel
       +-----------------+--------------> cancelled     (running takes cancel as well)

`done`, `cancelled` and `failed` are final.  A job that can get no further is not failed: it stays
running and says what blocks it, because a node that is added or comes back lets it go on.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, TypeAlias

import orjson
from sqlalchemy import Connection, Row, delete, insert, select, update

from cluster import map_rows
from cluster.events import EventKind, record_event
from cluster.schema import jobs
from erasure.scheme import Scheme
from protocol.errors import JobNotFound, WrongState

JobId: TypeAlias = int

JOBS_KEPT: Final = 1_000
"""Ended jobs beyond these are forgotten, oldest first: years of an ordinary cell."""

BLOCKERS_KEPT: Final = 100
"""What blocks a job, at most so many rows of it: the count is kept as well."""


class JobKind(enum.StrEnum):
    """What can be asked for.  The values are stored and part of the API: append-only."""

    DRAIN = "drain"
    """Move all slots of a node to others; it stays a member."""
    DECOMMISSION = "decommission"
    """Drain a node, then remove it from the cell."""
    REPLACE = "replace"
    """Move all slots of a node to one other, then remove it."""
    REBALANCE = "rebalance"
    """Even out what the nodes hold."""
    TRANSCODE = "transcode"
    """Write the blocks of one scheme anew in another."""


class JobState(enum.StrEnum):
    """Where a job is in its life; see the diagram above.  The values are stored: append-only."""

    PLANNED = "planned"
    RUNNING = "running"
    PAUSED = "paused"
    DONE = "done"
    CANCELLED = "cancelled"
    FAILED = "failed"


class JobEvent(enum.StrEnum):
    """What can happen to a job."""

    START = "start"
    PAUSE = "pause"
    RESUME = "resume"
    FINISH = "finish"
    CANCEL = "cancel"
    FAIL = "fail"


_S, _E = JobState, JobEvent

JOB_TRANSITIONS: Final[Mapping[tuple[JobState, JobEvent], JobState]] = MappingProxyType(
    {
        (_S.PLANNED, _E.START): _S.RUNNING,
        (_S.PLANNED, _E.PAUSE): _S.PAUSED,
        (_S.PLANNED, _E.CANCEL): _S.CANCELLED,
        (_S.RUNNING, _E.PAUSE): _S.PAUSED,
        (_S.RUNNING, _E.FINISH): _S.DONE,
        (_S.RUNNING, _E.CANCEL): _S.CANCELLED,
        (_S.RUNNING, _E.FAIL): _S.FAILED,
        (_S.PAUSED, _E.RESUME): _S.RUNNING,
        (_S.PAUSED, _E.CANCEL): _S.CANCELLED,
    }
)
"""Every legal step."""

UNFINISHED: Final = frozenset({JobState.PLANNED, JobState.RUNNING, JobState.PAUSED})
"""States that a job can leave."""


def may_happen(state: JobState, event: JobEvent) -> bool:
    """Whether `event` means something to a job in `state`."""
    return (state, event) in JOB_TRANSITIONS


def transition(state: JobState, event: JobEvent) -> JobState:
    """The state after `event`.  An illegal pair is an assertion failure: ask `may_happen` first."""
    assert may_happen(state, event), f"a job that is {state} cannot take {event}"
    return JOB_TRANSITIONS[state, event]


@dataclass(frozen=True, slots=True)
class Blocker:
    """Why one volume gets no further."""

    volume: str
    """`v12`."""
    reason: str
    blocks: tuple[str, ...] = ()
    """Hashes of blocks that are the reason, if single blocks are."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a job is.  A unit is one slot to move, or one volume to transcode."""

    done_units: int = 0
    total_units: int = 0
    done_bytes: int = 0
    total_bytes: int = 0
    bytes_per_s: float = 0.0
    """Over the last while; zero if it is not known or nothing moves."""
    detail: str = ""
    blockers: tuple[Blocker, ...] = ()

    @property
    def eta_s(self) -> float | None:
        """Seconds to go at the present rate; None if it is not known, as while volumes get no
        further or wait: nobody knows when those go on."""
        left = self.total_bytes - self.done_bytes
        if self.blockers:
            return None
        if left <= 0:
            return 0.0 if self.done_units >= self.total_units else None
        return left / self.bytes_per_s if self.bytes_per_s > 0 else None


@dataclass(frozen=True, slots=True)
class Job:
    """One row."""

    job_id: JobId
    kind: JobKind
    subject: str
    """What the job is about: a node, `cell`, or `rs-6-3 -> rs-4-2`."""
    arguments: Mapping[str, Any]
    """What was asked for, as `create_job` was given it."""
    state: JobState
    created: float
    changed: float
    """Wall-clock seconds of the last change of state."""
    progress: Progress

    @property
    def name(self) -> str:
        """Its subject in the table of events."""
        return job_name(self.job_id)


def job_name(job_id: JobId) -> str:
    """`job-7`."""
    return f"job-{job_id}"


def create_job(
    connection: Connection,
    now: float,
    kind: JobKind,
    subject: str,
    arguments: Mapping[str, Any],
    total_units: int = 0,
    total_bytes: int = 0,
) -> Job:
    """A planned job.  Raises `WrongState` if an unfinished job is about the same subject."""
    for other in read_jobs(connection, states=UNFINISHED):
        if other.subject == subject:
            raise WrongState(
                f"{other.name} ({other.kind} of {subject}) is {other.state}: wait for it or "
                f"cancel it with haversack jobs cancel {other.job_id}",
                {"job": other.job_id, "state": str(other.state)},
            )
    row = connection.execute(
        insert(jobs).values(
            kind=kind.value,
            subject=subject,
            arguments=orjson.dumps(dict(arguments)).decode(),
            state=JobState.PLANNED.value,
            created=now,
            changed=now,
            done_units=0,
            total_units=total_units,
            done_bytes=0,
            total_bytes=total_bytes,
            bytes_per_s=0.0,
            detail="",
            blockers="[]",
        )
    ).inserted_primary_key
    assert row is not None
    job = read_job(connection, row[0])
    record_event(connection, now, EventKind.JOB_STATE, job.name, f"{kind} of {subject}: planned")
    _forget_old(connection)
    return job


def read_job(connection: Connection, job_id: JobId) -> Job:
    """One job.  Raises `JobNotFound`."""
    row = connection.execute(select(jobs).where(jobs.c.job_id == job_id)).one_or_none()
    if row is None:
        raise JobNotFound(f"there is no job {job_id}: see haversack jobs", {"job": job_id})
    return _job(row)


def read_jobs(
    connection: Connection, states: Collection[JobState] = tuple(JobState), limit: int = 100
) -> list[Job]:
    """The last `limit` jobs in any of these states, newest first."""
    query = (
        select(jobs)
        .where(jobs.c.state.in_([state.value for state in states]))
        .order_by(jobs.c.job_id.desc())
        .limit(limit)
    )
    return [_job(row) for row in connection.execute(query)]


def change_job(
    connection: Connection, job_id: JobId, event: JobEvent, now: float, detail: str | None = None
) -> Job:
    """Take `event`; the job afterwards.  Raises `JobNotFound`, and `WrongState` for an event that
    means nothing in the job's state."""
    job = read_job(connection, job_id)
    if not may_happen(job.state, event):
        raise WrongState(
            f"{job.name} is {job.state}: it cannot {event} now",
            {"job": job_id, "state": str(job.state)},
        )
    state = transition(job.state, event)
    values: dict[str, Any] = {"state": state.value, "changed": now, "bytes_per_s": 0.0}
    if detail is not None:
        values["detail"] = detail
    elif state is not JobState.FAILED:
        values["detail"] = ""
    if state is JobState.DONE:
        values["blockers"] = "[]"
    connection.execute(update(jobs).where(jobs.c.job_id == job_id).values(**values))
    said = f"{job.kind} of {job.subject}: {job.state} -> {state}" + (
        f": {detail}" if detail else ""
    )
    record_event(connection, now, EventKind.JOB_STATE, job.name, said)
    return read_job(connection, job_id)


def report_progress(connection: Connection, job_id: JobId, progress: Progress) -> bool:
    """Note how far a job is, unless it is not running any more; True if it was noted."""
    noted = connection.execute(
        update(jobs)
        .where(jobs.c.job_id == job_id, jobs.c.state == JobState.RUNNING.value)
        .values(
            done_units=progress.done_units,
            total_units=progress.total_units,
            done_bytes=progress.done_bytes,
            total_bytes=progress.total_bytes,
            bytes_per_s=progress.bytes_per_s,
            detail=progress.detail,
            blockers=_pack(progress.blockers),
        )
    )
    return bool(noted.rowcount)


def wanted_schemes(connection: Connection) -> tuple[Scheme, ...]:
    """Schemes that need open volumes: of new large and small blocks, and of transcodes."""
    scheme = map_rows.read_scheme(connection)
    own = () if scheme is None else (scheme, scheme.small_twin())
    found = connection.execute(
        select(jobs.c.arguments).where(
            jobs.c.kind == JobKind.TRANSCODE.value,
            jobs.c.state.in_([state.value for state in UNFINISHED]),
        )
    ).scalars()
    targets = [Scheme.parse(orjson.loads(arguments)["to"]) for arguments in found]
    return tuple(dict.fromkeys((*own, *targets)))


def job_json(job: Job) -> dict[str, Any]:
    """A job as the API gives it."""
    progress = job.progress
    return {
        "id": job.job_id,
        "kind": str(job.kind),
        "subject": job.subject,
        "arguments": dict(job.arguments),
        "state": str(job.state),
        "created": job.created,
        "changed": job.changed,
        "done_units": progress.done_units,
        "total_units": progress.total_units,
        "done_bytes": progress.done_bytes,
        "total_bytes": progress.total_bytes,
        "bytes_per_s": progress.bytes_per_s,
        "eta_s": progress.eta_s if job.state is JobState.RUNNING else None,
        "detail": progress.detail,
        "blockers": [blocker_json(blocker) for blocker in progress.blockers],
    }


def blocker_json(blocker: Blocker) -> dict[str, Any]:
    """A blocker as the API gives it."""
    return {
        "volume": blocker.volume,
        "reason": blocker.reason,
        "blocks": list(blocker.blocks),
    }


def _job(row: Row[Any]) -> Job:
    return Job(
        job_id=row.job_id,
        kind=JobKind(row.kind),
        subject=row.subject,
        arguments=orjson.loads(row.arguments),
        state=JobState(row.state),
        created=row.created,
        changed=row.changed,
        progress=Progress(
            done_units=row.done_units,
            total_units=row.total_units,
            done_bytes=row.done_bytes,
            total_bytes=row.total_bytes,
            bytes_per_s=row.bytes_per_s,
            detail=row.detail,
            blockers=_unpack(row.blockers),
        ),
    )


def _pack(blockers: Sequence[Blocker]) -> str:
    return orjson.dumps([blocker_json(blocker) for blocker in blockers[:BLOCKERS_KEPT]]).decode()


def _unpack(text: str) -> tuple[Blocker, ...]:
    return tuple(
        Blocker(row["volume"], row["reason"], tuple(row["blocks"])) for row in orjson.loads(text)
    )


def _forget_old(connection: Connection) -> None:
    """Keep the table bounded; a job that has not ended is never forgotten."""
    ended = [state.value for state in JobState if state not in UNFINISHED]
    query = (
        select(jobs.c.job_id)
        .where(jobs.c.state.in_(ended))
        .order_by(jobs.c.job_id.desc())
        .offset(JOBS_KEPT)
        .limit(1)
    )
    oldest = connection.execute(query).scalar_one_or_none()
    if oldest is not None:
        connection.execute(delete(jobs).where(jobs.c.job_id <= oldest, jobs.c.state.in_(ended)))
