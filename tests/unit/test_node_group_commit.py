"""The write queue of a node: what is grouped, in which order, and what it refuses."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from node_parts import until

from protocol.errors import DirectoryCorrupt, NodeRefuses, Overloaded
from storage_node.group_commit import GROUP_BYTES_MAX, GroupCommit


class SlowDisk:
    """A `run` that finishes when told to."""

    def __init__(self) -> None:
        self.started: asyncio.Queue[list[Any]] = asyncio.Queue()
        self._go = asyncio.Semaphore(0)

    async def run(self, work: Callable[[list[Any]], Any], payloads: list[Any]) -> Any:
        await self.started.put(payloads)
        await self._go.acquire()
        return work(payloads)

    def finish(self) -> None:
        self._go.release()


def echo(payloads: list[Any]) -> list[Any]:
    return list(payloads)


def other(payloads: list[Any]) -> str:
    return f"other {payloads}"


async def queued(commits: GroupCommit, count: int) -> None:
    """Until `count` bytes are in the queue, one byte a job."""
    await until(lambda: commits.queued_bytes >= count)


async def test_what_waits_while_the_disk_is_busy_is_written_together() -> None:
    disk = SlowDisk()
    commits = GroupCommit(disk.run)
    jobs = [asyncio.create_task(commits.submit(echo, 0, 1))]
    assert await disk.started.get() == [0]
    jobs += [asyncio.create_task(commits.submit(echo, number, 1)) for number in (1, 2, 3)]
    await queued(commits, 4)
    disk.finish()
    assert await disk.started.get() == [1, 2, 3]
    assert not any(job.done() for job in jobs[1:])
    disk.finish()
    assert await asyncio.gather(*jobs) == [[0], [1, 2, 3], [1, 2, 3], [1, 2, 3]]
    assert (commits.groups, commits.jobs_grouped, commits.queued_bytes) == (2, 4, 0)


async def test_different_work_keeps_its_order_and_is_never_mixed() -> None:
    disk = SlowDisk()
    commits = GroupCommit(disk.run)
    jobs = [asyncio.create_task(commits.submit(echo, 0, 1))]
    await disk.started.get()
    for work, payload in ((echo, 1), (other, 2), (other, 3), (echo, 4)):
        jobs.append(asyncio.create_task(commits.submit(work, payload, 1)))
    await queued(commits, 5)
    seen = []
    for _ in range(3):
        disk.finish()
        seen.append(await disk.started.get())
    disk.finish()
    assert seen == [[1], [2, 3], [4]]
    assert (await asyncio.gather(*jobs))[2] == "other [2, 3]"


async def test_a_group_is_bounded_in_bytes() -> None:
    disk = SlowDisk()
    commits = GroupCommit(disk.run)
    half = GROUP_BYTES_MAX // 2
    jobs = [asyncio.create_task(commits.submit(echo, 0, 1))]
    await disk.started.get()
    jobs += [asyncio.create_task(commits.submit(echo, number, half)) for number in (1, 2, 3)]
    await queued(commits, 1 + 3 * half)
    disk.finish()
    assert await disk.started.get() == [1, 2]
    disk.finish()
    assert await disk.started.get() == [3]
    disk.finish()
    await asyncio.gather(*jobs)


async def test_a_full_queue_refuses_at_once_and_recovers() -> None:
    disk = SlowDisk()
    commits = GroupCommit(disk.run, queue_bytes_max=10)
    first = asyncio.create_task(commits.submit(echo, 1, 8))
    await disk.started.get()
    with pytest.raises(Overloaded):
        await commits.submit(echo, 2, 3)
    disk.finish()
    await first
    again = asyncio.create_task(commits.submit(echo, 3, 50))  # alone, even a large one may pass
    assert await disk.started.get() == [3]
    disk.finish()
    await again


async def test_a_failed_group_fails_each_of_its_jobs_and_no_other() -> None:
    disk = SlowDisk()
    commits = GroupCommit(disk.run)

    def fail(payloads: list[Any]) -> None:
        raise DirectoryCorrupt(f"cannot write {payloads}")

    first = asyncio.create_task(commits.submit(echo, 0, 1))
    await disk.started.get()
    bad = [asyncio.create_task(commits.submit(fail, number, 1)) for number in (1, 2)]
    good = asyncio.create_task(commits.submit(echo, 3, 1))
    await queued(commits, 4)
    for _ in range(3):
        disk.finish()
    for job in bad:
        with pytest.raises(DirectoryCorrupt):
            await job
    assert await first == [0]
    assert await good == [3]


async def test_a_caller_that_goes_away_does_not_undo_its_write() -> None:
    disk = SlowDisk()
    commits = GroupCommit(disk.run)
    written: list[Any] = []
    job = asyncio.create_task(commits.submit(written.extend, 7, 1))
    await disk.started.get()
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job
    disk.finish()
    await commits.close()
    assert written == [7]


async def test_closing_finishes_what_is_queued_and_takes_no_more() -> None:
    disk = SlowDisk()
    commits = GroupCommit(disk.run)
    jobs = [asyncio.create_task(commits.submit(echo, number, 1)) for number in range(3)]
    await queued(commits, 3)
    closing = asyncio.create_task(commits.close())
    await asyncio.sleep(0)
    with pytest.raises(NodeRefuses):
        await commits.submit(echo, 9, 1)
    disk.finish()
    disk.finish()
    await closing
    assert all(job.done() for job in jobs)


async def test_a_group_waits_for_what_is_being_received_and_not_for_long() -> None:
    disk = SlowDisk()
    commits = GroupCommit(disk.run, linger_s=60.0)
    commits.expect(1)
    first = asyncio.create_task(commits.submit(echo, 1, 1))
    await queued(commits, 1)
    for _ in range(10):
        await asyncio.sleep(0)
    assert disk.started.empty()
    second = asyncio.create_task(commits.submit(echo, 2, 1))
    commits.expect(-1)
    async with asyncio.timeout(5):
        assert await disk.started.get() == [1, 2]
    disk.finish()
    await asyncio.gather(first, second)

    late = GroupCommit(disk.run, linger_s=0.01)
    late.expect(1)  # and never comes
    alone = asyncio.create_task(late.submit(echo, 3, 1))
    async with asyncio.timeout(5):
        assert await disk.started.get() == [3]
    disk.finish()
    await alone
