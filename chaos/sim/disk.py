"""Simulated disks: they outlive processes, take time, fill up, fail, forget and lie.

A `SimDisk` is a node's directory: made once, opened by each life of the node (`open`), which gets
a `SimStore` over `storage_node.memory_store`, the memory twin of the real store.  An injector sets
`SimDisk.faults`.  Everything `put_group` returned for is durable; what was under way at a kill is
not, or is in part, as the fault says.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from chaos.faults import Damage, Moment
from chaos.sim.process import SimProcess
from erasure.fragment import FRAGMENT_HEADER_BYTES, pack_header, parse
from protocol.errors import DirectoryCorrupt, NodeRefuses
from protocol.hashing import Buffer
from protocol.ids import NodeId
from protocol.limits import FRAME_BODY_BYTES_MAX
from protocol.messages import ItemStatus, PutPurpose
from storage_node.interface import (
    Finding,
    FragmentKey,
    FragmentStore,
    NewestPage,
    StoredRecord,
    StoreStats,
)
from storage_node.memory_store import Disk
from storage_node.space import Space

DISK_MEAN_S = 0.0015
"""A synced group on a good disk."""


class _Died(Exception):
    """Raised through the code of a process that a disk fault has just killed."""


@dataclass(slots=True)
class DiskFaults:
    """What is wrong with one disk now."""

    sync_fails: bool = False
    """The next write fails half-way; used up by it."""
    read_error_share: float = 0.0
    slow_factor: float = 1.0
    kill: Moment | None = None
    """The process dies in the next write; used up by it."""
    on_kill: Callable[[], None] | None = None
    on_fired: Callable[[str], None] | None = None

    def fired(self, what: str) -> None:
        """Count a fault that did something."""
        if self.on_fired is not None:
            self.on_fired(what)


class SimDisk:
    """One node's disk, and who has it open."""

    def __init__(
        self, node_id: NodeId, make_store: Callable[[Disk], FragmentStore], rng: random.Random
    ) -> None:
        self.node_id = node_id
        self.disk = Disk()
        self.faults = DiskFaults()
        self._make_store = make_store
        self._rng = rng
        self._holder: SimProcess | None = None

    def open(self, process: SimProcess) -> SimStore:
        """What a life of the node does at its start.  Raises `DirectoryInUse` while another life,
        running or stopped, has it open, as the LOCK file of the real store does."""
        if self._holder is not None and self._holder is not process and not self._holder.alive:
            self.disk.power_off()
        store = self._make_store(self.disk)
        self._holder = process
        return SimStore(store, self.disk, self.faults, self._rng)

    async def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """The `run` of a node on this disk: its calls take the time of a disk."""
        half_s = self._rng.expovariate(1.0) * DISK_MEAN_S / 2 * self.faults.slow_factor
        await asyncio.sleep(half_s)
        result = function(*args)
        await asyncio.sleep(half_s)
        return result

    # -- for injectors and inspectors ----------------------------------------------------------

    def peek(self, key: FragmentKey) -> bytes | None:
        """The bytes that lie on the disk."""
        entry = self.disk.entries.get(key.pack())
        return None if entry is None else entry.record

    def wipe(self) -> None:
        """Another disk stands in the place of this one.  Call it only while no process runs."""
        self.disk = Disk()
        self._holder = None

    def incarnation(self) -> int:
        """The newest that a node adopted on this disk; 0 for none."""
        return int.from_bytes(self.disk.state.get("incarnation", b""), "big")

    def stored_keys(self) -> list[FragmentKey]:
        """All keys on the disk, in key order."""
        return [FragmentKey.unpack(key) for key in self.disk.keys]

    def damage(self, key: FragmentKey, damage: Damage, *, noticed: bool) -> None:
        """Rot one record; if `noticed`, the store's own checksum tells."""
        record = self.peek(key)
        assert record is not None
        if noticed and damage is not Damage.LIE:
            self.disk.corrupt(key)
        else:
            self.disk.replace_undetected(key, _spoil(record, damage, self._rng))

    def swap(self, key: FragmentKey, other: FragmentKey) -> None:
        """Reads of `key` give the record of `other`."""
        record = self.peek(other)
        assert record is not None
        self.disk.replace_undetected(key, record)

    def drop(self, key: FragmentKey) -> None:
        """Reads of `key` find nothing."""
        self.disk.lose(key)


class SimStore:
    """`FragmentStore` as one life of a node holds it."""

    def __init__(
        self, inner: FragmentStore, disk: Disk, faults: DiskFaults, rng: random.Random
    ) -> None:
        self._inner = inner
        self._disk = disk
        self._faults = faults
        self._rng = rng
        self._failed = False

    def put_group(
        self,
        records: Sequence[tuple[FragmentKey, Buffer]],
        purpose: PutPurpose = PutPurpose.CLIENT,
    ) -> None:
        """See `FragmentStore.put_group`."""
        self._check_writable()
        if self._disk.full:
            self._faults.fired("disk_full")
        some = [record for record in records if self._rng.random() < 0.5]
        self._fail_or_die(
            lambda: self._inner.put_group(some, purpose),
            lambda: self._inner.put_group(records, purpose),
        )
        self._inner.put_group(records, purpose)

    def delete_group(self, keys: Sequence[FragmentKey]) -> list[ItemStatus]:
        """See `FragmentStore.delete_group`."""
        self._check_writable()
        some = [key for key in keys if self._rng.random() < 0.5]
        self._fail_or_die(
            lambda: self._inner.delete_group(some), lambda: self._inner.delete_group(keys)
        )
        return self._inner.delete_group(keys)

    def put_state(self, values: dict[str, bytes]) -> None:
        """See `FragmentStore.put_state`: all or nothing."""
        self._check_writable()
        self._fail_or_die(lambda: None, lambda: self._inner.put_state(values))
        self._inner.put_state(values)

    def set_aside(self, keys: Sequence[FragmentKey], at: float) -> int:
        """See `FragmentStore.set_aside`."""
        self._check_writable()
        self._fail_or_die(lambda: None, lambda: self._inner.set_aside(keys, at))
        return self._inner.set_aside(keys, at)

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
        if self._failed:
            raise NodeRefuses("no writes until the store is opened again: a sync failed")

    def get_many(
        self, keys: Sequence[FragmentKey], bytes_max: int = FRAME_BODY_BYTES_MAX
    ) -> list[StoredRecord]:
        """See `FragmentStore.get_many`."""
        return self._with_read_errors(self._inner.get_many(keys, bytes_max))

    def examine(self, keys: Sequence[FragmentKey]) -> list[StoredRecord]:
        """See `FragmentStore.examine`."""
        return self._with_read_errors(self._inner.examine(keys))

    def _with_read_errors(self, answers: list[StoredRecord]) -> list[StoredRecord]:
        if not self._faults.read_error_share:
            return answers
        return [self._with_errors(answer) for answer in answers]

    def _with_errors(self, answer: StoredRecord) -> StoredRecord:
        if self._rng.random() >= self._faults.read_error_share:
            return answer
        self._faults.fired("read_error")
        return StoredRecord(ItemStatus.IO_ERROR, None)

    def inventory(
        self, after: FragmentKey | None, limit: int
    ) -> tuple[list[tuple[FragmentKey, int]], bool]:
        """See `FragmentStore.inventory`."""
        return self._inner.inventory(after, limit)

    def newest(self, bound: bytes | None, limit: int, bytes_max: int) -> NewestPage:
        """See `FragmentStore.newest`."""
        return self._inner.newest(bound, limit, bytes_max)

    def findings(self, after: FragmentKey | None, limit: int) -> tuple[list[Finding], bool]:
        """See `FragmentStore.findings`."""
        return self._inner.findings(after, limit)

    def get_state(self, name: str) -> bytes | None:
        """See `FragmentStore.get_state`."""
        return self._inner.get_state(name)

    def stats(self) -> StoreStats:
        """See `FragmentStore.stats`."""
        return self._inner.stats()

    def space(self) -> Space:
        """See `FragmentStore.space`."""
        return self._inner.space()

    def tidy(self, budget_bytes: int) -> int:
        """See `FragmentStore.tidy`."""
        return self._inner.tidy(budget_bytes)

    def close(self) -> None:
        """See `FragmentStore.close`."""
        self._inner.close()


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
