"""Jobs: the closed state machine, and the table behind it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from cell_rows import START, HandClock, empty_database, new_cell
from sqlalchemy import Connection

from cluster.change import jobs
from cluster.change.jobs import (
    JOB_TRANSITIONS,
    UNFINISHED,
    Blocker,
    Job,
    JobEvent,
    JobKind,
    JobState,
    Progress,
    change_job,
    create_job,
    job_json,
    may_happen,
    read_job,
    read_jobs,
    report_progress,
    transition,
)
from cluster.events import read_events
from protocol.errors import JobNotFound, WrongState
from sql.database import Database


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    database = empty_database(tmp_path)
    new_cell(database, HandClock())
    yield database
    database.close()


def drain(db: Database, node: str = "node-03") -> Job:
    return db.transact(lambda c: create_job(c, START, JobKind.DRAIN, node, {"node": node}, 4, 400))


def take(db: Database, job: Job, event: JobEvent, detail: str | None = None) -> Job:
    return db.transact(lambda c: change_job(c, job.job_id, event, START + 1, detail))


@pytest.mark.parametrize(("state", "event"), list(product(JobState, JobEvent)))
def test_every_pair_is_a_drawn_step_or_refused(state: JobState, event: JobEvent) -> None:
    if (state, event) in JOB_TRANSITIONS:
        assert may_happen(state, event)
        assert transition(state, event) is JOB_TRANSITIONS[state, event]
    else:
        assert not may_happen(state, event)
        with pytest.raises(AssertionError):
            transition(state, event)


def test_ended_jobs_take_nothing_and_all_others_can_be_cancelled() -> None:
    leaving = {state for state, _ in JOB_TRANSITIONS}
    assert leaving == UNFINISHED
    for state in UNFINISHED:
        assert JOB_TRANSITIONS[state, JobEvent.CANCEL] is JobState.CANCELLED


@pytest.mark.parametrize(("state", "event"), list(product(JobState, JobEvent)))
def test_the_table_refuses_what_the_machine_refuses(
    db: Database, state: JobState, event: JobEvent
) -> None:
    way: dict[JobState, list[JobEvent]] = {
        JobState.PLANNED: [],
        JobState.RUNNING: [JobEvent.START],
        JobState.PAUSED: [JobEvent.PAUSE],
        JobState.DONE: [JobEvent.START, JobEvent.FINISH],
        JobState.CANCELLED: [JobEvent.CANCEL],
        JobState.FAILED: [JobEvent.START, JobEvent.FAIL],
    }
    job = drain(db)
    for step in way[state]:
        job = take(db, job, step)
    assert job.state is state
    if may_happen(state, event):
        assert take(db, job, event).state is JOB_TRANSITIONS[state, event]
    else:
        with pytest.raises(WrongState):
            take(db, job, event)
        assert db.read_now(lambda c: read_job(c, job.job_id)).state is state


def test_a_job_keeps_what_was_asked_for_and_events_tell_its_life(db: Database) -> None:
    job = drain(db)
    assert (job.kind, job.subject, job.arguments) == (JobKind.DRAIN, "node-03", {"node": "node-03"})
    assert (job.progress.total_units, job.progress.total_bytes) == (4, 400)
    take(db, job, JobEvent.START)
    take(db, job, JobEvent.FAIL, "the node is gone")
    said = [event.detail for event in db.read_now(lambda c: read_events(c, job.name))]
    assert said == [
        "drain of node-03: running -> failed: the node is gone",
        "drain of node-03: planned -> running",
        "drain of node-03: planned",
    ]
    assert db.read_now(lambda c: read_job(c, job.job_id)).progress.detail == "the node is gone"


def test_progress_is_noted_only_while_the_job_runs(db: Database) -> None:
    job = drain(db)
    blocker = Blocker("v7", "no node for slot 3", ("ab" * 32,))
    progress = Progress(2, 4, 200, 400, 50.0, "waits", (blocker,))
    assert not db.transact(lambda c: report_progress(c, job.job_id, progress))
    take(db, job, JobEvent.START)
    assert db.transact(lambda c: report_progress(c, job.job_id, progress))
    running = db.read_now(lambda c: read_job(c, job.job_id))
    assert running.progress == progress
    assert job_json(running)["eta_s"] is None, "nobody knows when it goes on"
    free = replace(progress, blockers=())
    assert db.transact(lambda c: report_progress(c, job.job_id, free))
    going = db.read_now(lambda c: read_job(c, job.job_id))
    assert job_json(going)["eta_s"] == pytest.approx(4.0)
    assert replace(free, done_bytes=400).eta_s is None, "units are left that have no size yet"
    assert replace(free, done_bytes=400, done_units=4).eta_s == 0.0
    take(db, job, JobEvent.PAUSE)
    assert not db.transact(lambda c: report_progress(c, job.job_id, Progress(3, 4, 300, 400)))
    paused = db.read_now(lambda c: read_job(c, job.job_id))
    assert paused.progress.done_units == 2
    assert paused.progress.bytes_per_s == 0
    assert job_json(paused)["eta_s"] is None
    take(db, job, JobEvent.RESUME)
    done = take(db, job, JobEvent.FINISH)
    assert done.progress.blockers == ()


def test_one_unfinished_job_per_subject(db: Database) -> None:
    first = drain(db)
    with pytest.raises(WrongState, match=f"jobs cancel {first.job_id}"):
        drain(db)
    other = drain(db, "node-04")
    take(db, first, JobEvent.CANCEL)
    again = drain(db)
    found = db.read_now(lambda c: read_jobs(c, UNFINISHED))
    assert [job.job_id for job in found] == [again.job_id, other.job_id]


def test_an_unknown_job_is_not_found(db: Database) -> None:
    with pytest.raises(JobNotFound):
        db.read_now(lambda c: read_job(c, 99))


def test_old_ended_jobs_are_forgotten_and_unfinished_ones_never(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "JOBS_KEPT", 3)
    waiting = drain(db, "node-01")

    def work(connection: Connection) -> None:
        for _ in range(8):
            job = create_job(connection, START, JobKind.REBALANCE, "cell", {})
            change_job(connection, job.job_id, JobEvent.CANCEL, START)

    db.transact(work)
    kept = db.read_now(read_jobs)
    assert len(kept) == 1 + 3 + 1  # the last one had not ended yet when the others were forgotten
    assert kept[-1].job_id == waiting.job_id
    assert db.read_now(lambda c: read_jobs(c, limit=1))[0].job_id == kept[0].job_id
