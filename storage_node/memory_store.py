"""The fragment store of a simulated node: the same contract without a disk.

Used by tests and by `chaos/sim`; held to the suite that `RocksStore` passes.  `Disk` is what
survives the process: simulation drops a `MemoryStore` without closing it (`Disk.power_off`) and
opens another on the same `Disk`.  Faults are asked for on the disk and fire in the store.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from protocol.errors import DirectoryCorrupt, DirectoryInUse, NodeFull, NodeRefuses
from protocol.hashing import Buffer, checksum64
from protocol.limits import FRAME_BODY_BYTES_MAX, GIB
from protocol.messages import ItemStatus, PutPurpose
from storage_node import findings as book
from storage_node.examine import examined
from storage_node.interface import (
    Finding,
    FragmentKey,
    NewestPage,
    StoredRecord,
    StoreStats,
    just_below,
)
from storage_node.space import Space, SpaceShares, space_of

_ABSENT: Final = StoredRecord(ItemStatus.NOT_FOUND, None)
_CORRUPT: Final = StoredRecord(ItemStatus.CORRUPT, None)
_FAILED: Final = StoredRecord(ItemStatus.IO_ERROR, None)


@dataclass(slots=True)
class _Entry:
    record: bytes
    checksum: int


@dataclass(slots=True)
class Disk:
    """Everything durable of one node, and the faults it will show."""

    capacity_bytes: int = 1024 * GIB
    reserve_bytes: int = 0
    shares: SpaceShares = field(default_factory=SpaceShares)
    entries: dict[bytes, _Entry] = field(default_factory=dict)
    state: dict[str, bytes] = field(default_factory=dict)
    keys: list[bytes] = field(default_factory=list)
    """Of `entries`, sorted."""
    used_bytes: int = 0
    findings: dict[bytes, Finding] = field(default_factory=dict)
    gone: set[bytes] = field(default_factory=set)
    """Keys that are listed, and whose record is gone: an index entry that points nowhere."""
    holder: MemoryStore | None = None
    """The store that has the disk open: the LOCK of the real one."""
    full: bool = False
    """Puts are refused, as when the reserve is reached."""
    unreadable: bool = False
    """Every read of a record answers IO_ERROR."""
    calls: int = 0
    """Calls that reached the disk, for `fail_call`."""
    failing: dict[int, str] = field(default_factory=dict)
    torn: int | None = None

    # -- faults ----------------------------------------------------------------------------

    def power_off(self) -> None:
        """The process that has the disk open is gone; what it had acknowledged stays."""
        if self.holder is not None:
            self.holder.dead = True
            self.holder = None

    def corrupt(self, key: FragmentKey) -> bool:
        """Flip a bit of a stored record.  False if there is none."""
        entry = self.entries.get(key.pack())
        if entry is None:
            return False
        entry.record = bytes([entry.record[0] ^ 1]) + entry.record[1:] if entry.record else b"?"
        return True

    def replace_undetected(self, key: FragmentKey, record: bytes) -> None:
        """Put other bytes under a key as if they had been stored: a misdirected write."""
        self._set(key.pack(), record)

    def lose(self, key: FragmentKey) -> bool:
        """Forget a stored record, as if it had never been put.  False if there is none."""
        return self._remove(key.pack())

    def lose_record(self, key: FragmentKey) -> bool:
        """Keep the key and forget its record.  False if there is none."""
        packed = key.pack()
        if packed in self.entries:
            self.gone.add(packed)
        return packed in self.entries

    def fail_call(self, number: int) -> None:
        """The `number`-th call from now on that reaches the disk fails with an I/O error."""
        self.failing[self.calls + number] = "I/O error"

    def fill_at_call(self, number: int) -> None:
        """The `number`-th call from now on that reaches the disk finds it full, half-way."""
        self.failing[self.calls + number] = "No space left on device"

    def tear_next_put(self, kept: int) -> None:
        """Power fails in the middle of the next group: only its first `kept` records are there."""
        self.torn = kept

    # -- contents --------------------------------------------------------------------------

    def _touch(self) -> str | None:
        """Count a call; the failure it meets, if any."""
        self.calls += 1
        return self.failing.pop(self.calls, None)

    def _set(self, key: bytes, record: bytes) -> None:
        self._remove(key)
        self.entries[key] = _Entry(record, checksum64(record))
        insort(self.keys, key)
        self.used_bytes += len(record)

    def _remove(self, key: bytes) -> bool:
        entry = self.entries.pop(key, None)
        self.gone.discard(key)
        if entry is None:
            return False
        del self.keys[bisect_right(self.keys, key) - 1]
        self.used_bytes -= len(entry.record)
        return True


class PowerLost(Exception):
    """Raised out of a write by `Disk.tear_next_put`: the process does not live to see it."""


class MemoryStore:
    """`FragmentStore` on a `Disk`.  What a call changed is durable when it returns."""

    def __init__(self, disk: Disk | None = None) -> None:
        disk = disk or Disk()
        if disk.holder is not None:
            raise DirectoryInUse("another process has the disk open")
        if disk._touch() is not None:
            raise DirectoryCorrupt("the disk cannot be opened (I/O error)")
        disk.holder = self
        self._disk = disk
        self._failure: str | None = None
        self.dead = False

    def put_group(
        self,
        records: Sequence[tuple[FragmentKey, Buffer]],
        purpose: PutPurpose = PutPurpose.CLIENT,
    ) -> None:
        """Store all; durable on return."""
        disk = self._writable()
        latest = {key.pack(): bytes(record) for key, record in records}
        size = sum(map(len, latest.values()))
        if self.space().free_for(purpose) < size:
            raise NodeFull("the disk is full: puts are refused, reads and deletes go on")
        if disk.torn is not None:
            kept, disk.torn = disk.torn, None
            for key, record in list(latest.items())[:kept]:
                disk._set(key, record)
            disk.power_off()
            raise PowerLost
        self._write()
        for key, record in latest.items():
            disk._set(key, record)
            if key in disk.findings and self._is_good(FragmentKey.unpack(key)):
                del disk.findings[key]

    def _is_good(self, key: FragmentKey) -> bool:
        return examined(key, self._look(key)).status is ItemStatus.OK

    def delete_group(self, keys: Sequence[FragmentKey]) -> list[ItemStatus]:
        """Remove; durable on return."""
        disk = self._writable()
        self._write()
        packed = [key.pack() for key in keys]
        known = {key: None for key in packed if key in disk.entries}
        for key in known:
            disk._remove(key)
            disk.findings.pop(key, None)
        return [ItemStatus.OK if key in known else ItemStatus.NOT_FOUND for key in packed]

    def put_state(self, values: dict[str, bytes]) -> None:
        """Set node state; durable on return."""
        disk = self._writable()
        self._write()
        disk.state.update(values)

    def get_many(
        self, keys: Sequence[FragmentKey], bytes_max: int = FRAME_BODY_BYTES_MAX
    ) -> list[StoredRecord]:
        """One answer per key, in order."""
        disk = self._readable()
        failed = disk._touch() is not None or disk.unreadable
        answers = []
        budget = bytes_max
        for key in keys:
            packed = key.pack()
            entry = disk.entries.get(packed)
            if failed:
                answers.append(_FAILED)
            elif entry is None:
                answers.append(_ABSENT)
            elif len(entry.record) > budget and budget < bytes_max:
                answers.append(StoredRecord(ItemStatus.NOT_SENT, None))
            else:
                budget -= len(entry.record)
                finding = disk.findings.get(packed)
                aside = finding is not None and finding.status is ItemStatus.CORRUPT
                answers.append(_CORRUPT if aside or packed in disk.gone else self._look(key))
        return answers

    def _look(self, key: FragmentKey) -> StoredRecord:
        """What lies under one key."""
        packed = key.pack()
        entry = self._disk.entries.get(packed)
        if entry is None or packed in self._disk.gone:
            return _ABSENT
        good = checksum64(entry.record) == entry.checksum
        return StoredRecord(ItemStatus.OK, entry.record) if good else _CORRUPT

    def examine(self, keys: Sequence[FragmentKey]) -> list[StoredRecord]:
        """Read records, also those set aside."""
        disk = self._readable()
        if disk._touch() is not None or disk.unreadable:
            return [_FAILED] * len(keys)
        return [self._look(key) for key in keys]

    def newest(self, bound: bytes | None, limit: int, bytes_max: int) -> NewestPage:
        """A page of what is stored, in reverse key order."""
        disk = self._readable()
        if disk._touch() is not None or disk.unreadable:
            raise DirectoryCorrupt("the disk cannot be read (I/O error)")
        end = len(disk.keys) if bound is None else bisect_right(disk.keys, bound)
        entries: list[tuple[FragmentKey, int]] = []
        for key in disk.keys[max(0, end - limit) : end][::-1]:
            length = len(disk.entries[key].record)
            if entries and length > bytes_max:
                break
            bytes_max -= length
            entries.append((FragmentKey.unpack(key), length))
        rest = just_below(entries[-1][0].pack()) if end > len(entries) else None
        return NewestPage(entries, rest, damaged=False)

    def set_aside(self, keys: Sequence[FragmentKey], at: float) -> int:
        """Note what is still bad, durably."""
        disk = self._writable()
        self._write()
        held = [key for key in keys if key.pack() in disk.entries]
        change = book.look_again(disk.findings, held, self.examine, at)
        disk.findings.update(change.noted)
        for key in change.ended:
            del disk.findings[key]
        return len(change.noted)

    def findings(self, after: FragmentKey | None, limit: int) -> tuple[list[Finding], bool]:
        """Open findings in key order."""
        return book.page_of(self._readable().findings, after, limit)

    def inventory(
        self, after: FragmentKey | None, limit: int
    ) -> tuple[list[tuple[FragmentKey, int]], bool]:
        """A page of what is stored."""
        disk = self._readable()
        if disk._touch() is not None or disk.unreadable:
            raise DirectoryCorrupt("the disk cannot be read (I/O error)")
        start = 0 if after is None else bisect_right(disk.keys, after.pack())
        page = disk.keys[start : start + limit]
        found = [(FragmentKey.unpack(key), len(disk.entries[key].record)) for key in page]
        return found, start + limit < len(disk.keys)

    def get_state(self, name: str) -> bytes | None:
        """Node state; None if never set."""
        return self._readable().state.get(name)

    def stats(self) -> StoreStats:
        """Current counts."""
        disk = self._readable()
        counters = {"findings": len(disk.findings)}
        return StoreStats(len(disk.entries), disk.used_bytes, disk.used_bytes, counters)

    def space(self) -> Space:
        """What is taken, and what puts may still take."""
        disk = self._disk
        free = 0 if disk.full else max(0, disk.capacity_bytes - disk.used_bytes)
        return space_of(disk.used_bytes, free, None, disk.reserve_bytes, disk.shares)

    def tidy(self, budget_bytes: int) -> int:
        """Nothing to do here."""
        self._writable()
        return 0

    def close(self) -> None:
        """Let go of the disk.  Idempotent."""
        if self._disk.holder is self:
            self._disk.holder = None
        self.dead = True

    def _readable(self) -> Disk:
        if self.dead:
            raise NodeRefuses("the store is closed")
        return self._disk

    def _writable(self) -> Disk:
        disk = self._readable()
        if self._failure is not None:
            raise NodeRefuses(
                f"the store takes no writes until it is opened again: {self._failure}"
            )
        return disk

    def _write(self) -> None:
        """Reach the disk with a write; after a failure the store takes no more."""
        failure = self._disk._touch()
        if failure is None:
            return
        self._failure = failure
        if "space" in failure:
            raise NodeFull("the disk is full")
        raise DirectoryCorrupt(f"a write failed ({failure}): no further write until opened again")
