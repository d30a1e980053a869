"""Canaries: blocks of our own of which a fragment is damaged on purpose, to see that it is noticed.

A task of each gateway (`api.gateway`).  Whoever notices (verifier, a read) leaves a debt, repair
mends, and the next fragment is damaged.  If nobody does in time, an alarm is raised: the watchmen
sleep.

    absent --put--> planted --due--> spoiling --read back as bad--> spoiled
                      ^                 |                             |  | alarm_s
                      |                 +-- unfit: due later --+      |  v
                      +----------------------------------------+      | spoiled, alarm raised
                      +------ owed, or good again: noticed -----------+--+

Nothing new can be done to anybody's fragments through this: damage is a `delete`, or a `put` of
another well-formed record, which every holder of the cluster secret may send anyway.  A canary is
spoiled only while its row belongs to the canaries' own account and nobody else has a claim to it,
its bytes are random and known to nobody, and all of its other fragments were just verified.
"""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import structlog
from sqlalchemy import Connection, func, select

from cluster import map_rows
from cluster.events import EventKind, record_event
from cluster.schema import blocks, claims, passes
from cluster.topology import VolumeView
from cluster.verify.index_scan import Truth, read_truth
from cluster.verify.pass_rows import PassRow, read_pass, write_pass
from erasure.fragment import FRAGMENT_HEADER_BYTES, pack_header, parse_expected
from protocol.clock import Clock
from protocol.errors import HaversackError, RetryLater, UnknownOutcome
from protocol.hashing import Buffer, hash_block
from protocol.ids import BlockHash, NodeId, VolumeId
from protocol.limits import KIB
from protocol.messages import ItemStatus
from sql.database import Database
from storage_node.interface import FragmentKey, NodePort, VerifiedRecord

CANARY: Final = "canary"
"""Kind of their rows in `passes`."""

CANARY_OWNER: Final = -2
"""Account of their blocks; it has no row and no token."""

SIZES: Final = {"small": 4 * KIB, "large": 256 * KIB}
"""One canary of each redundancy scheme."""

STEP_S: Final = 30.0
TAKEN_S: Final = 300.0
"""A gateway that took a canary and died keeps it from the others for so long."""

LATER_S: Final = 3600.0
"""A canary that is not fit to be damaged is looked at again after this."""

CALL_S: Final = 10.0

log = structlog.get_logger()

Put = Callable[[int, BlockHash, Sequence[Buffer], int], Awaitable[object]]
"""`BlockClient.put`."""


class CanaryState(enum.StrEnum):
    """See the module's docstring."""

    PLANTED = "planted"
    SPOILING = "spoiling"
    SPOILED = "spoiled"


class Damage(enum.StrEnum):
    """What is done to a fragment; the next one gets the other."""

    DELETED = "deleted"
    LIE = "lie"
    """A whole record of another length: its checksums are right."""


@dataclass(frozen=True, slots=True)
class CanarySettings:
    """Durations in seconds; see `protocol.config`."""

    interval_s: float = 24 * 3600.0
    alarm_s: float = 9 * 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Canary:
    """One row."""

    name: str
    block: BlockHash
    state: CanaryState
    due: float
    taken_until: float
    slot: int
    damage: Damage
    spoiled: float
    alarmed: bool
    noticed: int
    """How often its damage was noticed."""
    latest_s: float
    """How long the last noticing took."""

    def to_body(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "block": str(self.block)}

    @classmethod
    def of_row(cls, row: PassRow) -> Canary:
        body = {**row.body, "block": BlockHash.parse(row.body["block"])}
        body["state"], body["damage"] = CanaryState(body["state"]), Damage(body["damage"])
        return cls(**body)


class _Sight(NamedTuple):
    """What SQL says of a canary's block."""

    truth: Truth
    is_ours: bool


class Canaries:
    """One per gateway.  One event loop."""

    def __init__(
        self,
        db: Database,
        clock: Clock,
        rng: random.Random,
        entropy: Callable[[int], bytes],
        put: Put,
        port: Callable[[NodeId], NodePort],
        settings: CanarySettings | None = None,
    ) -> None:
        """`port` connects to a node; `entropy(n)` gives n unpredictable bytes."""
        self._db = db
        self._clock = clock
        self._rng = rng
        self._entropy = entropy
        self._put = put
        self._port = port
        self._settings = settings or CanarySettings()

    async def run(self) -> None:
        """Keep canaries until cancelled."""
        while True:
            try:
                await self.step()
            except (RetryLater, UnknownOutcome) as error:
                log.info("the canaries' step failed", error=error.message)
            await self._clock.sleep(STEP_S)

    async def step(self) -> None:
        """Look after each canary that no other gateway is looking after.

        Raises what the cell raises; the next step goes on from the rows.
        """
        for name in SIZES:
            canary = await self._take(name)
            if canary is None:
                continue
            match canary.state:
                case CanaryState.PLANTED:
                    await self._begin(canary)
                case CanaryState.SPOILING:
                    await self._spoil(canary)
                case CanaryState.SPOILED:
                    await self._look(canary)

    # -- steps of the life ---------------------------------------------------------------------

    async def _take(self, name: str) -> Canary | None:
        """This gateway's for a while; None if it is another's, or nothing is due."""
        now = self._clock.wall()

        def held(connection: Connection) -> Canary | None:
            row = read_pass(connection, CANARY, name)
            return None if row is None else Canary.of_row(row)

        def is_free(canary: Canary) -> bool:
            return canary.taken_until <= now and canary.due <= now

        def take(connection: Connection) -> Canary | None:
            canary = held(connection)
            if canary is None or not is_free(canary):
                return None
            taken = dataclasses.replace(canary, taken_until=now + TAKEN_S)
            _write(connection, taken, now)
            return taken

        found = await self._db.read(held)
        if found is None:
            await self._plant(name, None)
            return None
        return await self._db.write(take) if is_free(found) else None

    async def _plant(self, name: str, before: Canary | None) -> None:
        """Put a new block of bytes that nobody can know."""
        data = self._entropy(SIZES[name])
        block = hash_block(data)
        await self._put(CANARY_OWNER, block, (data,), len(data))
        now = self._clock.wall()
        planted = Canary(
            name,
            block,
            CanaryState.PLANTED,
            due=now + self._settings.interval_s,
            taken_until=0.0,
            slot=0,
            damage=Damage.DELETED if before is None else before.damage,
            spoiled=0.0,
            alarmed=False,
            noticed=0 if before is None else before.noticed,
            latest_s=0.0 if before is None else before.latest_s,
        )
        await self._db.write(lambda connection: _write(connection, planted, now))

    async def _begin(self, canary: Canary) -> None:
        """Choose a slot, write it down, then damage it: a gateway that dies in between is made up
        for by the next one."""
        sight = await self._sight(canary)
        if not sight.is_ours:
            await self._plant(canary.name, canary)  # collected, or somebody else's as well
            return
        volume = _volume_of(sight.truth, canary)
        if not await self._is_whole(canary, sight.truth, volume):
            await self._set(canary, due=self._clock.wall() + LATER_S)
            return
        slot = self._rng.randrange(volume.scheme.n)
        damage = Damage.LIE if canary.damage is Damage.DELETED else Damage.DELETED
        chosen = dataclasses.replace(canary, state=CanaryState.SPOILING, slot=slot, damage=damage)
        now = self._clock.wall()
        await self._db.write(lambda connection: _write(connection, chosen, now))
        await self._spoil(chosen)

    async def _spoil(self, canary: Canary) -> None:
        sight = await self._sight(canary)
        now = self._clock.wall()
        if not sight.is_ours:
            await self._plant(canary.name, canary)
            return
        volume = _volume_of(sight.truth, canary)
        node = volume.slots[canary.slot]
        others_whole = await self._is_whole(canary, sight.truth, volume, but=canary.slot)
        if node is None or not others_whole:
            await self._set(canary, state=CanaryState.PLANTED, due=now + LATER_S)
            return
        await self._damage(canary, volume, node)
        answers = await self._verify(canary, volume, [canary.slot])
        if canary.slot not in answers:
            return  # taken for a while, then tried again
        if _is_good(answers[canary.slot], sight.truth, canary, volume):
            await self._set(canary, state=CanaryState.PLANTED, due=now + LATER_S)
            return
        await self._set(canary, state=CanaryState.SPOILED, spoiled=now, alarmed=False)
        log.info("canary damaged", canary=canary.name, slot=canary.slot, damage=canary.damage)

    async def _damage(self, canary: Canary, volume: VolumeView, node: NodeId) -> None:
        port, incarnation = self._port(node), await self._incarnation(node)
        key = FragmentKey(volume.volume_id, canary.block, canary.slot)
        if canary.damage is Damage.DELETED:
            await port.delete(incarnation, [key], CALL_S)
            return
        (answer,) = await port.get([key], CALL_S)
        if answer.record is None:
            return  # damaged already: the caller verifies
        fragment = parse_expected(answer.record, *key)
        payload = self._rng.randbytes(fragment.scheme.chunk_bytes(1))
        header = pack_header(
            fragment.scheme,
            key.slot,
            key.block,
            key.volume,
            volume.epoch,
            1,
            payload,
            fragment.stripe_tag ^ 1,
            fragment.plain_length,
        )
        await port.put(incarnation, [(header, payload)], CALL_S)

    async def _look(self, canary: Canary) -> None:
        """Has somebody noticed?"""
        sight = await self._sight(canary)
        if not sight.is_ours:
            await self._plant(canary.name, canary)
            return
        volume = _volume_of(sight.truth, canary)
        now = self._clock.wall()
        key = FragmentKey(volume.volume_id, canary.block, canary.slot)
        noticed = key in sight.truth.owed
        if not noticed:
            answers = await self._verify(canary, volume, [canary.slot])
            noticed = _is_good(answers.get(canary.slot), sight.truth, canary, volume)
        if noticed:
            await self._noticed(canary, now)
        elif not canary.alarmed and now - canary.spoiled > self._settings.alarm_s:
            await self._alarm(canary, now)
        else:
            await self._set(canary)

    async def _noticed(self, canary: Canary, now: float) -> None:
        after = dataclasses.replace(
            canary,
            state=CanaryState.PLANTED,
            due=now + self._settings.interval_s,
            taken_until=0.0,
            alarmed=False,
            noticed=canary.noticed + 1,
            latest_s=now - canary.spoiled,
        )

        def work(connection: Connection) -> None:
            _write(connection, after, now)
            if canary.alarmed:
                kind = EventKind.ALARM_CLEARED
                record_event(connection, now, kind, _subject(canary), "its damage was noticed")

        await self._db.write(work)

    async def _alarm(self, canary: Canary, now: float) -> None:
        text = (
            f"slot {canary.slot} of canary {canary.block} was damaged ({canary.damage}) "
            f"{(now - canary.spoiled) / 3600:.0f} h ago and nobody has noticed: is the verifier "
            "running? see `haversack verify`"
        )
        alarmed = dataclasses.replace(canary, alarmed=True, taken_until=0.0)

        def work(connection: Connection) -> None:
            _write(connection, alarmed, now)
            record_event(connection, now, EventKind.ALARM_RAISED, _subject(canary), text)

        await self._db.write(work)
        log.error("a canary's damage was not noticed", canary=canary.name)

    # -- looking -------------------------------------------------------------------------------

    async def _sight(self, canary: Canary) -> _Sight:
        def work(connection: Connection) -> _Sight:
            row = connection.execute(
                select(blocks.c.owner, blocks.c.volume_id).where(
                    blocks.c.hash == bytes(canary.block)
                )
            ).one_or_none()
            if row is None:
                return _Sight(read_truth(connection, []), False)
            others = connection.execute(
                select(func.count())
                .select_from(claims)
                .where(claims.c.hash == bytes(canary.block), claims.c.owner != CANARY_OWNER)
            ).scalar_one()
            volume_id = VolumeId(row.volume_id)
            views = map_rows.read_volumes(connection, [volume_id])
            slots = range(views[0].scheme.n if views else 0)
            keys = [FragmentKey(volume_id, canary.block, slot) for slot in slots]
            truth = read_truth(connection, keys)
            ours = row.owner == CANARY_OWNER and not others and canary.block in truth.rows
            return _Sight(truth, ours and bool(views))

        return await self._db.read(work)

    async def _is_whole(
        self, canary: Canary, truth: Truth, volume: VolumeView, but: int | None = None
    ) -> bool:
        """Whether every fragment (but one) is there and good, and nobody is at work on them."""
        slots = [slot for slot in range(volume.scheme.n) if slot != but]
        if truth.moves or any(key.slot != but for key in truth.owed):
            return False
        answers = await self._verify(canary, volume, slots)
        return all(_is_good(answers.get(slot), truth, canary, volume) for slot in slots)

    async def _verify(
        self, canary: Canary, volume: VolumeView, slots: Sequence[int]
    ) -> dict[int, VerifiedRecord]:
        async def ask(slot: int) -> tuple[int, VerifiedRecord] | None:
            node = volume.slots[slot]
            if node is None:
                return None
            key = FragmentKey(volume.volume_id, canary.block, slot)
            try:
                (answer,) = await self._port(node).verify([key], CALL_S)
            except HaversackError:
                return None  # unanswered is neither good nor bad
            return slot, answer

        answers = await asyncio.gather(*(ask(slot) for slot in slots))
        return dict(answer for answer in answers if answer is not None)

    async def _incarnation(self, node: NodeId) -> int:
        view = await self._db.read(lambda connection: map_rows.read_node(connection, node))
        return 0 if view is None else view.incarnation

    async def _set(self, canary: Canary, **changes: Any) -> None:
        """Write a canary back and let go of it."""
        changed = dataclasses.replace(canary, **{"taken_until": 0.0, **changes})
        now = self._clock.wall()
        await self._db.write(lambda connection: _write(connection, changed, now))


def canaries_of(connection: Connection) -> list[dict[str, Any]]:
    """What an operator sees of the canaries: plain data."""
    names = connection.execute(
        select(passes.c.subject).where(passes.c.kind == CANARY).order_by(passes.c.subject)
    ).scalars()
    found = [read_pass(connection, CANARY, name) for name in names.all()]
    return [row.body for row in found if row is not None]


def _write(connection: Connection, canary: Canary, now: float) -> None:
    write_pass(
        connection, CANARY, canary.name, PassRow(canary.noticed, now, None, canary.to_body())
    )


def _subject(canary: Canary) -> str:
    return f"canary-{canary.name}"


def _volume_of(truth: Truth, canary: Canary) -> VolumeView:
    return truth.volumes[truth.rows[canary.block].volume]


def _is_good(
    answer: VerifiedRecord | None, truth: Truth, canary: Canary, volume: VolumeView
) -> bool:
    """Whether a node's record is whole and of the length that the row gives it."""
    stored = truth.rows[canary.block].stored_bytes
    expected = FRAGMENT_HEADER_BYTES + volume.scheme.chunk_bytes(stored)
    return answer is not None and answer.status is ItemStatus.OK and answer.length == expected
