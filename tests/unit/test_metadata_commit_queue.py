"""Commits that wait together: grouping, bounds, and failures that stay with their owner."""

from __future__ import annotations

import asyncio

import pytest
from metadata_store import file_request

from metadata import commit_queue
from metadata.batch import CommitResult
from metadata.changes import Change, check_commit
from metadata.commit_queue import CommitQueue, Outcome
from metadata.entries import Entry, EntryKind
from protocol.errors import DatabaseBusy, Overloaded, RevConflict
from protocol.limits import COMMIT_ENTRIES_MAX


def change(name: str) -> Change:
    return check_commit(file_request(name, []), frozenset())


def result(name: str) -> CommitResult:
    entry = Entry("id", name, name, EntryKind.FILE, "r", 0, 0.0, False, None, b"", None, 0.0)
    return CommitResult(entry, created=True)


class Runner:
    """Plays the transaction: remembers its groups, and waits until it is let go."""

    def __init__(self) -> None:
        self.groups: list[tuple[int, list[str]]] = []
        self.gate = asyncio.Event()
        self.fail: dict[str, Exception] = {}

    async def run(self, namespace_id: int, changes: list[Change]) -> list[Outcome]:
        names = [change.names[0] for change in changes]
        self.groups.append((namespace_id, names))
        await self.gate.wait()
        for name in names:
            if name in self.fail:
                raise self.fail[name]
        return [result(name) for name in names]


async def submit(queue: CommitQueue, namespace_id: int, names: str) -> list[asyncio.Task[Outcome]]:
    tasks = [asyncio.ensure_future(queue.commit(namespace_id, change(name))) for name in names]
    for _ in range(3):
        await asyncio.sleep(0)
    return tasks


async def test_what_waits_for_one_namespace_goes_together_in_order() -> None:
    runner = Runner()
    queue = CommitQueue(runner.run)
    tasks = await submit(queue, 1, "a")
    tasks += await submit(queue, 1, "bcd")
    tasks += await submit(queue, 2, "e")
    runner.gate.set()
    outcomes = await asyncio.gather(*tasks)
    assert [o.entry.name for o in outcomes if isinstance(o, CommitResult)] == list("abcde")
    assert runner.groups == [(1, ["a"]), (2, ["e"]), (1, ["b", "c", "d"])]
    assert not queue._lines
    assert not queue._tasks


async def test_a_busy_database_is_told_to_all_that_went_together() -> None:
    runner = Runner()
    queue = CommitQueue(runner.run)
    tasks = await submit(queue, 1, "a")
    tasks += await submit(queue, 1, "bc")
    runner.fail["b"] = DatabaseBusy("locked")
    runner.gate.set()
    outcomes = await asyncio.gather(*tasks)
    assert [type(o) for o in outcomes] == [CommitResult, DatabaseBusy, DatabaseBusy]


async def test_a_change_that_breaks_the_transaction_breaks_no_other() -> None:
    runner = Runner()
    queue = CommitQueue(runner.run)
    tasks = await submit(queue, 1, "a")
    tasks += await submit(queue, 1, "bcd")
    runner.fail["c"] = ZeroDivisionError("a mistake of ours")
    runner.gate.set()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    kinds = [type(o) for o in outcomes]
    assert kinds == [CommitResult, CommitResult, ZeroDivisionError, CommitResult]


async def test_a_cancelled_caller_leaves_its_neighbours_alone() -> None:
    runner = Runner()
    queue = CommitQueue(runner.run)
    tasks = await submit(queue, 1, "a")
    tasks += await submit(queue, 1, "bc")
    tasks[0].cancel()
    tasks[1].cancel()
    await asyncio.sleep(0)
    runner.gate.set()
    assert isinstance(await tasks[2], CommitResult)
    assert runner.groups[1] == (1, ["b", "c"])
    assert tasks[0].cancelled()
    assert tasks[1].cancelled()


async def test_refusals_are_outcomes_of_their_own() -> None:
    async def run(_namespace: int, changes: list[Change]) -> list[Outcome]:
        return [RevConflict(change.names[0]) for change in changes]

    queue = CommitQueue(run)
    outcomes = await asyncio.gather(*await submit(queue, 1, "ab"))
    assert [str(outcome) for outcome in outcomes] == ["a", "b"]


async def test_the_line_is_bounded_and_groups_are_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit_queue, "WAITING_COMMITS_MAX", 2 * COMMIT_ENTRIES_MAX)
    runner = Runner()
    queue = CommitQueue(runner.run)
    tasks = await submit(queue, 1, "a")
    tasks += await submit(queue, 1, "b" * (2 * COMMIT_ENTRIES_MAX))
    with pytest.raises(Overloaded):
        await queue.commit(1, change("c"))
    runner.gate.set()
    await asyncio.gather(*tasks)
    sizes = [len(names) for _, names in runner.groups]
    assert sizes == [1, COMMIT_ENTRIES_MAX, COMMIT_ENTRIES_MAX]
