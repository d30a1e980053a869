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


class SummaryRequest(Message, frozen=True, array_like=True, gc=False):
    pass


class SummaryReply(Message, frozen=True, array_like=True, gc=False):
    state: str
    detail: str
    incarnation: int
    fragments: int
    fragment_bytes: int
    """Sum of record lengths that the index refers to."""
    disk_used_bytes: int
    disk_free_bytes: int
    pid: int
    counters: dict[str, Any]


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


class ErrorReply(Message, frozen=True, array_like=True, gc=False):
    kind: str
    message: str
    details: dict[str, Any]
