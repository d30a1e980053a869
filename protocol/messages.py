"""The typed part of each data-port frame, one struct per op and direction (MessagePack arrays).

Fields are only ever appended, with a default.  Fragment records travel in the body, in the order
of the message's list; `lengths` says where each ends.

| op        | request                     | body            | answer           | body           |
|-----------|-----------------------------|-----------------|------------------|----------------|
| HELLO     | `Hello`                     |                 | `Challenge`      |                |
| PROVE     | `Prove`                     |                 | `Welcome`        |                |
| PUT       | `PutRequest`                | records         | `PutReply`       |                |
| GET       | `GetRequest`                |                 | `GetReply`       | records found  |
| DELETE    | `DeleteRequest`             |                 | `DeleteReply`    |                |
| LEASE     | `LeaseRequest`              |                 | `LeaseReply`     |                |
| SUMMARY   | `SummaryRequest`            |                 | `SummaryReply`   |                |
| INVENTORY | `InventoryRequest`          |                 | `InventoryReply` |                |
| VERIFY    | `VerifyRequest`             |                 | `VerifyReply`    |                |
| SCRUB     | `ScrubRequest`              |                 | `ScrubProgress`  |                |
| FINDINGS  | `FindingsRequest`           |                 | `FindingsReply`  |                |

An answer of status ERROR carries `ErrorReply` whatever the op.
"""

from __future__ import annotations

import enum
from typing import Any

import msgspec


class Message(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Base of all messages: immutable, encoded as an array."""


class ItemStatus(enum.IntEnum):
    """What became of one item of a batch.  Append-only."""

    OK = 0
    NOT_FOUND = 1
    """The node looked, completely, and does not hold it."""
    CORRUPT = 2
    """It is there and fails a check."""
    STALE_EPOCH = 3
    """The record's volume epoch is older than one the node has seen."""
    IO_ERROR = 4
    """The disk answered with an error: says nothing about whether the fragment exists."""
    INVALID = 5
    """The record sent is not a well-formed fragment."""
    NOT_SENT = 6
    """The answer would have grown over its limit: ask again for this one."""


class PutPurpose(enum.IntEnum):
    """On whose behalf fragments are stored: repair may fill a disk further than clients may.
    Append-only."""

    CLIENT = 0
    REPAIR = 1


class ScrubAction(enum.IntEnum):
    """What is asked of a node's scrubber.  Append-only."""

    START = 0
    """Begin a pass now, at the given rate; one that was begun so goes on at the new rate."""
    PAUSE = 1
    """Read nothing until RESUME, over restarts too."""
    RESUME = 2


class Hello(Message, frozen=True, array_like=True, gc=False):
    cluster_id: str
    node_id: str
    client_nonce: bytes


class Challenge(Message, frozen=True, array_like=True, gc=False):
    server_nonce: bytes
    incarnation: int
    proof: bytes
    """HMAC-SHA256 over ("server", cluster, node, incarnation, both nonces)."""


class Prove(Message, frozen=True, array_like=True, gc=False):
    proof: bytes
    """HMAC-SHA256 over ("client", cluster, node, incarnation, both nonces)."""


class Welcome(Message, frozen=True, array_like=True, gc=False):
    incarnation: int


class PutRequest(Message, frozen=True, array_like=True, gc=False):
    incarnation: int
    lengths: list[int]
    purpose: int = PutPurpose.CLIENT
    """A `PutPurpose`."""


class PutReply(Message, frozen=True, array_like=True, gc=False):
    incarnation: int
    statuses: list[int]
    """One `ItemStatus` per record; OK means durable."""


class GetRequest(Message, frozen=True, array_like=True, gc=False):
    keys: list[bytes]
    """Packed `FragmentKey`s."""


class GetReply(Message, frozen=True, array_like=True, gc=False):
    statuses: list[int]
    lengths: list[int]
    """Zero for every item whose status is not OK."""


class DeleteRequest(Message, frozen=True, array_like=True, gc=False):
    incarnation: int
    keys: list[bytes]


class DeleteReply(Message, frozen=True, array_like=True, gc=False):
    statuses: list[int]


class LeaseRequest(Message, frozen=True, array_like=True, gc=False):
    incarnation: int
    lease_ms: int


class LeaseReply(Message, frozen=True, array_like=True, gc=False):
    incarnation: int
    state: str
    detail: str
    fault: str = ""
    """A `storage_node.service_state.Fault`: what is wrong with the disk, as far as it is known."""
    free_bytes: int = -1
    """What puts of clients may still fill; -1 if the node does not know or does not say."""
    write_failures: int = 0
    """Writes that this process's disk has failed: it is open again soon after each."""


class SummaryRequest(Message, frozen=True, array_like=True, gc=False):
    pass


class ScrubProgress(Message, frozen=True, array_like=True, gc=False):
    """How far a node has read its own fragments.  Times are seconds since 1970, 0 for never."""

    pass_number: int = 0
    started: float = 0.0
    """Of the pass under way, or of the last one."""
    running: bool = False
    """A pass is under way (also while it waits for its turn, or is paused)."""
    paused: bool = False
    asked_for: bool = False
    """Begun by START, and not by the calendar."""
    bytes_per_s: int = 0
    """Rate asked for by START; zero is as fast as the disk goes, or the calendar's pace."""
    fragments_done: int = 0
    bytes_done: int = 0
    fragments_total: int = 0
    bytes_total: int = 0
    """Held when the pass began."""
    findings: int = 0
    """Fragments set aside now, whenever they were found."""
    findings_of_pass: int = 0
    ended: float = 0.0
    """When the last full pass ended."""
    index_damaged: bool = False
    """A part of the node's index cannot be read: which fragments it held, the node cannot say."""


class SpaceReport(Message, frozen=True, array_like=True, gc=False):
    """What a node may still take, bytes, by who asks; see `storage_node.space`."""

    capacity_bytes: int = 0
    used_bytes: int = 0
    """Of the capacity, deleted fragments that still take space included."""
    placement_free_bytes: int = 0
    """Until no new volume should be placed here; zero above that."""
    client_free_bytes: int = 0
    """Until puts of clients are refused."""
    repair_free_bytes: int = 0
    """Until puts of repair are refused too."""


class SummaryReply(Message, frozen=True, array_like=True, gc=False):
    state: str
    detail: str
    incarnation: int
    fragments: int
    fragment_bytes: int
    """Sum of record lengths that the index refers to."""
    disk_used_bytes: int
    disk_free_bytes: int
    """What puts of clients may still take."""
    pid: int
    counters: dict[str, Any]
    fault: str = ""
    """As in `LeaseReply`."""
    space: SpaceReport = SpaceReport()
    scrub: ScrubProgress = ScrubProgress()


class InventoryRequest(Message, frozen=True, array_like=True, gc=False):
    after: bytes
    """Packed key to continue after; empty to start."""
    limit: int


class InventoryReply(Message, frozen=True, array_like=True, gc=False):
    keys: list[bytes]
    lengths: list[int]
    more: bool


class VerifyRequest(Message, frozen=True, array_like=True, gc=False):
    keys: list[bytes]
    """Packed `FragmentKey`s."""


class VerifyReply(Message, frozen=True, array_like=True, gc=False):
    """What the node found on its disk, per key; zeroes for every item whose status is not OK."""

    statuses: list[int]
    lengths: list[int]
    epochs: list[int]
    stripe_tags: list[int]


class ScrubRequest(Message, frozen=True, array_like=True, gc=False):
    action: int
    """A `ScrubAction`."""
    bytes_per_s: int = 0
    """For START; zero is as fast as the disk goes."""


class FindingsRequest(Message, frozen=True, array_like=True, gc=False):
    after: bytes
    """Packed key to continue after; empty to start."""
    limit: int


class FindingsReply(Message, frozen=True, array_like=True, gc=False):
    """Fragments that a node has set aside, in key order."""

    keys: list[bytes]
    statuses: list[int]
    """`ItemStatus`: CORRUPT, NOT_FOUND (an index entry whose record is gone) or IO_ERROR."""
    found_at: list[float]
    """Seconds since 1970."""
    more: bool


class ErrorReply(Message, frozen=True, array_like=True, gc=False):
    kind: str
    message: str
    details: dict[str, Any]
