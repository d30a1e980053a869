"""The scrubber: a node reads all of its own fragments within a period and checks each of them.

Part of `StorageNode`; `NodeHost` runs `Scrubber.step` again and again, the simulation does the same
under virtual time.  Clock and store come from the node; no thread, no randomness of its own.

    waiting --period half over, or START--> running --last fragment read--> waiting
       ^  |                                  |  ^
       |  +----- PAUSE / RESUME (either) ----+  |
       +--------- START begins a new pass ------+

One pass goes through the index from the newest volume to the oldest and reads what it names, so
it finds wrong bytes, records that are gone, and index entries that cannot be read.  A record that
is bad is *set aside* (`storage_node.findings`).  Passes begin every half period, and each takes at
most about that long: whenever one looks, every fragment was read within the last period.

Pace.  A pass of the calendar runs at the rate that it needs, with slack, and lets live traffic go
first, but not for ever: it waits at most as long again as its own pause.  A pass begun by START
runs at the rate it was given, or as fast as the disk goes.

Position and counts are node state ("scrub"), written when something was found, at both ends of a
pass and every `SAVE_S`: a restart reads at most that much again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

import msgspec
from msgspec.structs import replace

from protocol.clock import Clock
from protocol.errors import HaversackError
from protocol.limits import KIB, MIB
from protocol.messages import ItemStatus, Message, ScrubAction, ScrubProgress
from storage_node.examine import examined
from storage_node.findings import FINDINGS_MAX
from storage_node.interface import Finding, FragmentKey, FragmentStore, StoreStats

STATE_NAME: Final = "scrub"

STEP_BYTES: Final = 4 * MIB
STEP_KEYS: Final = 1_024
"""Read in one go: how long a thread may keep the disk, and what it may hold.  What was just read
is still in the cache of the processor when it is checked; measured in design/014."""

LOOK_S: Final = 2.0
"""How soon an order, or the end of a pause, is noticed."""

SAVE_S: Final = 30.0
RATE_MIN: Final = 64 * KIB
"""Bytes per second of the slowest pass: a nearly empty node is read in minutes."""

SLACK: Final = 1.5
"""A pass of the calendar aims at this multiple of the rate that it needs."""

QUIET_S: Final = 0.1
"""Without a request for this long, nobody is waiting for the disk."""

_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class ScrubSettings:
    """What an operator may change."""

    period_s: float = 14 * 24 * 3600
    """Within this, every fragment is read."""
    bytes_per_s_max: int = 32 * MIB
    """Of a pass of the calendar."""


class _Saved(Message, frozen=True, array_like=True, gc=False):
    """Node state "scrub", in MessagePack."""

    version: int
    progress: ScrubProgress
    bound: bytes
    """Where to go on; empty at the newest."""


class Stretch(NamedTuple):
    """What one reading showed."""

    fragments: int
    size: int
    bad: list[FragmentKey]
    rest: bytes | None
    damaged: bool


class ScrubbedNode(Protocol):
    """What a scrubber needs of its node."""

    last_use: float

    @property
    def takes_own_writes(self) -> bool: ...

    async def read_own(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Run `work(store, *arguments)` off the loop."""
        ...

    def write_own(self, work: Callable[[list[Any]], Any], payload: Any) -> Awaitable[Any]:
        """Run `work([payload, ...])` as a write."""
        ...

    @property
    def store(self) -> FragmentStore | None: ...


class Scrubber:
    """Where a node stands with reading its fragments."""

    def __init__(self, node: ScrubbedNode, clock: Clock, settings: ScrubSettings) -> None:
        self._node = node
        self._clock = clock
        self._settings = settings
        self._progress = ScrubProgress()
        self._bound: bytes | None = None
        self._due = float("-inf")
        self._deferred_until = float("-inf")
        self._saved_at = float("-inf")
        self._generation = 0

    def attach(self, store: FragmentStore) -> None:
        """Go on where the store says.  What cannot be read is begun anew."""
        self._generation += 1
        self._progress, self._bound = ScrubProgress(), None
        self._due = self._saved_at = self._clock.monotonic()
        written = store.get_state(STATE_NAME)
        if written is None:
            return
        try:
            saved = msgspec.msgpack.decode(written, type=_Saved)
        except (msgspec.DecodeError, msgspec.ValidationError):
            return
        if saved.version == _VERSION:
            self._progress, self._bound = saved.progress, saved.bound or None
            self._damaged = saved.progress.index_damaged

    def progress(self, findings: int) -> ScrubProgress:
        """Where it stands; `findings` are open now."""
        return replace(self._progress, findings=findings)

    @property
    def index_is_damaged(self) -> bool:
        """A part of the index could not be read, when it was read last."""
        return self._progress.index_damaged

    async def order(self, action: ScrubAction, bytes_per_s: int) -> None:
        """Carry out an order; durable on return."""
        match action:
            case ScrubAction.PAUSE:
                self._progress = replace(self._progress, paused=True)
            case ScrubAction.RESUME:
                self._progress = replace(self._progress, paused=False)
            case ScrubAction.START:
                asked = self._progress.running and self._progress.asked_for
                if not asked:
                    self._begin(self._held_stats())
                self._progress = replace(
                    self._progress, paused=False, asked_for=True, bytes_per_s=bytes_per_s
                )
        self._due = self._clock.monotonic()
        await self._save()

    def _held_stats(self) -> StoreStats:
        store = self._node.store
        assert store is not None, "the node checks that it serves"
        return store.stats()

    # -- one step ------------------------------------------------------------------------------

    async def step(self) -> float:
        """Do what is due; returns seconds until the next look, zero for at once.

        Whatever the disk refuses is the node's to notice; the scrubber comes back to it.
        """
        if not self._node.takes_own_writes or self._progress.paused:
            return LOOK_S
        try:
            return await self._step()
        except HaversackError:
            return LOOK_S

    async def _step(self) -> float:
        if not self._progress.running:
            if self._clock.wall() < self._next_begin():
                return LOOK_S
            self._begin(self._held_stats())
            await self._save()
        wait_s = self._wait_s()
        if wait_s > 0:
            return min(wait_s, LOOK_S)
        generation = self._generation
        stretch: Stretch = await self._node.read_own(read_stretch, self._bound)
        noted = 0
        if stretch.bad:
            noted = await self._node.write_own(self._set_aside, stretch.bad)
        if generation == self._generation:  # else another pass began, or another store was opened
            self._advance(stretch, noted)
            if stretch.rest is None:
                await self._look_at_findings()
                self._end()
            if noted or stretch.rest is None or self._is_save_due():
                await self._save()
        return min(max(0.0, self._due - self._clock.monotonic()), LOOK_S)

    def _next_begin(self) -> float:
        """When the calendar wants the next pass; at once on a disk that was never read, and where
        the clock was set back behind the last one: nobody knows how long ago that was."""
        progress = self._progress
        if not progress.pass_number or progress.started > self._clock.wall():
            return float("-inf")
        return progress.started + self._settings.period_s / 2

    def _set_aside(self, groups: list[list[FragmentKey]]) -> int:
        store = self._node.store
        assert store is not None, "the store is not closed while it is used"
        keys = list(dict.fromkeys(key for group in groups for key in group))
        return store.set_aside(keys, self._clock.wall())

    async def _look_at_findings(self) -> None:
        """Errors of the disk, and records that were gone, may have been put right meanwhile."""
        found, _ = await self._node.read_own(_open_findings)
        unsure = [item.key for item in found if item.status is not ItemStatus.CORRUPT]
        for start in range(0, len(unsure), STEP_KEYS):
            await self._node.write_own(self._set_aside, unsure[start : start + STEP_KEYS])

    def _begin(self, held: StoreStats) -> None:
        self._generation += 1
        self._bound = None
        self._progress = replace(
            self._progress,
            pass_number=self._progress.pass_number + 1,
            started=self._clock.wall(),
            running=True,
            asked_for=False,
            bytes_per_s=0,
            fragments_done=0,
            bytes_done=0,
            fragments_total=held.fragments,
            bytes_total=held.fragment_bytes,
            findings_of_pass=0,
        )
        self._damaged = False
        self._due = self._clock.monotonic()

    def _advance(self, stretch: Stretch, noted: int) -> None:
        done = self._progress
        self._damaged = self._damaged or stretch.damaged
        self._progress = replace(
            done,
            fragments_done=done.fragments_done + stretch.fragments,
            bytes_done=done.bytes_done + stretch.size,
            findings_of_pass=done.findings_of_pass + noted,
            index_damaged=done.index_damaged or stretch.damaged,
        )
        self._bound = stretch.rest
        rate = self._rate()
        now = self._clock.monotonic()
        self._due = now if rate is None else max(self._due, now - LOOK_S) + stretch.size / rate
        self._deferred_until = self._due + (self._due - now) / 2

    def _end(self) -> None:
        """A pass that read the whole index also tells when it is whole again."""
        self._progress = replace(
            self._progress,
            running=False,
            asked_for=False,
            ended=self._clock.wall(),
            index_damaged=self._damaged,
        )

    _damaged = False
    """This pass met a part of the index that cannot be read."""

    # -- pace ----------------------------------------------------------------------------------

    def _rate(self) -> float | None:
        """Bytes per second now; None for no bound."""
        progress = self._progress
        if progress.asked_for:
            return progress.bytes_per_s or None
        left = max(0, progress.bytes_total - progress.bytes_done)
        until = progress.started + self._settings.period_s / 2
        left_s = min(max(1.0, until - self._clock.wall()), self._settings.period_s / 2)
        return min(max(SLACK * left / left_s, RATE_MIN), self._settings.bytes_per_s_max)

    def _wait_s(self) -> float:
        """Seconds to wait before the next read; zero if it is due."""
        now = self._clock.monotonic()
        if now < self._due:
            return self._due - now
        busy = now - self._node.last_use < QUIET_S
        if busy and not self._progress.asked_for and now < self._deferred_until:
            return QUIET_S
        return 0.0

    # -- position ------------------------------------------------------------------------------

    def _is_save_due(self) -> bool:
        return self._clock.monotonic() - self._saved_at >= SAVE_S

    async def _save(self) -> None:
        saved = _Saved(_VERSION, self._progress, self._bound or b"")
        self._saved_at = self._clock.monotonic()
        await self._node.write_own(self._put_saved, msgspec.msgpack.encode(saved))

    def _put_saved(self, states: list[bytes]) -> None:
        store = self._node.store
        assert store is not None, "the store is not closed while it is used"
        store.put_state({STATE_NAME: states[-1]})


def read_stretch(store: FragmentStore, bound: bytes | None) -> Stretch:
    """Read and check the next fragments at or below `bound`."""
    page = store.newest(bound, STEP_KEYS, STEP_BYTES)
    keys = [key for key, _ in page.entries]
    answers = store.examine(keys)
    bad = [
        key
        for key, answer in zip(keys, answers, strict=True)
        if examined(key, answer).status is not ItemStatus.OK
    ]
    size = sum(length for _, length in page.entries)
    return Stretch(len(keys), size, bad, page.rest, page.damaged)


def _open_findings(store: FragmentStore) -> tuple[list[Finding], bool]:
    return store.findings(None, FINDINGS_MAX)
