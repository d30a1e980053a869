"""Calls that wait together run together, and fail together."""

from __future__ import annotations

import asyncio

import pytest

from cluster.coalescer import Coalescer


class Recorder:
    """Doubles numbers, one batch at a time, when `gate` is open."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.started = asyncio.Event()
        self.error: Exception | None = None
        self.running = 0

    async def run(self, items: list[int]) -> list[int]:
        self.running += 1
        assert self.running == 1, "never two batches at a time"
        self.batches.append(items)
        self.started.set()
        await self.gate.wait()
        self.running -= 1
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return [2 * item for item in items]


async def test_what_waits_while_a_batch_runs_becomes_the_next_one() -> None:
    recorder = Recorder()
    coalescer = Coalescer(recorder.run, batch_items_max=100, waiting_items_max=100)
    recorder.gate.clear()
    first = asyncio.create_task(coalescer.submit([1]))
    await recorder.started.wait()
    others = [asyncio.create_task(coalescer.submit([n, n + 1])) for n in (10, 20, 30)]
    await asyncio.sleep(0)
    recorder.gate.set()
    assert await first == [2]
    assert await asyncio.gather(*others) == [[20, 22], [40, 42], [60, 62]]
    assert recorder.batches == [[1], [10, 11, 20, 21, 30, 31]]


async def test_a_batch_holds_no_more_items_than_its_limit_but_never_splits_a_call() -> None:
    recorder = Recorder()
    coalescer = Coalescer(recorder.run, batch_items_max=4, waiting_items_max=100)
    calls = (coalescer.submit([n] * size) for n, size in ((1, 3), (2, 2), (3, 2), (4, 9)))
    answers = await asyncio.gather(*calls)
    assert [len(answer) for answer in answers] == [3, 2, 2, 9]
    assert [len(batch) for batch in recorder.batches] == [3, 4, 9]


async def test_an_error_goes_to_every_call_of_its_batch_and_to_no_other() -> None:
    recorder = Recorder()
    coalescer = Coalescer(recorder.run, batch_items_max=2, waiting_items_max=100)
    recorder.error = ValueError("of the first batch")
    calls = (coalescer.submit([n]) for n in range(4))
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(answer) for answer in answers] == [ValueError, ValueError, list, list]


async def test_a_batch_whose_callers_all_left_still_runs_and_its_error_is_nobodys() -> None:
    recorder = Recorder()
    coalescer = Coalescer(recorder.run, batch_items_max=2, waiting_items_max=100)
    recorder.gate.clear()
    recorder.error = ValueError("nobody asks")
    call = asyncio.create_task(coalescer.submit([1]))
    await recorder.started.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    recorder.gate.set()
    assert await coalescer.submit([5]) == [10]
