"""`StorageNode`: what one disk promises, apart from sockets, Ray and RocksDB.

The node's side of every walk: a put's fragments arrive here from `port_server` (or from the
simulated network), are checked, committed in groups and acknowledged; gets and deletes likewise.
Time, the store and the executor are parameters; imports neither ray nor rocksdict.

Fencing.  Placement grants a lease for an *incarnation*; the node adopts a higher one durably and
refuses lower ones, and acknowledges no write once its lease ran out, by its own monotonic clock.
Per volume it remembers the highest epoch it has seen and refuses records of older ones.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from erasure.fragment import parse
from protocol.clock import Clock
from protocol.errors import (
    CorruptFragment,
    DirectoryCorrupt,
    FormatUnsupported,
    InvalidRequest,
    NodeFull,
    NodeRefuses,
    OperatorNeeded,
    StaleIncarnation,
    UnknownOutcome,
)
from protocol.hashing import Buffer
from protocol.ids import NodeId, VolumeId
from protocol.limits import FRAME_ITEMS_MAX, MIB
from protocol.messages import (
    FindingsReply,
    InventoryReply,
    ItemStatus,
    LeaseReply,
    PutPurpose,
    ScrubAction,
    ScrubProgress,
    SpaceReport,
    SummaryReply,
)
from storage_node.disk_health import DiskHealth
from storage_node.examine import examine_some
from storage_node.findings import FINDINGS_MAX
from storage_node.group_commit import GroupCommit, Run
from storage_node.identity import Identity
from storage_node.interface import (
    Finding,
    FragmentKey,
    FragmentStore,
    PutOutcome,
    StoredRecord,
    VerifiedRecord,
)
from storage_node.scrub import Scrubber, ScrubSettings
from storage_node.service_state import Fault, ServiceState, transition
from storage_node.space import Space

INVENTORY_PAGE_MAX: Final = 16_384
"""Keys on one page of an inventory."""

VERIFY_BYTES_MAX: Final = 256 * MIB
"""Read for one request at most: a second or so, well within a caller's patience."""

_VERIFY_KEYS: Final = 256
_VERIFY_BYTES: Final = 8 * MIB
"""Read in one go: how long a thread may keep the disk, and what it may hold."""

_EPOCHS_CACHED_MAX: Final = 65_536
_INCARNATION = "incarnation"


class _Group(NamedTuple):
    """One put's share of a group commit."""

    records: list[tuple[FragmentKey, Buffer]]
    epochs: dict[VolumeId, int]
    """Newer volume epochs than the store has written down."""
    size: int


class StorageNode:
    """One disk behind one port.  All methods belong to one event loop."""

    def __init__(
        self,
        identity: Identity,
        store: FragmentStore | None,
        clock: Clock,
        run: Run,
        *,
        run_slow: Run | None = None,
        pid: int | None = None,
        scrub: ScrubSettings | None = None,
    ) -> None:
        """`run` carries out what takes a millisecond or so (the real node: on the loop, since
        rocksdict holds the GIL anyway), `run_slow` the rest (off the loop); the same by default.
        """
        self.identity = identity
        self._store: FragmentStore | None = None
        self._clock = clock
        self._run = run
        self._run_slow = run_slow or run
        self._pid = os.getpid() if pid is None else pid
        self._state = ServiceState.OPENING
        self._detail = ""
        self._health = DiskHealth(clock)
        self._incarnation = 0
        self._lease_until = float("-inf")
        self._epochs: dict[VolumeId, int] = {}
        self._unwritten_epochs: dict[VolumeId, int] = {}
        self._users = 0
        self._unused = asyncio.Event()
        self._unused.set()
        self._commits = GroupCommit(run)
        self._write_failures = 0
        self._counters = dict.fromkeys(
            ("puts", "put_bytes", "puts_refused", "gets", "get_bytes", "deletes"), 0
        )
        self.last_use = float("-inf")
        """When a put, get or delete last came, by the monotonic clock."""
        self.scrubber = Scrubber(self, clock, scrub or ScrubSettings())
        if store is not None:
            self.attach(store)

    # -- life ------------------------------------------------------------------------------

    @property
    def node_id(self) -> NodeId:
        return self.identity.node_id

    @property
    def state(self) -> ServiceState:
        return self._state

    @property
    def detail(self) -> str:
        """Why the node does not serve; empty while it does."""
        return self._detail

    @property
    def fault(self) -> Fault:
        """What is wrong with the disk, as far as it is known."""
        findings = 0 if self._store is None else self._store.stats().counters.get("findings", 0)
        if self.scrubber.index_is_damaged or findings >= FINDINGS_MAX:
            return Fault.DISK
        return self._health.fault

    @property
    def incarnation(self) -> int:
        return self._incarnation

    @property
    def store(self) -> FragmentStore | None:
        return self._store

    @property
    def commits(self) -> GroupCommit:
        """The write queue; the port tells it about requests that are arriving."""
        return self._commits

    @property
    def has_lease(self) -> bool:
        return self._clock.monotonic() < self._lease_until

    def attach(self, store: FragmentStore) -> None:
        """Serve `store`, just opened.  A lease from before does not carry over."""
        written = store.get_state(_INCARNATION)
        self._incarnation = 0 if written is None else int.from_bytes(written, "big")
        self._lease_until = float("-inf")
        self._epochs.clear()
        self._unwritten_epochs.clear()
        self.scrubber.attach(store)
        self._store = store
        self._health.opened()
        if self._state is ServiceState.REFUSING:
            self._enter(ServiceState.OPENING, "")
        self._enter(ServiceState.SERVING, "")

    def refuse(self, error: OperatorNeeded) -> None:
        """Do not serve, and say why: the directory is not ours, or cannot be opened."""
        self._enter(ServiceState.REFUSING, error.message)
        self._health.refused(error)

    def wait_to_open(self, detail: str) -> None:
        """Not serving yet, and why: the directory is in use, or the disk is full."""
        self._enter(ServiceState.OPENING, detail)

    async def detach(self) -> None:
        """Close the store, to be opened again; returns when nobody uses it any more."""
        self._enter(ServiceState.OPENING, self._detail)
        await self._close_store()

    async def close(self) -> None:
        """Finish queued writes, then close the store.  Idempotent."""
        self._enter(ServiceState.CLOSING, "stopped")
        await self._commits.close()
        await self._close_store()

    async def _close_store(self) -> None:
        store, self._store = self._store, None
        self._lease_until = float("-inf")
        await self._unused.wait()
        if store is not None:
            await self._run_slow(store.close)

    async def _use(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Run blocking `work` of the store; it is not closed meanwhile."""
        self._users += 1
        self._unused.clear()
        try:
            return await self._run(work, *arguments)
        finally:
            self._used()

    async def _use_slowly(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """As `_use`, off the loop.  A caller that goes away does not end the work."""
        self._users += 1
        self._unused.clear()
        running = asyncio.ensure_future(self._run_slow(work, *arguments))
        running.add_done_callback(self._used)
        return await asyncio.shield(running)

    def _used(self, _done: object = None) -> None:
        self._users -= 1
        if self._users == 0:
            self._unused.set()

    def _enter(self, state: ServiceState, detail: str) -> None:
        self._state = transition(self._state, state)
        self._detail = detail

    # -- writes ----------------------------------------------------------------------------

    async def put(
        self,
        incarnation: int,
        records: Sequence[Buffer],
        *,
        purpose: PutPurpose = PutPurpose.CLIENT,
    ) -> PutOutcome:
        """Store fragment records; OK means durable.

        Raises `NodeRefuses` without a live lease or a store, `StaleIncarnation`, `NodeFull`,
        `Overloaded`; `UnknownOutcome` if the write failed half-way or the lease ran out meanwhile.
        """
        self._admit_write(incarnation)
        statuses = [ItemStatus.OK] * len(records)
        good: list[tuple[FragmentKey, Buffer]] = []
        for number, record in enumerate(records):
            checked = _check(record)
            if checked is None:
                statuses[number] = ItemStatus.INVALID
                continue
            key, epoch = checked
            seen = self._epochs.get(key.volume)
            if seen is None:
                seen = await self._load_epoch(key.volume)
            if epoch < seen:
                statuses[number] = ItemStatus.STALE_EPOCH
                continue
            if epoch > seen:
                self._epochs[key.volume] = self._unwritten_epochs[key.volume] = epoch
            good.append((key, record))
        if good:
            size = sum(len(record) for _, record in good)
            group = _Group(good, dict(self._unwritten_epochs), size)
            repair = purpose is PutPurpose.REPAIR
            store_group = self._store_repair_group if repair else self._store_client_group
            await self._write(store_group, group, size)
            self._wrote_epochs(group.epochs)
            self._counters["puts"] += len(good)
            self._counters["put_bytes"] += size
        self._admit_answer(incarnation)
        return PutOutcome(incarnation, statuses)

    async def delete(self, incarnation: int, keys: Sequence[FragmentKey]) -> list[ItemStatus]:
        """Remove fragments; durable on return.  Raises as `put` does."""
        self._admit_write(incarnation)
        done: dict[FragmentKey, ItemStatus] = await self._write(self._delete_group, list(keys), 0)
        self._counters["deletes"] += len(keys)
        self._admit_answer(incarnation)
        return [done[key] for key in keys]

    async def _write(self, work: Any, payload: Any, size: int) -> Any:
        self.last_use = self._clock.monotonic()
        return await self._submit(work, payload, size)

    async def _submit(self, work: Any, payload: Any, size: int) -> Any:
        try:
            return await self._commits.submit(work, payload, size)
        except NodeFull:
            self._counters["puts_refused"] += 1
            raise
        except DirectoryCorrupt as error:
            self._fail(error)
            raise UnknownOutcome(
                f"{self.node_id} failed while writing: {error}", {"node": self.node_id}
            ) from error
        except NodeRefuses as error:
            if self._state is ServiceState.SERVING:
                self._fail(error)  # the store takes no more writes: an earlier one failed
            raise

    def _fail(self, error: Exception) -> None:
        if self._state is ServiceState.SERVING:
            self._write_failures += 1
            self._enter(ServiceState.FAILED, str(error))
            self._health.write_failed(error)

    def _store_client_group(self, groups: list[_Group]) -> None:
        self._store_group(groups, PutPurpose.CLIENT)

    def _store_repair_group(self, groups: list[_Group]) -> None:
        self._store_group(groups, PutPurpose.REPAIR)

    def _store_group(self, groups: list[_Group], purpose: PutPurpose) -> None:
        """Runs off the loop, one at a time: newer epochs first, so that no record of a new epoch
        is durable on a node that would still take the old one."""
        store = self._held_store()
        epochs = {}
        for group in groups:
            epochs.update(group.epochs)
        if epochs:
            store.put_state(
                {_epoch_name(volume): epoch.to_bytes(8, "big") for volume, epoch in epochs.items()}
            )
        store.put_group([record for group in groups for record in group.records], purpose)

    def _delete_group(self, groups: list[list[FragmentKey]]) -> dict[FragmentKey, ItemStatus]:
        keys = list(dict.fromkeys(key for group in groups for key in group))
        return dict(zip(keys, self._held_store().delete_group(keys), strict=True))

    def _adopt(self, incarnations: list[int]) -> None:
        """The highest ever offered stays durable, in whatever order leases reach the disk."""
        store = self._held_store()
        written = store.get_state(_INCARNATION)
        highest = max(incarnations)
        if written is None or highest > int.from_bytes(written, "big"):
            store.put_state({_INCARNATION: highest.to_bytes(8, "big")})

    async def _load_epoch(self, volume: VolumeId) -> int:
        written = await self._use(self._held_store().get_state, _epoch_name(volume))
        if len(self._epochs) >= _EPOCHS_CACHED_MAX:
            self._epochs.clear()
        epoch = 0 if written is None else int.from_bytes(written, "big")
        epoch = max(epoch, self._unwritten_epochs.get(volume, 0))
        return self._epochs.setdefault(volume, epoch)

    def _wrote_epochs(self, epochs: dict[VolumeId, int]) -> None:
        for volume, epoch in epochs.items():
            if self._unwritten_epochs.get(volume) == epoch:
                del self._unwritten_epochs[volume]

    def _admit_write(self, incarnation: int) -> None:
        if self._state is not ServiceState.SERVING:
            raise self._refusal("writes")
        if incarnation != self._incarnation:
            raise StaleIncarnation(
                f"{self.node_id} lives its incarnation {self._incarnation}, the request was meant "
                f"for {incarnation}",
                {"node": self.node_id, "incarnation": self._incarnation},
            )
        if not self.has_lease:
            raise NodeRefuses(
                f"{self.node_id} has no live lease: it takes no writes", {"node": self.node_id}
            )

    def _admit_answer(self, incarnation: int) -> None:
        """The write is durable; may it still be acknowledged?"""
        if incarnation != self._incarnation or not self.has_lease:
            raise UnknownOutcome(
                f"{self.node_id} lost its lease while it was writing", {"node": self.node_id}
            )

    # -- reads -----------------------------------------------------------------------------

    async def get(self, keys: Sequence[FragmentKey]) -> list[StoredRecord]:
        """Read records; the caller verifies each.  Those over the size of one frame are NOT_SENT.

        Raises `NodeRefuses` while no store is open.
        """
        store = self._readable_store()
        self.last_use = self._clock.monotonic()
        found: list[StoredRecord] = await self._use(store.get_many, keys)
        self._counters["gets"] += len(keys)
        self._counters["get_bytes"] += sum(
            len(answer.record) for answer in found if answer.record is not None
        )
        return found

    async def inventory(self, after: FragmentKey | None, limit: int) -> InventoryReply:
        """A page of what the node holds.  Raises `DirectoryCorrupt` where it cannot be told."""
        if not 0 < limit <= FRAME_ITEMS_MAX:
            raise InvalidRequest(f"a page of {limit} keys: ask for 1 to {FRAME_ITEMS_MAX}")
        store = self._readable_store()
        page, more = await self._use_slowly(store.inventory, after, min(limit, INVENTORY_PAGE_MAX))
        return InventoryReply([key.pack() for key, _ in page], [length for _, length in page], more)

    async def verify(self, keys: Sequence[FragmentKey]) -> list[VerifiedRecord]:
        """Read records and check all of each, off the loop; after `VERIFY_BYTES_MAX` the rest of
        the keys is NOT_SENT.  Raises `NodeRefuses` while no store is open."""
        store = self._readable_store()
        found: list[VerifiedRecord] = []
        read_bytes = 0
        while len(found) < len(keys) and read_bytes < VERIFY_BYTES_MAX:
            part = keys[len(found) : len(found) + _VERIFY_KEYS]
            answers: list[VerifiedRecord] = await self._use_slowly(
                examine_some, store, part, _VERIFY_BYTES
            )
            found += answers
            read_bytes += sum(answer.length for answer in answers)
        unread = len(keys) - len(found)
        return found + [VerifiedRecord(ItemStatus.NOT_SENT)] * unread

    async def findings(self, after: FragmentKey | None, limit: int) -> FindingsReply:
        """A page of the fragments that are set aside.  Raises `NodeRefuses` without a store."""
        if not 0 < limit <= FRAME_ITEMS_MAX:
            raise InvalidRequest(f"a page of {limit} findings: ask for 1 to {FRAME_ITEMS_MAX}")
        page: tuple[list[Finding], bool] = await self._use(
            self._readable_store().findings, after, limit
        )
        found, more = page
        return FindingsReply(
            [finding.key.pack() for finding in found],
            [int(finding.status) for finding in found],
            [finding.found_at for finding in found],
            more,
        )

    # -- its own work ----------------------------------------------------------------------

    async def scrub(self, action: ScrubAction, bytes_per_s: int) -> ScrubProgress:
        """Start, pause or resume the scrub, durably.  Raises `NodeRefuses` unless it serves."""
        if bytes_per_s < 0:
            raise InvalidRequest(f"a rate of {bytes_per_s} bytes per second")
        if self._state is not ServiceState.SERVING:
            raise self._refusal("orders")
        await self.scrubber.order(action, bytes_per_s)
        return self._scrub_progress()

    def _scrub_progress(self) -> ScrubProgress:
        counters = {} if self._store is None else self._store.stats().counters
        return self.scrubber.progress(counters.get("findings", 0))

    @property
    def is_space_short(self) -> bool:
        """Whether the space of deleted fragments is wanted back now, and not when it suits."""
        return self._state is ServiceState.SERVING and self._held_store().space().is_short

    @property
    def takes_own_writes(self) -> bool:
        """Whether the node may write for itself: no lease is needed for that."""
        return self._state is ServiceState.SERVING

    async def read_own(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Run `work(store, *arguments)` off the loop."""
        return await self._use_slowly(work, self._readable_store(), *arguments)

    async def write_own(self, work: Callable[[list[Any]], Any], payload: Any) -> Any:
        """Run `work([payload, ...])` as a write that nobody asked for."""
        if not self.takes_own_writes:
            raise self._refusal("writes")
        return await self._submit(work, payload, 0)

    async def tidy(self, budget_bytes: int) -> int:
        """One step of the store's upkeep; returns the bytes rewritten, zero if none."""
        if self._state is not ServiceState.SERVING:
            return 0
        try:
            rewritten: int = await self._use_slowly(self._held_store().tidy, budget_bytes)
        except (DirectoryCorrupt, NodeFull, NodeRefuses) as error:
            self._fail(error)
            return 0
        return rewritten

    def _readable_store(self) -> FragmentStore:
        if self._state not in (ServiceState.SERVING, ServiceState.FAILED):
            raise self._refusal("reads")
        return self._held_store()

    def _held_store(self) -> FragmentStore:
        if self._store is None:
            raise self._refusal("requests")
        return self._store

    def _refusal(self, what: str) -> NodeRefuses:
        return NodeRefuses(
            f"{self.node_id} is {self._state} and takes no {what}"
            + (f": {self._detail}" if self._detail else ""),
            {"node": self.node_id, "state": str(self._state), "detail": self._detail},
        )

    # -- control ---------------------------------------------------------------------------

    async def lease(self, incarnation: int, lease_s: float) -> LeaseReply:
        """Take or renew the right to acknowledge writes for `lease_s` from now.

        A higher incarnation is adopted durably first.  A node that does not serve takes no lease
        and says so in the answer.  Raises `StaleIncarnation` for a lower one.
        """
        until = self._clock.monotonic() + lease_s
        if self._state is not ServiceState.SERVING:
            return self._lease_reply()
        if incarnation < self._incarnation:
            raise StaleIncarnation(
                f"{self.node_id} already lives its incarnation {self._incarnation}",
                {"node": self.node_id, "incarnation": self._incarnation},
            )
        if incarnation > self._incarnation:
            await self._write(self._adopt, incarnation, 0)
            if incarnation > self._incarnation:
                self._incarnation = incarnation
                self._lease_until = float("-inf")
        if incarnation == self._incarnation and self._state is ServiceState.SERVING:
            self._lease_until = max(self._lease_until, until)
        return self._lease_reply()

    def _lease_reply(self) -> LeaseReply:
        serves = self._store is not None and self._state is ServiceState.SERVING
        free = self._held_store().space().client_free_bytes if serves else -1
        return LeaseReply(
            self._incarnation,
            str(self._state),
            self._detail,
            str(self.fault),
            free,
            self._write_failures,
        )

    async def summary(self) -> SummaryReply:
        """State and counts.  Answers in every state."""
        counters: dict[str, Any] = {
            **self._counters,
            "groups": self._commits.groups,
            "jobs_grouped": self._commits.jobs_grouped,
            "queued_bytes": self._commits.queued_bytes,
            "lease": self.has_lease,
        }
        fragments = fragment_bytes = used = 0
        space = Space(0, 0, 0, 0, 0)
        if self._store is not None and self._state is not ServiceState.CLOSING:
            stats = self._store.stats()
            fragments, fragment_bytes, used = (
                stats.fragments,
                stats.fragment_bytes,
                stats.disk_bytes,
            )
            space = self._store.space()
            counters.update(stats.counters)
        return SummaryReply(
            str(self._state),
            self._detail,
            self._incarnation,
            fragments,
            fragment_bytes,
            used,
            space.client_free_bytes,
            self._pid,
            counters,
            str(self.fault),
            SpaceReport(*space),
            self.scrubber.progress(counters.get("findings", 0)),
        )


def _epoch_name(volume: VolumeId) -> str:
    return f"epoch/{volume}"


def _check(record: Buffer) -> tuple[FragmentKey, int] | None:
    """Key and epoch of a whole, intact record; None for anything else."""
    try:
        fragment = parse(record)
    except (CorruptFragment, FormatUnsupported):
        return None
    return FragmentKey(fragment.volume, fragment.block, fragment.slot), fragment.epoch
