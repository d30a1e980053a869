"""Canaries: damaged one fragment at a time, noticed by the verifier, an alarm if they are not; and
nobody else's block is ever touched."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from block_cell import OWNER, BlockCell, data_of, simulate
from verifying import Verifying, counts

from cluster.block_sql import Debt
from cluster.debts import DebtReason, record_debts, repay_debts
from cluster.events import read_events
from cluster.verify.canaries import CANARY_OWNER, TAKEN_S, Canaries, CanarySettings, canaries_of
from erasure.fragment import parse_expected
from erasure.stripe import make_stripe, recover
from protocol.errors import NodeUnavailable
from protocol.ids import BlockHash
from storage_node.interface import FragmentKey

DAY_S = 24 * 3600.0
SETTINGS = CanarySettings(interval_s=DAY_S, alarm_s=9 * DAY_S)
USERS = [data_of(seed, size) for seed in range(4) for size in (900, 200_000)]


class Watched:
    """Canaries over a cell that also holds blocks of users."""

    def __init__(self, cell: BlockCell) -> None:
        self.cell = cell
        self.verifying = Verifying(cell)
        self.canaries = self.gateway()
        self.users: dict[str, bytes] = {}

    def gateway(self) -> Canaries:
        return Canaries(
            self.cell.db,
            self.cell.clock,
            self.cell.rng,
            self.cell.rng.randbytes,
            self.cell.client.put,
            self.cell.pool.port,
            SETTINGS,
        )

    def rows(self) -> dict[str, dict[str, Any]]:
        return {row["name"]: row for row in self.cell.db.read_now(canaries_of)}

    async def step(self, seconds: float = 0.0) -> None:
        await self.cell.clock.sleep(seconds)
        await self.cell.map.refresh()
        await self.canaries.step()

    def fragments(self) -> dict[tuple[str, bytes], bytes]:
        """All that lies on disks, apart from canaries."""
        ours = {BlockHash.parse(row["block"]) for row in self.rows().values()}
        return {
            (node, packed): entry.record
            for node, store in self.cell.stores.items()
            for packed, entry in store._disk.entries.items()
            if BlockHash(packed[8:40]) not in ours
        }

    def alarms(self) -> list[str]:
        found = self.cell.db.read_now(lambda c: read_events(c, "canary-small"))
        return [str(event.kind) for event in reversed(found) if "alarm" in event.kind]


def watched(main: Callable[[Watched], Awaitable[None]]) -> None:
    async def whole(cell: BlockCell) -> None:
        for data in USERS:
            await cell.put(data)
        await main(Watched(cell))

    simulate(whole, nodes=10)


def test_damage_is_found_by_the_verifier_mended_and_followed_by_the_next() -> None:
    async def main(watched: Watched) -> None:
        users = watched.fragments()
        await watched.step()
        assert {row["state"] for row in watched.rows().values()} == {"planted"}
        damages = []
        for _ in range(4):
            await watched.step(DAY_S + 1)
            rows = watched.rows()
            assert {row["state"] for row in rows.values()} == {"spoiled"}
            damages.append(rows["small"]["damage"])
            report = await watched.verifying.whole_pass()
            assert sum(counts(report).values()) == len(rows)
            await watched.step(60)
            assert {row["state"] for row in watched.rows().values()} == {"planted"}
            await _repair(watched.cell)
        assert damages == ["lie", "deleted", "lie", "deleted"]
        assert {row["noticed"] for row in watched.rows().values()} == {4}
        assert watched.alarms() == []
        assert watched.fragments() == users, "nobody else's fragment was touched"

    watched(main)


async def _repair(cell: BlockCell) -> None:
    """Put a good record back, as repair does: every canary is read and written to its slot."""
    for volume_id, slot, block in sorted(cell.all_debts()):
        await cell.map.refresh()
        volume = await cell.map.volume(volume_id)
        fragments = {}
        for other, node in enumerate(volume.slots):
            key = FragmentKey(volume_id, block, other)
            assert node is not None
            (answer,) = cell.stores[node].get_many([key])
            if other != slot and answer.record is not None:
                fragments[other] = parse_expected(answer.record, *key)
        stored = recover(cell.codec, None, block, fragments).stored
        stripe = make_stripe(cell.codec, volume.scheme, block, volume_id, volume.epoch, stored)
        node = volume.slots[slot]
        assert node is not None
        record = b"".join(map(bytes, stripe[slot]))
        cell.stores[node].put_group([(FragmentKey(volume_id, block, slot), record)])
        owed = Debt(volume_id, slot, block)
        cell.db.transact(
            lambda c, owed=owed, volume=volume: repay_debts(  # type: ignore[misc]
                c, [owed], {volume.volume_id: volume.epoch}
            )
        )


def test_damage_that_nobody_notices_raises_an_alarm_until_somebody_does() -> None:
    async def main(watched: Watched) -> None:
        await watched.step()
        await watched.step(DAY_S + 1)
        await watched.step(8 * DAY_S)
        assert watched.alarms() == []
        await watched.step(2 * DAY_S)
        await watched.step(DAY_S)
        assert watched.alarms() == ["alarm raised"], "once"
        assert watched.rows()["small"]["alarmed"]
        await watched.verifying.whole_pass()
        await watched.step(60)
        assert watched.alarms() == ["alarm raised", "alarm cleared"]
        assert not watched.rows()["small"]["alarmed"]

    watched(main)


def test_a_canary_short_of_fragments_is_not_damaged() -> None:
    async def main(watched: Watched) -> None:
        await watched.step()
        block = BlockHash.parse(watched.rows()["small"]["block"])
        row = (await watched.cell.index.lookup([block]))[block]
        owed = Debt(row.volume, 1, block)
        watched.cell.db.transact(lambda c: record_debts(c, [owed], 1.0, DebtReason.MISSING))
        await watched.step(DAY_S + 1)
        assert watched.rows()["small"]["state"] == "planted"
        assert watched.rows()["large"]["state"] == "spoiled"

    watched(main)


def test_a_canary_with_a_silent_node_is_not_damaged() -> None:
    async def main(watched: Watched) -> None:
        await watched.step()
        for node in watched.cell.node_ids:
            watched.cell.faults[node].refuses = NodeUnavailable("away")
        before = {node: dict(s._disk.entries) for node, s in watched.cell.stores.items()}
        await watched.step(DAY_S + 1)
        assert {row["state"] for row in watched.rows().values()} == {"planted"}
        assert {n: dict(s._disk.entries) for n, s in watched.cell.stores.items()} == before

    watched(main)


def test_a_block_that_somebody_else_has_a_claim_to_is_left_alone() -> None:
    async def main(watched: Watched) -> None:
        await watched.step()
        block = BlockHash.parse(watched.rows()["small"]["block"])
        assert await watched.cell.index.claim(OWNER, [block]) == {block}
        await watched.step(DAY_S + 1)
        assert watched.rows()["small"]["block"] != str(block), "another one was planted"
        assert watched.rows()["small"]["state"] == "planted"
        data = await watched.cell.client.get(block)
        assert len(data) == 4096
        assert watched.cell.all_debts() == set()

    watched(main)


def test_two_gateways_do_not_damage_twice_and_one_that_died_is_made_up_for() -> None:
    async def main(watched: Watched) -> None:
        await watched.step()
        watched.canaries, first = watched.gateway(), watched.canaries

        async def dies(*_: object) -> None:
            raise KeyboardInterrupt

        first._damage = dies  # type: ignore[method-assign]
        await watched.cell.clock.sleep(DAY_S + 1)
        with pytest.raises(KeyboardInterrupt):
            await first.step()
        assert watched.rows()["small"]["state"] == "spoiling"
        await watched.step()
        assert watched.rows()["small"]["state"] == "spoiling", "the other may be at it"
        assert watched.rows()["large"]["state"] == "spoiled"
        await watched.step(TAKEN_S + 1)
        assert watched.rows()["small"]["state"] == "spoiled"
        report = await watched.verifying.whole_pass()
        assert sum(counts(report).values()) == 2
        assert CANARY_OWNER < 0, "no account of a person"

    watched(main)
