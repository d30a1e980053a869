"""Takes up jobs and carries them out, in the process that holds the repair role.

Started by `cluster.repair.host` beside `RepairService`, directly by tests and the simulation;
imports no Ray.  Looks at the table about every half second: a planned job starts, a paused or
cancelled one is stopped where it is, one that runs and has no task here (this process started
again) goes on.  There is one task per running job; they share repair's executor and its budget.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, Protocol, TypeVar

import structlog
from sqlalchemy import Connection

from cluster.block_client_settings import Run
from cluster.change.jobs import (
    UNFINISHED,
    Job,
    JobEvent,
    JobId,
    JobKind,
    JobState,
    change_job,
    read_job,
    read_jobs,
)
from cluster.change.moving import JobTools, Mover, MovingJob
from cluster.move_rows import read_moves
from cluster.repair.executor import Lead
from protocol.clock import Clock
from protocol.errors import HaversackError, JobNotFound, NotLeader, RetryLater, UnknownOutcome
from sql.database import Database

T = TypeVar("T")

LOOK_S: Final = 0.5
"""Between two looks at the jobs: how soon a pause takes effect."""

RETRY_S: Final = 2.0

log = structlog.get_logger()


class Work(Protocol):
    """One job while it runs."""

    async def work(self) -> bool:
        """Until the job has ended; True if nodes left the cell."""
        ...

    async def show(self) -> None:
        """Note how far it is."""
        ...


NewWork = Callable[[JobTools, Job], Work]


async def nobody_to_tell() -> None:
    """For runners without a controller."""


class JobRunner:
    """One per process that holds the repair role.  One event loop."""

    def __init__(
        self,
        db: Database,
        clock: Clock,
        lead: Lead,
        mover: Mover,
        run: Run,
        transcode: NewWork | None = None,
        members_changed: Callable[[], Awaitable[None]] = nobody_to_tell,
        look_s: float = LOOK_S,
    ) -> None:
        """`lead` is a transaction of the role's holder; `transcode` makes the work of transcode
        jobs; `members_changed` is awaited after a node left the cell, and once at the start;
        `look_s` is between two looks."""
        self._tools = JobTools(db, clock, lead, mover, run)
        self._transcode = transcode
        self._members_changed = members_changed
        self._look_s = look_s
        self._tasks: dict[JobId, tuple[asyncio.Task[None], Work]] = {}
        self._stopped = asyncio.Event()

    async def run(self) -> None:
        """Until `stop`.  Raises `NotLeader` when another process has taken the role."""
        try:
            await self._members_changed()
            while not self._stopped.is_set():
                try:
                    await self.look()
                except (RetryLater, UnknownOutcome) as error:
                    if isinstance(error, NotLeader):
                        raise
                    log.warning("jobs could not be looked at", error=error.message)
                await self._tools.clock.sleep(self._look_s)
        finally:
            await self.halt()

    def stop(self) -> None:
        """End `run` within a look.  Idempotent."""
        self._stopped.set()

    async def halt(self) -> None:
        """Stop all work where it is; jobs stay as they are and go on at the next start."""
        tasks = [task for task, _ in self._tasks.values()]
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def look(self) -> None:
        """Start what should run, stop what should not.  Raises `NotLeader`, `DatabaseBusy`."""
        found = await self._tools.db.read(lambda connection: read_jobs(connection, UNFINISHED))
        running = {job.job_id: job for job in found if job.state is not JobState.PAUSED}
        for job_id in list(self._tasks):
            task, work = self._tasks[job_id]
            if task.done():
                del self._tasks[job_id]
                self._raise_of(task)
            elif job_id not in running:
                await self._end_if_steered(job_id, task)
            else:
                await work.show()
        for job_id, job in sorted(running.items()):
            if job_id not in self._tasks:
                await self._start(job)
        await self._forget_moves({job.job_id for job in found})

    def _raise_of(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error

    async def _end_if_steered(self, job_id: JobId, task: asyncio.Task[None]) -> None:
        """Stop the work of a job that was paused or cancelled; one that ended is ending itself."""
        job = await self._tools.db.read(lambda connection: read_job(connection, job_id))
        if job.state not in (JobState.PAUSED, JobState.CANCELLED):
            return
        del self._tasks[job_id]
        task.cancel()
        await asyncio.wait([task])
        log.info("job stopped", job=job_id)

    async def _start(self, job: Job) -> None:
        if job.state is JobState.PLANNED:
            job = await self._change(job.job_id, JobEvent.START)
            if job.state is not JobState.RUNNING:
                return  # cancelled or paused meanwhile
        work = self._work_of(job)
        if work is None:
            await self._change(job.job_id, JobEvent.FAIL, "this process cannot transcode")
            return
        log.info("job goes on", job=job.job_id, kind=str(job.kind), subject=job.subject)
        task = asyncio.get_running_loop().create_task(self._carry_out(job, work), name=job.name)
        self._tasks[job.job_id] = task, work

    def _work_of(self, job: Job) -> Work | None:
        if job.kind is JobKind.TRANSCODE:
            return None if self._transcode is None else self._transcode(self._tools, job)
        return MovingJob(self._tools, job)

    async def _carry_out(self, job: Job, work: Work) -> None:
        """Work until the job has ended.  Errors that pass are waited for; others fail the job."""
        while True:
            try:
                if await work.work():
                    await self._members_changed()
            except NotLeader:
                raise
            except (RetryLater, UnknownOutcome) as error:
                log.warning("job waits", job=job.job_id, error=error.message)
                await self._tools.clock.sleep(RETRY_S)
                continue
            except HaversackError as error:
                log.error("job failed", job=job.job_id, error=error.message)
                await self._change(job.job_id, JobEvent.FAIL, error.message)
            log.info("job ended", job=job.job_id)
            return

    async def _change(self, job_id: JobId, event: JobEvent, detail: str | None = None) -> Job:
        """Take an event if it still means something."""
        now = self._tools.clock.wall()

        def work(connection: Connection) -> Job:
            try:
                return change_job(connection, job_id, event, now, detail)
            except JobNotFound:
                raise
            except HaversackError:
                return read_job(connection, job_id)

        return await self._tools.lead(work)

    async def _forget_moves(self, unfinished: set[JobId]) -> None:
        """Moves of jobs that have ended are nobody's."""
        rows = await self._tools.db.read(read_moves)
        orphans = [
            (row.volume, row.slot)
            for row in rows
            if row.job_id is not None and row.job_id not in unfinished
        ]
        if orphans:
            await self._tools.mover.abandon(orphans)
