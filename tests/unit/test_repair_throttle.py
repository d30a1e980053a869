"""Repair keeps its rate, yields where clients are served slowly, and never stops altogether."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from chaos.sim.clock import VirtualClock
from chaos.sim.loop import SimLoop
from cluster.repair.throttle import LiveWatch, Throttle
from protocol.clock import Clock
from protocol.errors import NodeUnavailable
from protocol.ids import NodeId
from protocol.messages import SummaryReply
from storage_node.interface import NodePort

MIB = 1 << 20
NODE = NodeId("node-01")
Main = Callable[[Clock], Awaitable[None]]


def in_virtual_time(main: Main) -> None:
    loop = SimLoop(steps_max=1_000_000)
    try:
        loop.run_until_complete(main(VirtualClock(loop)))
    finally:
        loop.close()


def test_no_more_is_written_than_the_rate_allows_however_many_ask() -> None:
    async def main(clock: Clock) -> None:
        throttle = Throttle(clock, 100 * MIB, MIB)
        throttle.set_free()
        began = clock.monotonic()

        async def writer() -> None:
            for _ in range(25):
                await throttle.take(4 * MIB)

        await asyncio.gather(*(writer() for _ in range(10)))
        assert clock.monotonic() - began == pytest.approx(1000 / 100, rel=0.1)

    in_virtual_time(main)


def test_a_batch_larger_than_the_burst_is_paid_for_before_it_is_let_through() -> None:
    async def main(clock: Clock) -> None:
        throttle = Throttle(clock, 4 * MIB, MIB)
        throttle.set_free()
        began = clock.monotonic()
        await throttle.take(32 * MIB)
        assert clock.monotonic() - began == pytest.approx(31 / 4, rel=0.1)

    in_virtual_time(main)


class Served:
    """A node that counts requests and takes its time to say so."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.served = 0
        self.takes_s = 0.001
        self.is_away = False

    async def summary(self, _deadline_s: float) -> SummaryReply:
        await self.clock.sleep(self.takes_s)
        if self.is_away:
            raise NodeUnavailable("away")
        counters = {"puts": self.served // 2, "gets": self.served - self.served // 2}
        return SummaryReply("serving", "", 1, 0, 0, 0, 0, 1, counters)


async def look_after(
    watch: LiveWatch, served: Served, clock: Clock, others: int, own: int, late_s: float = 0.0
) -> None:
    """One second, in which so many requests of others and of ours were served."""
    watch.count(NODE, own)
    served.served += others + own
    await clock.sleep(1.0)
    await watch.look(late_s)


def make(clock: Clock) -> tuple[Throttle, LiveWatch, Served]:
    throttle, served = Throttle(clock, 64 * MIB, 4 * MIB), Served(clock)
    port: Callable[[NodeId], NodePort] = lambda _: served  # type: ignore[assignment, return-value]  # noqa: E731
    return throttle, LiveWatch(throttle, port, clock, 0.02), served


def test_repairs_own_requests_are_no_reason_to_yield_however_slow_nodes_are() -> None:
    async def main(clock: Clock) -> None:
        throttle, watch, served = make(clock)
        served.takes_s = 0.5
        for _ in range(5):
            await look_after(watch, served, clock, others=0, own=5_000)
        assert throttle.rate == 64 * MIB

    in_virtual_time(main)


def test_slow_answers_beside_clients_halve_the_rate_down_to_the_minimum_and_it_recovers() -> None:
    async def main(clock: Clock) -> None:
        throttle, watch, served = make(clock)
        await look_after(watch, served, clock, others=0, own=100)
        await look_after(watch, served, clock, others=0, own=100)
        assert throttle.rate == 64 * MIB
        await look_after(watch, served, clock, others=100, own=100)
        assert throttle.rate == 4 * MIB, "clients came: from the least upwards"
        for _ in range(20):
            await look_after(watch, served, clock, others=100, own=100)
        assert throttle.rate == 64 * MIB, "they are served well"
        served.takes_s = 0.1
        rates = []
        for _ in range(8):
            await look_after(watch, served, clock, others=100, own=100)
            rates.append(throttle.rate / MIB)
        assert rates == [32, 16, 8, 4, 4, 4, 4, 4]
        served.takes_s = 0.001
        await look_after(watch, served, clock, others=100, own=100)
        assert throttle.rate == 5 * MIB, "clients are served well: a little more"
        await look_after(watch, served, clock, others=0, own=100)
        assert throttle.rate == 64 * MIB, "nobody is there: all of it"

    in_virtual_time(main)


def test_a_node_that_does_not_answer_slows_nothing_down() -> None:
    async def main(clock: Clock) -> None:
        throttle, watch, served = make(clock)
        await look_after(watch, served, clock, others=100, own=0)
        served.is_away = True
        await look_after(watch, served, clock, others=100, own=0)
        assert throttle.rate == 64 * MIB

    in_virtual_time(main)


def test_nothing_is_let_loose_before_it_is_known_whether_clients_are_there() -> None:
    async def main(clock: Clock) -> None:
        throttle, watch, served = make(clock)
        assert throttle.rate == 4 * MIB
        await look_after(watch, served, clock, others=100, own=100)
        assert throttle.rate == 4 * MIB, "a first answer has nothing to compare with"
        await look_after(watch, served, clock, others=100, own=100)
        assert throttle.rate == 4 * MIB

    in_virtual_time(main)


def test_a_process_kept_from_its_core_yields_though_nodes_answer_quickly() -> None:
    async def main(clock: Clock) -> None:
        throttle, watch, served = make(clock)
        for _ in range(30):
            await look_after(watch, served, clock, others=100, own=100)
        assert throttle.rate == 64 * MIB
        await look_after(watch, served, clock, others=100, own=0, late_s=0.1)
        assert throttle.rate == 32 * MIB

    in_virtual_time(main)
