"""`StorageNode`: what one disk promises, apart from sockets, Ray and RocksDB.

The node's side of every walk: a put's fragments arrive here from `port_server` (or from the
simulated network), are checked, committed in groups and acknowledged; gets and deletes likewise.
Time, the store and the executor are parameters; imports neither ray nor rocksdict.

    request -> state (`service_state`) -> fence (`fence`) -> group (`group_commit`)
            -> store (`store_use`) -> fence again -> answer (`replies`)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Final

from protocol.clock import Clock
from protocol.errors import (
    DirectoryCorrupt,
    InvalidRequest,
    NodeFull,
    NodeRefuses,
    OperatorNeeded,
    UnknownOutcome,
)
from protocol.hashing import Buffer
from protocol.ids import NodeId, VolumeId
from protocol.limits import FRAME_ITEMS_MAX
from protocol.messages import (
    FindingsReply,
    InventoryReply,
    ItemStatus,
    LeaseReply,
    PutPurpose,
    ScrubAction,
    ScrubProgress,
    SummaryReply,
)
from storage_node.disk_health import DiskHealth
from storage_node.examine import examine_many
from storage_node.fence import Fence, adopt, epoch_name
from storage_node.findings import FINDINGS_MAX
from storage_node.group_commit import GroupCommit, Run
from storage_node.identity import Identity
from storage_node.interface import (
    FragmentKey,
    FragmentStore,
    PutOutcome,
    StoredRecord,
    VerifiedRecord,
)
from storage_node.put_group import PutGroup, delete_groups, key_of, store_groups
from storage_node.replies import (
    Condition,
    findings_reply,
    inventory_reply,
    lease_reply,
    summary_reply,
)
from storage_node.scrub import Scrubber, ScrubSettings
from storage_node.service_state import Fault, ServiceState, transition
from storage_node.store_use import StoreUse

INVENTORY_PAGE_MAX: Final = 16_384
"""Keys on one page of an inventory."""


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
        self._clock = clock
        self._use = StoreUse(run, run_slow or run)
        self._fence = Fence(identity.node_id, clock)
        self._pid = os.getpid() if pid is None else pid
        self._state = ServiceState.OPENING
        self._detail = ""
        self._health = DiskHealth(clock)
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
        if self.scrubber.index_is_damaged or self._findings_open() >= FINDINGS_MAX:
            return Fault.DISK
        return self._health.fault

    @property
    def incarnation(self) -> int:
        return self._fence.incarnation

    @property
    def store(self) -> FragmentStore | None:
        return self._use.store

    @property
    def commits(self) -> GroupCommit:
        """The write queue; the port tells it about requests that are arriving."""
        return self._commits

    @property
    def has_lease(self) -> bool:
        return self._fence.has_lease

    def attach(self, store: FragmentStore) -> None:
        """Serve `store`, just opened.  A lease from before does not carry over."""
        self._fence.opened(store)
        self.scrubber.attach(store)
        self._use.store = store
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
        self._fence.end_lease()
        await self._use.close()

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
            checked = key_of(record)
            if checked is None:
                statuses[number] = ItemStatus.INVALID
                continue
            key, epoch = checked
            seen = self._fence.epoch_of(key.volume)
            if seen is None:
                seen = await self._load_epoch(key.volume)
            if epoch < seen:
                statuses[number] = ItemStatus.STALE_EPOCH
                continue
            if epoch > seen:
                self._fence.raise_epoch(key.volume, epoch)
            good.append((key, record))
        if good:
            size = sum(len(record) for _, record in good)
            group = PutGroup(good, self._fence.unwritten_epochs())
            repair = purpose is PutPurpose.REPAIR
            store_group = self._store_repair_group if repair else self._store_client_group
            await self._write(store_group, group, size)
            self._fence.wrote_epochs(group.epochs)
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

    # Group commit takes neighbours together that name the same work, by these names.

    def _store_client_group(self, groups: list[PutGroup]) -> None:
        store_groups(self._held_store(), groups, PutPurpose.CLIENT)

    def _store_repair_group(self, groups: list[PutGroup]) -> None:
        store_groups(self._held_store(), groups, PutPurpose.REPAIR)

    def _delete_group(self, groups: list[list[FragmentKey]]) -> dict[FragmentKey, ItemStatus]:
        return delete_groups(self._held_store(), groups)

    def _adopt(self, incarnations: list[int]) -> None:
        adopt(self._held_store(), incarnations)

    async def _load_epoch(self, volume: VolumeId) -> int:
        written = await self._use.quickly(self._held_store().get_state, epoch_name(volume))
        return self._fence.loaded(volume, written)

    def _admit_write(self, incarnation: int) -> None:
        if self._state is not ServiceState.SERVING:
            raise self._refusal("writes")
        self._fence.admit_write(incarnation)

    def _admit_answer(self, incarnation: int) -> None:
        self._fence.admit_answer(incarnation)

    # -- reads -----------------------------------------------------------------------------

    async def get(self, keys: Sequence[FragmentKey]) -> list[StoredRecord]:
        """Read records; the caller verifies each.  Those over the size of one frame are NOT_SENT.

        Raises `NodeRefuses` while no store is open.
        """
        store = self._readable_store()
        self.last_use = self._clock.monotonic()
        found: list[StoredRecord] = await self._use.quickly(store.get_many, keys)
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
        limit = min(limit, INVENTORY_PAGE_MAX)
        return inventory_reply(*await self._use.slowly(store.inventory, after, limit))

    async def verify(self, keys: Sequence[FragmentKey]) -> list[VerifiedRecord]:
        """Read records and check all of each, off the loop, as far as `examine_many` goes; the
        rest of the keys is NOT_SENT.  Raises `NodeRefuses` while no store is open."""
        return await examine_many(self._use.slowly, self._readable_store(), keys)

    async def findings(self, after: FragmentKey | None, limit: int) -> FindingsReply:
        """A page of the fragments that are set aside.  Raises `NodeRefuses` without a store."""
        if not 0 < limit <= FRAME_ITEMS_MAX:
            raise InvalidRequest(f"a page of {limit} findings: ask for 1 to {FRAME_ITEMS_MAX}")
        store = self._readable_store()
        return findings_reply(*await self._use.quickly(store.findings, after, limit))

    # -- its own work ----------------------------------------------------------------------

    async def scrub(self, action: ScrubAction, bytes_per_s: int) -> ScrubProgress:
        """Start, pause or resume the scrub, durably.  Raises `NodeRefuses` unless it serves."""
        if bytes_per_s < 0:
            raise InvalidRequest(f"a rate of {bytes_per_s} bytes per second")
        if self._state is not ServiceState.SERVING:
            raise self._refusal("orders")
        await self.scrubber.order(action, bytes_per_s)
        return self.scrubber.progress(self._findings_open())

    def _findings_open(self) -> int:
        return 0 if self.store is None else self.store.stats().counters.get("findings", 0)

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
        return await self._use.slowly(work, self._readable_store(), *arguments)

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
            rewritten: int = await self._use.slowly(self._held_store().tidy, budget_bytes)
        except (DirectoryCorrupt, NodeFull, NodeRefuses) as error:
            self._fail(error)
            return 0
        return rewritten

    def _readable_store(self) -> FragmentStore:
        if self._state not in (ServiceState.SERVING, ServiceState.FAILED):
            raise self._refusal("reads")
        return self._held_store()

    def _held_store(self) -> FragmentStore:
        if self.store is None:
            raise self._refusal("requests")
        return self.store

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
        self._fence.admit_lease(incarnation)
        if incarnation > self.incarnation:
            await self._write(self._adopt, incarnation, 0)
            self._fence.adopted(incarnation)
        if self._state is ServiceState.SERVING:
            self._fence.extend_lease(incarnation, until)
        return self._lease_reply()

    def _lease_reply(self) -> LeaseReply:
        store = self.store if self._state is ServiceState.SERVING else None
        return lease_reply(self._condition(), store, self._write_failures)

    def _condition(self) -> Condition:
        return Condition(self._state, self._detail, self.incarnation, self.fault)

    async def summary(self) -> SummaryReply:
        """State and counts.  Answers in every state."""
        counters: dict[str, Any] = {
            **self._counters,
            "groups": self._commits.groups,
            "jobs_grouped": self._commits.jobs_grouped,
            "queued_bytes": self._commits.queued_bytes,
            "lease": self.has_lease,
        }
        store = None if self._state is ServiceState.CLOSING else self.store
        return summary_reply(self._condition(), store, self._pid, counters, self.scrubber.progress)
