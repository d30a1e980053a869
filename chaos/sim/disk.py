"""Simulated disks: they outlive processes, take time, fill up, fail, forget and lie.

A `SimDisk` is a node's directory: made once, opened by each life of the node (`open`), which gets
a `SimStore`, a `FragmentStore` over the memory twin of the real store.  An injector sets
`SimDisk.faults`.  Everything `put_group` returned for is durable; what was under way at a kill is
not, or is in part, as the fault says.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from chaos.faults import Damage, Moment
from chaos.sim.process import SimProcess
from erasure.fragment import FRAGMENT_HEADER_BYTES, pack_header, parse
from protocol.errors import DirectoryCorrupt, DirectoryInUse, NodeFull, NodeRefuses
from protocol.hashing import Buffer
from protocol.ids import NodeId
from protocol.limits import FRAME_BODY_BYTES_MAX
from protocol.messages import ItemStatus
from storage_node.interface import FragmentKey, FragmentStore, StoredRecord, StoreStats

DISK_MEAN_S = 0.0015
"""A synced group on a good disk."""


class _Died(Exception):
    """Raised through the code of a process that a disk fault has just killed."""


class Damaged(NamedTuple):
    """What a disk gives for a key instead of what was written."""

    status: ItemStatus
    record: bytes | None


@dataclass(slots=True)
class DiskFaults:
    """What is wrong with one disk now."""

    full: bool = False
    sync_fails: bool = False
    """The next write fails half-way; used up by it."""
    read_error_share: float = 0.0
    slow_factor: float = 1.0
    kill: Moment | None = None
    """The process dies in the next write; used up by it."""
    on_kill: Callable[[], None] | None = None
    on_fired: Callable[[str], None] | None = None
    damaged: dict[FragmentKey, Damaged] = field(default_factory=dict)

    def fired(self, what: str) -> None:
        """Count a fault that did something."""
        if self.on_fired is not None:
            self.on_fired(what)


class SimDisk:
    """One node's disk; `make_store` makes the memory twin it keeps for life."""

    def __init__(
        self, node_id: NodeId, make_store: Callable[[], FragmentStore], rng: random.Random
    ) -> None:
        self.node_id = node_id
        self.faults = DiskFaults()
        self._inner = make_store()
        self._rng = rng
        self._holder: SimProcess | None = None

    def open(self, process: SimProcess) -> SimStore:
        """What a life of the node does at its start.  Raises `DirectoryInUse` while another life,
        running or stopped, has it open: the LOCK file of the real store."""
        if self._holder is not None and self._holder is not process and self._holder.alive:
            raise DirectoryInUse(f"another process has the disk of {self.node_id} open")
        self._holder = process
        return SimStore(self._inner, self.faults, self._rng, self._release)

    def _release(self) -> None:
        self._holder = None

    async def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """The `run` of a node on this disk: its calls take the time of a disk."""
        half_s = self._rng.expovariate(1.0) * DISK_MEAN_S / 2 * self.faults.slow_factor
        await asyncio.sleep(half_s)
        result = function(*args)
        await asyncio.sleep(half_s)
        return result

    # -- for injectors and inspectors ----------------------------------------------------------

    def peek(self, key: FragmentKey) -> bytes | None:
        """The bytes that a read of `key` would meet now."""
        damaged = self.faults.damaged.get(key)
        if damaged is not None:
            return damaged.record
        ((status, record),) = self._inner.get_many([key])
        return bytes(record) if status is ItemStatus.OK and record is not None else None

    def keys(self) -> list[FragmentKey]:
        """All keys ever stored and not deleted, in key order."""
        found: list[FragmentKey] = []
        more = True
        while more:
            page, more = self._inner.inventory(found[-1] if found else None, 10_000)
            found.extend(key for key, _ in page)
        return found

    def damage(self, key: FragmentKey, damage: Damage, *, noticed: bool) -> None:
        """Rot one record; if `noticed`, reads of it answer CORRUPT without bytes."""
        record = self.peek(key)
        assert record is not None
        spoilt = _spoil(record, damage, self._rng)
        hidden = noticed and damage is not Damage.LIE
        status = ItemStatus.CORRUPT if hidden else ItemStatus.OK
        self.faults.damaged[key] = Damaged(status, spoilt)

    def swap(self, key: FragmentKey, other: FragmentKey) -> None:
        """Reads of `key` give the record of `other`."""
        self.faults.damaged[key] = Damaged(ItemStatus.OK, self.peek(other))

    def drop(self, key: FragmentKey) -> None:
        """Reads of `key` find nothing."""
        self.faults.damaged[key] = Damaged(ItemStatus.NOT_FOUND, None)


class SimStore:
    """`FragmentStore` as one life of a node holds it."""

    def __init__(
        self,
        inner: FragmentStore,
        faults: DiskFaults,
        rng: random.Random,
        release: Callable[[], None],
    ) -> None:
        self._inner = inner
        self._faults = faults
        self._rng = rng
        self._release = release
        self._failed = False
        self._closed = False

    def put_group(self, records: Sequence[tuple[FragmentKey, Buffer]]) -> None:
        """See `FragmentStore.put_group`."""
        self._check_writable()
        if self._faults.full:
            self._faults.fired("disk_full")
            raise NodeFull("simulated: no space left on the disk")
        some = [record for record in records if self._rng.random() < 0.5]
        self._fail_or_die(lambda: self._store(some), lambda: self._store(records))
        self._store(records)

    def _store(self, records: Sequence[tuple[FragmentKey, Buffer]]) -> None:
        self._inner.put_group([(key, bytes(record)) for key, record in records])
        for key, _ in records:
            self._faults.damaged.pop(key, None)

    def delete_group(self, keys: Sequence[FragmentKey]) -> list[ItemStatus]:
        """See `FragmentStore.delete_group`."""
        self._check_writable()
        some = [key for key in keys if self._rng.random() < 0.5]
        self._fail_or_die(lambda: self._delete(some), lambda: self._delete(keys))
        return self._delete(keys)

    def _delete(self, keys: Sequence[FragmentKey]) -> list[ItemStatus]:
        for key in keys:
            self._faults.damaged.pop(key, None)
        return self._inner.delete_group(keys)

    def put_state(self, values: dict[str, bytes]) -> None:
        """See `FragmentStore.put_state`: all or nothing."""
        self._check_writable()
        self._fail_or_die(lambda: None, lambda: self._inner.put_state(values))
        self._inner.put_state(values)

    def _fail_or_die(self, part: Callable[[], object], whole: Callable[[], object]) -> None:
        """Carry out the fault that waits for this write, if there is one."""
        faults = self._faults
        if faults.sync_fails:
            faults.sync_fails = False
            faults.fired("sync_fails")
            self._failed = True
            part()
            raise DirectoryCorrupt("simulated: a sync failed; no further write until reopened")
        if faults.kill is not None:
            moment, faults.kill = faults.kill, None
            if moment is Moment.TORN:
                part()
            elif moment is Moment.AFTER:
                whole()
            faults.fired("kill_at_disk")
            assert faults.on_kill is not None
            faults.on_kill()
            raise _Died

    def _check_writable(self) -> None:
        if self._closed:
            raise NodeRefuses("the store is closed")
        if self._failed:
            raise NodeRefuses("no writes until the store is opened again: a sync failed")

    def get_many(
        self, keys: Sequence[FragmentKey], bytes_max: int = FRAME_BODY_BYTES_MAX
    ) -> list[StoredRecord]:
        """See `FragmentStore.get_many`."""
        if self._closed:
            raise NodeRefuses("the store is closed")
        answers = self._inner.get_many(keys, bytes_max)
        return [self._tamper(key, answer) for key, answer in zip(keys, answers, strict=True)]

    def _tamper(self, key: FragmentKey, answer: StoredRecord) -> StoredRecord:
        faults = self._faults
        if faults.read_error_share and self._rng.random() < faults.read_error_share:
            faults.fired("read_error")
            return StoredRecord(ItemStatus.IO_ERROR, None)
        damaged = faults.damaged.get(key)
        if damaged is None:
            return answer
        faults.fired("damaged_read")
        if damaged.status is not ItemStatus.OK:
            return StoredRecord(damaged.status, None)
        return StoredRecord(ItemStatus.OK, damaged.record)

    def inventory(
        self, after: FragmentKey | None, limit: int
    ) -> tuple[list[tuple[FragmentKey, int]], bool]:
        """See `FragmentStore.inventory`."""
        page, more = self._inner.inventory(after, limit)
        dropped = {
            key
            for key, damaged in self._faults.damaged.items()
            if damaged.status is ItemStatus.NOT_FOUND
        }
        return [item for item in page if item[0] not in dropped], more

    def get_state(self, name: str) -> bytes | None:
        """See `FragmentStore.get_state`."""
        return self._inner.get_state(name)

    def stats(self) -> StoreStats:
        """See `FragmentStore.stats`."""
        return self._inner.stats()

    def free_bytes(self) -> int:
        """See `FragmentStore.free_bytes`."""
        return 0 if self._faults.full else self._inner.free_bytes()

    def tidy(self, budget_bytes: int) -> int:
        """See `FragmentStore.tidy`."""
        return self._inner.tidy(budget_bytes)

    def close(self) -> None:
        """Give the disk to the next life.  The memory twin stays: it is the disk."""
        if not self._closed:
            self._closed = True
            self._release()


def _spoil(record: bytes, damage: Damage, rng: random.Random) -> bytes:
    """The record after `damage`; always different from it."""
    spoilt = bytearray(record)
    match damage:
        case Damage.FLIP_HEADER:
            spoilt[rng.randrange(FRAGMENT_HEADER_BYTES)] ^= 1 << rng.randrange(8)
        case Damage.FLIP_PAYLOAD:
            at = rng.randrange(FRAGMENT_HEADER_BYTES, len(spoilt))
            spoilt[at] ^= 1 << rng.randrange(8)
        case Damage.TRUNCATE:
            del spoilt[rng.randrange(len(spoilt)) :]
        case Damage.ZERO:
            spoilt[FRAGMENT_HEADER_BYTES // 2 :] = bytes(len(spoilt) - FRAGMENT_HEADER_BYTES // 2)
        case Damage.LIE:
            return _lie(record, rng)
    return bytes(spoilt)


def _lie(record: bytes, rng: random.Random) -> bytes:
    """The same fragment with another payload and a header that vouches for it."""
    found = parse(record)
    payload = bytearray(found.payload)
    payload[rng.randrange(len(payload))] ^= 1 << rng.randrange(8)
    header = pack_header(
        found.scheme,
        found.slot,
        found.block,
        found.volume,
        found.epoch,
        found.stored_length,
        payload,
        found.stripe_tag,
        found.plain_length,
    )
    return header + bytes(payload)
