"""What a node's disk must do (`FragmentStore`) and what a node looks like to others (`NodePort`).

`FragmentStore` has two implementations held to one conformance suite: `rocks_store.RocksStore`
and `memory_store.MemoryStore`.  `NodePort` has two: `port_client.SocketPort` over the data port,
and the simulated network of `chaos/sim`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from protocol.hashing import Buffer
from protocol.ids import BlockHash, NodeId, VolumeId
from protocol.limits import FRAME_BODY_BYTES_MAX
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
from storage_node.space import Space

KEY_BYTES = 8 + 32 + 1


class FragmentKey(NamedTuple):
    """Where a fragment belongs: one slot of one block's stripe in one volume."""

    volume: VolumeId
    block: BlockHash
    slot: int

    def pack(self) -> bytes:
        """41 bytes whose order is (volume, block, slot)."""
        return self.volume.to_bytes(8, "big") + self.block + self.slot.to_bytes(1, "big")

    @classmethod
    def unpack(cls, data: bytes) -> FragmentKey:
        """Inverse of `pack`."""
        assert len(data) == KEY_BYTES
        return cls(
            VolumeId(int.from_bytes(data[:8], "big")),
            BlockHash(data[8:40]),
            data[40],
        )


def just_below(bound: bytes) -> bytes | None:
    """The greatest 41 bytes that are less than `bound`; None below zero."""
    number = int.from_bytes(bound, "big")
    return (number - 1).to_bytes(KEY_BYTES, "big") if number else None


class StoredRecord(NamedTuple):
    """Answer for one key of a read: `record` is None unless `status` is OK."""

    status: ItemStatus
    record: Buffer | None


class Finding(NamedTuple):
    """A fragment that a store has set aside (`storage_node.findings`)."""

    key: FragmentKey
    status: ItemStatus
    """CORRUPT; NOT_FOUND: an index entry whose record is gone; IO_ERROR."""
    found_at: float
    """Seconds since 1970."""


class NewestPage(NamedTuple):
    """A page of a store's index, newest volumes first."""

    entries: list[tuple[FragmentKey, int]]
    """Keys and record lengths; zero where the entry itself is damaged."""
    rest: bytes | None
    """Bound of the next page: 41 bytes, not always a key; None at the end."""
    damaged: bool
    """A part of the index could not be read and was passed over."""


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Counts kept by a store; exact after open."""

    fragments: int
    fragment_bytes: int
    disk_bytes: int
    """What the store takes on the disk, deleted records that were not yet dropped included."""
    counters: dict[str, int]


class FragmentStore(Protocol):
    """Durable map from `FragmentKey` to fragment record on one disk.

    Calls block; `StorageNode` runs them off its event loop and never runs two writes at a time.
    An operating-system or RocksDB error raises `DirectoryCorrupt` or `NodeFull`, and after a
    failed sync the store accepts no further write until it is opened again.
    """

    def put_group(
        self,
        records: Sequence[tuple[FragmentKey, Buffer]],
        purpose: PutPurpose = PutPurpose.CLIENT,
    ) -> None:
        """Store all records; durable when this returns.  A record under a known key is the same
        record again (names are content hashes) and replaces it; a finding ends with it once the
        new record was read back.  Raises `NodeFull` above the threshold of `purpose`."""
        ...

    def get_many(
        self, keys: Sequence[FragmentKey], bytes_max: int = FRAME_BODY_BYTES_MAX
    ) -> list[StoredRecord]:
        """One answer per key, in order.  A bad record answers CORRUPT for its own key only.
        Records beyond `bytes_max` in all are not read and answer NOT_SENT; the first found is
        always read.  A record found to be CORRUPT before answers so without being read."""
        ...

    def delete_group(self, keys: Sequence[FragmentKey]) -> list[ItemStatus]:
        """Remove; durable when this returns.  OK or NOT_FOUND per key."""
        ...

    def inventory(
        self, after: FragmentKey | None, limit: int
    ) -> tuple[list[tuple[FragmentKey, int]], bool]:
        """Keys and record lengths in key order after `after`; True if there are more."""
        ...

    def newest(self, bound: bytes | None, limit: int, bytes_max: int) -> NewestPage:
        """Keys at or below `bound` (of all, for None) in reverse key order: newest volumes first.
        Up to `limit`, and of records up to `bytes_max` in all, but for the first.  What cannot be
        read of the index is passed over, and said."""
        ...

    def examine(self, keys: Sequence[FragmentKey]) -> list[StoredRecord]:
        """Read records, also those set aside.  One that is gone though the index names it answers
        NOT_FOUND here, as one that is in no index does; `set_aside` tells them apart."""
        ...

    def set_aside(self, keys: Sequence[FragmentKey], at: float) -> int:
        """A write: look at these once more and note those still bad, durably; returns how many
        were noted now.  Ends findings whose record is good again (`storage_node.findings`)."""
        ...

    def findings(self, after: FragmentKey | None, limit: int) -> tuple[list[Finding], bool]:
        """Open findings in key order after `after`; True if there are more."""
        ...

    def get_state(self, name: str) -> bytes | None:
        """Small durable state of the node itself (incarnation, volume epochs)."""
        ...

    def put_state(self, values: dict[str, bytes]) -> None:
        """Set several at once; durable when this returns."""
        ...

    def stats(self) -> StoreStats:
        """Current counts."""
        ...

    def space(self) -> Space:
        """What the store takes of its disk, and what puts may still take, by purpose."""
        ...

    def tidy(self, budget_bytes: int) -> int:
        """One step of upkeep that reads and writes at most about `budget_bytes`; returns what it
        rewrote, zero when there is nothing to do.  May run beside reads and one write."""
        ...

    def close(self) -> None:
        """Flush and release the directory.  Idempotent."""
        ...


class PutOutcome(NamedTuple):
    """Answer to a put: which incarnation stored it, and one status per record."""

    incarnation: int
    statuses: list[ItemStatus]


class VerifiedRecord(NamedTuple):
    """What a node found when it read one of its own records and checked all of it."""

    status: ItemStatus
    """OK: header and payload match their checksums, and it is the fragment of this key."""
    length: int = 0
    """Of the record, bytes."""
    epoch: int = 0
    """Of the volume when the record was written."""
    stripe_tag: int = 0


class NodePort(Protocol):
    """A storage node as its callers see it.  Every method may raise `NodeUnavailable`,
    `NodeRefuses`, `StaleIncarnation`, `NodeFull`, `HandshakeRefused`; a put or delete that was sent
    and not answered raises `UnknownOutcome`.  `deadline_s` is seconds from now, always finite.
    """

    @property
    def node_id(self) -> NodeId: ...

    async def put(
        self,
        incarnation: int,
        records: Sequence[Sequence[Buffer]],
        deadline_s: float,
        *,
        purpose: PutPurpose = PutPurpose.CLIENT,
    ) -> PutOutcome:
        """Store fragment records.  Each record is given in pieces (header, payload) so that the
        caller need not join them; OK means durable on that node.  Repair may fill a node further
        than clients may."""
        ...

    async def get(self, keys: Sequence[FragmentKey], deadline_s: float) -> list[StoredRecord]:
        """Read records; the caller verifies each one's checksum and identity."""
        ...

    async def delete(
        self, incarnation: int, keys: Sequence[FragmentKey], deadline_s: float
    ) -> list[ItemStatus]:
        """Remove fragments."""
        ...

    async def lease(self, incarnation: int, lease_s: float, deadline_s: float) -> LeaseReply:
        """Grant or renew the right to acknowledge writes.  A higher incarnation than the node's
        own is adopted durably before the answer; a lower one is refused (`StaleIncarnation`)."""
        ...

    async def summary(self, deadline_s: float) -> SummaryReply:
        """State and counts."""
        ...

    async def inventory(
        self, after: FragmentKey | None, limit: int, deadline_s: float
    ) -> InventoryReply:
        """A page of what the node holds."""
        ...

    async def verify(self, keys: Sequence[FragmentKey], deadline_s: float) -> list[VerifiedRecord]:
        """Have the node read records from its disk and check them; no record travels."""
        ...

    async def scrub(
        self, action: ScrubAction, bytes_per_s: int, deadline_s: float
    ) -> ScrubProgress:
        """Start, pause or resume the node's reading of its own fragments; where it stands now.
        `bytes_per_s` is for START; zero is as fast as the disk goes."""
        ...

    async def findings(
        self, after: FragmentKey | None, limit: int, deadline_s: float
    ) -> FindingsReply:
        """A page of the fragments that the node has set aside as bad."""
        ...

    async def close(self) -> None:
        """Close the connection.  Idempotent."""
        ...


@dataclass(frozen=True, slots=True)
class NodeRegistration:
    """What a node process announces to the placement service: that its store is open, or where it
    can be asked why it is not."""

    node_id: NodeId
    store_id: str
    endpoint: str
    """`host:port` of its data port."""
    pid: int
    directory: str
    capacity_bytes: int
    """Size of the file system that holds the directory; zero if there is none."""
    refusal: str = ""
    """Why it does not serve its directory; empty once its store is open."""
