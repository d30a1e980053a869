"""When the client tries again."""

from __future__ import annotations

import random

import pytest

from client.retry import Backoff, RetryPolicy
from protocol.clock import SystemClock
from protocol.errors import NodeUnavailable, Overloaded


class FakeClock(SystemClock):
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_delays_double_up_to_their_bound_and_are_jittered_by_half() -> None:
    policy = RetryPolicy(first_delay_s=0.1, delay_max_s=5.0)
    rng = random.Random(1)
    for attempt, full in [(1, 0.1), (2, 0.2), (3, 0.4), (6, 3.2), (7, 5.0), (1000, 5.0)]:
        delays = [policy.delay_s(attempt, rng) for _ in range(200)]
        assert full / 2 <= min(delays) <= max(delays) <= full
        assert max(delays) - min(delays) > full / 4, "jittered"


async def pause_forever(backoff: Backoff) -> None:
    while True:
        await backoff.pause(NodeUnavailable("gone"))


async def test_attempts_are_bounded() -> None:
    error = NodeUnavailable("gone")
    backoff = Backoff(RetryPolicy(attempts_max=3), FakeClock(), random.Random(1))
    await backoff.pause(error)
    await backoff.pause(error)
    with pytest.raises(NodeUnavailable):
        await backoff.pause(error)


async def test_no_attempt_starts_after_the_total_time() -> None:
    clock = FakeClock()
    backoff = Backoff(RetryPolicy(attempts_max=10**6, total_s=60), clock, random.Random(1))
    with pytest.raises(NodeUnavailable):
        await pause_forever(backoff)
    assert 50 < clock.now <= 60


async def test_the_default_policy_outlives_the_restart_of_a_cell() -> None:
    for seed in range(100):
        clock = FakeClock()
        backoff = Backoff(RetryPolicy(), clock, random.Random(seed))
        with pytest.raises(NodeUnavailable):
            await pause_forever(backoff)
        assert clock.now > 30


async def test_the_server_may_ask_for_a_longer_wait_but_not_a_shorter_one() -> None:
    clock = FakeClock()
    backoff = Backoff(RetryPolicy(first_delay_s=2, total_s=60), clock, random.Random(1))
    await backoff.pause(Overloaded("full", {"retry_after_s": 20.0}))
    assert clock.now == 20
    await backoff.pause(Overloaded("full", {"retry_after_s": 0.001}))
    assert clock.now > 21
    with pytest.raises(Overloaded):
        await backoff.pause(Overloaded("full", {"retry_after_s": 50}))
