"""Turns: bounded, first come first served, nothing lost when callers give up."""

from __future__ import annotations

import asyncio
import random

import pytest

from api.turns import Turns
from protocol.errors import Overloaded


async def test_turns_are_given_up_to_the_maximum_and_then_in_order() -> None:
    turns = Turns(2, 10, 5)
    assert turns.take_now()
    assert turns.take_now()
    assert not turns.take_now()
    order: list[int] = []

    async def work(number: int) -> None:
        await turns.take()
        order.append(number)

    waiting = [asyncio.create_task(work(number)) for number in range(4)]
    await asyncio.sleep(0)
    assert (turns.active, turns.queued) == (2, 4)
    for _ in range(4):
        turns.give_back()
        await asyncio.sleep(0)
    await asyncio.gather(*waiting)
    assert order == [0, 1, 2, 3]
    assert turns.active == 2


async def test_full_queue_refuses_at_once() -> None:
    turns = Turns(1, 0, 5)
    await turns.take()
    with pytest.raises(Overloaded, match="too many requests"):
        await turns.take()


async def test_wait_ends_in_time_and_leaves_the_queue() -> None:
    turns = Turns(1, 5, 0.01)
    await turns.take()
    with pytest.raises(Overloaded, match="no turn within"):
        await turns.take()
    assert turns.queued == 0
    turns.give_back()
    assert turns.take_now()


async def test_newcomer_does_not_pass_those_who_wait() -> None:
    turns = Turns(1, 5, 5)
    await turns.take()
    waiting = asyncio.create_task(turns.take())
    await asyncio.sleep(0)
    turns.give_back()
    assert not turns.take_now()
    await waiting


async def test_turn_of_a_caller_that_is_cancelled_goes_to_the_next() -> None:
    turns = Turns(1, 5, 5)
    await turns.take()
    first, second = asyncio.create_task(turns.take()), asyncio.create_task(turns.take())
    await asyncio.sleep(0)
    turns.give_back()  # the turn is first's from here on
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    await second
    turns.give_back()
    assert (turns.active, turns.queued) == (0, 0)


async def test_no_turn_is_ever_lost_or_made_in_a_storm_of_cancellations() -> None:
    rng = random.Random(7)
    turns = Turns(3, 1000, 0.02)
    running = 0

    async def work() -> None:
        nonlocal running
        await turns.take()
        try:
            running += 1
            assert running <= 3
            for _ in range(rng.randrange(4)):
                await asyncio.sleep(0)
        finally:
            running -= 1
            turns.give_back()

    tasks = [asyncio.create_task(work()) for _ in range(400)]
    while any(not task.done() for task in tasks):
        rng.choice(tasks).cancel()
        await asyncio.sleep(0)
    assert (turns.active, turns.queued) == (0, 0)
