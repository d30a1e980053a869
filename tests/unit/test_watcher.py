"""The watcher: what is drawn is read four times, each time by one gateway; errors count late."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cell_rows import HandClock, block_named, empty_database, new_cell

from api import watcher as subject
from api.watcher import LOOKS_AFTER_S, Watcher, WatchSample
from cluster.events import read_events
from cluster.verify.watch_rows import forget_watched, watching_of
from protocol.errors import (
    BlockNotFound,
    BlockUnreadable,
    CorruptReply,
    HaversackError,
    ServerUnreachable,
)
from protocol.ids import BlockHash
from sql.database import Database

BLOCK = block_named("watched")


class Gateways:
    """Two watchers over one database; `error` is what reads of a block raise."""

    def __init__(self, db: Database, clock: HandClock) -> None:
        self.db = db
        self.clock = clock
        self.error: HaversackError | None = None
        self.reads: list[tuple[int, BlockHash, float]] = []
        self.outcomes: Counter[str] = Counter()
        self.sample = WatchSample(random.Random(1), 1.0)
        self.watchers = [self.watcher(number) for number in range(2)]

    def watcher(self, number: int) -> Watcher:
        async def read(block: BlockHash) -> bytes:
            self.reads.append((number, block, self.clock.now))
            if self.error is not None:
                raise self.error
            return b""

        sample = self.sample if number == 0 else WatchSample(random.Random(2), 0.0)
        return Watcher(self.db, self.clock, sample, read, self.count)

    def count(self, outcome: str) -> None:
        self.outcomes[outcome] += 1

    async def watch(self, *blocks: BlockHash) -> None:
        for block in blocks:
            self.sample.notice(block)
        await self.watchers[0].step()

    async def after(self, seconds: float) -> None:
        self.clock.now += seconds
        for one in self.watchers:
            while await one.step():
                pass

    def state(self) -> dict[str, Any]:
        return self.db.read_now(lambda c: watching_of(c, self.clock.now))

    def alarms(self) -> list[str]:
        events = self.db.read_now(lambda c: read_events(c, BLOCK))
        return [str(event.kind) for event in reversed(events)]


@pytest.fixture
def gateways(tmp_path: Path) -> Iterator[Gateways]:
    clock = HandClock()
    database = empty_database(tmp_path)
    new_cell(database, clock)
    yield Gateways(database, clock)
    database.close()


async def test_a_block_is_read_after_a_minute_an_hour_a_day_and_a_week(gateways: Gateways) -> None:
    await gateways.watch(BLOCK)
    began = gateways.clock.now
    for _ in range(8 * 24 * 60):
        await gateways.after(60)
    assert [at - began for _, _, at in gateways.reads] == list(LOOKS_AFTER_S)
    assert gateways.outcomes == {"good": 4}
    assert gateways.state()["blocks"] == 0
    assert gateways.state()["looks"]["good"] == 4


async def test_two_gateways_share_the_looks_and_make_none_twice(gateways: Gateways) -> None:
    blocks = [block_named(number) for number in range(40)]
    await gateways.watch(*blocks)
    gateways.clock.now += 61
    while sum([await one.step() for one in gateways.watchers]):
        pass
    assert sorted(block for _, block, _ in gateways.reads) == sorted(blocks)
    assert {number for number, _, _ in gateways.reads} == {0, 1}


async def test_the_schedule_outlives_the_gateway_that_took_a_look(gateways: Gateways) -> None:
    await gateways.watch(BLOCK)
    gateways.clock.now += 61
    dying = gateways.watcher(2)

    async def dies(_block: BlockHash) -> bytes:
        raise KeyboardInterrupt

    dying._read = dies
    with pytest.raises(KeyboardInterrupt):
        await dying.step()
    await gateways.after(1)
    assert gateways.reads == [], "it may still be at it"
    await gateways.after(subject.TAKEN_S)
    assert len(gateways.reads) == 1


@pytest.mark.parametrize("error", [ServerUnreachable("away"), BlockUnreadable("too few")])
async def test_an_error_that_passes_does_not_count(
    gateways: Gateways, error: HaversackError
) -> None:
    await gateways.watch(BLOCK)
    gateways.error = error
    await gateways.after(61)
    await gateways.after(61)
    gateways.error = None
    await gateways.after(121)
    assert gateways.outcomes == {"tried again": 2, "good": 1}
    assert gateways.alarms() == []


async def test_an_error_that_stays_raises_an_alarm_until_the_block_reads(
    gateways: Gateways,
) -> None:
    await gateways.watch(BLOCK)
    gateways.error = BlockUnreadable("too few")
    for _ in range(60):
        await gateways.after(60)
    assert gateways.alarms() == ["alarm raised"]
    assert gateways.outcomes["block_unreadable"] == 1
    (failure,) = gateways.state()["looks"]["failures"]
    assert failure["block"] == str(BLOCK)
    gateways.error = None
    await gateways.after(4_000)
    assert gateways.alarms() == ["alarm raised", "alarm cleared"]


@pytest.mark.parametrize("error", [BlockNotFound(BLOCK), CorruptReply("other bytes")])
async def test_a_block_that_is_gone_or_wrong_counts_at_once(
    gateways: Gateways, error: HaversackError
) -> None:
    await gateways.watch(BLOCK)
    gateways.error = error
    await gateways.after(61)
    assert gateways.outcomes == {error.kind: 1}
    assert gateways.alarms() == ["alarm raised"]


async def test_a_block_that_fails_its_last_look_is_asked_for_until_it_reads(
    gateways: Gateways,
) -> None:
    await gateways.watch(BLOCK)
    for seconds in LOOKS_AFTER_S[:3]:
        await gateways.after(seconds)
    gateways.error = CorruptReply("other bytes")
    await gateways.after(8 * 24 * 3600)
    await gateways.after(24 * 3600)
    assert gateways.outcomes["corrupt_reply"] == 2
    gateways.error = None
    await gateways.after(24 * 3600)
    assert gateways.alarms()[-1] == "alarm cleared"
    assert gateways.state()["blocks"] == 0


async def test_a_block_that_is_deleted_on_purpose_is_not_missed(gateways: Gateways) -> None:
    await gateways.watch(BLOCK)
    gateways.db.transact(lambda c: forget_watched(c, [BLOCK]))
    await gateways.after(61)
    assert gateways.reads == []


async def test_the_schedule_and_the_sample_are_bounded(
    gateways: Gateways, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "WATCHED_MAX", 5)
    monkeypatch.setattr(subject, "NOTICED_MAX", 8)
    await gateways.watch(*[block_named(number) for number in range(20)])
    assert gateways.state()["blocks"] == 5


def test_the_share_decides_how_many_are_drawn() -> None:
    sample = WatchSample(random.Random(3), 0.1)
    for number in range(2_000):
        sample.notice(block_named(number))
    assert 150 < len(sample.take()) < 250
    assert sample.take() == []
