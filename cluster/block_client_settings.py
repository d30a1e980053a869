"""What an operator or a test may set about the block client, and the types it talks in.

Imported by `block_client` and its parts; imports nothing that does I/O.
"""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from erasure.scheme import Scheme
from protocol.ids import BlockHash, NodeId, VolumeId
from protocol.limits import (
    BATCH_BODY_BYTES_MAX,
    BLOCK_ROWS_CACHED_MAX,
    GATEWAY_GET_BYTES_MAX,
    GATEWAY_PUT_BYTES_MAX,
)

Run: TypeAlias = Callable[..., Awaitable[Any]]
"""`await run(function, *args)`: calls a function that computes for long, off the event loop."""


@dataclass(frozen=True, slots=True)
class BlockClientSettings:
    """Bounds of one block client.  Times are seconds."""

    scheme: Scheme
    """Of blocks from `SMALL_BLOCK_BYTES` on; smaller ones go to its small twin."""
    compress: bool = True
    put_bytes_max: int = GATEWAY_PUT_BYTES_MAX
    get_bytes_max: int = GATEWAY_GET_BYTES_MAX
    rows_cached_max: int = BLOCK_ROWS_CACHED_MAX
    queue_s: float = 10.0
    """How long a request waits for its share of the byte budget."""
    map_age_s: float = 1.0
    """How old the volume map may be when an operation starts."""
    put_s: float = 30.0
    """One put with all its retries."""
    put_slot_s: float = 8.0
    """One node's answer to a put: a busy disk syncs within seconds, a stopped one never."""
    put_attempts_max: int = 5
    """Volumes tried for one block."""
    placement_wait_s: float = 12.0
    """How long a put waits for a volume with `write_minimum` healthy nodes at least."""
    debts_after_s: float = 8.0
    """How long puts look and wait for a volume on healthy nodes alone before they leave debts: the
    placement service believes within this that a node is down, and a debt costs a repair."""
    placement_poll_s: float = 0.1
    retry_pause_s: float = 0.1
    """Before the same nodes are tried again: a busy one, or a map that did not change yet."""
    put_group_bytes_max: int = BATCH_BODY_BYTES_MAX
    """Stored bytes of blocks that go to one volume together: bounds a frame of a replica slot."""
    get_s: float = 15.0
    """One get with all its retries."""
    get_slot_s: float = 5.0
    """One node's answer to a get; hedging is what keeps users from waiting that long."""
    get_attempts_max: int = 3
    """How often a get starts again with a newer map."""
    single_reads_max: int = 16
    """Blocks of one `get_many` that are read one by one at the same time."""


class PutResult(NamedTuple):
    """A block that is durable and that the caller has a claim to."""

    new: bool
    """False if it was in the store already."""
    stored_bytes: int
    """After the envelope, before coding."""
    degraded: bool
    """True if some slots are still owed: repair knows."""


class ProblemKind(enum.StrEnum):
    """What a get found wrong with one fragment."""

    MISSING = "missing"
    """The node looked and does not hold it."""
    CORRUPT = "corrupt"
    """It failed a checksum or is not the fragment that was asked for."""
    IO_ERROR = "io_error"
    """The disk could not read it: says nothing about whether it exists."""
    LIAR = "liar"
    """Its checksums are right and the block's SHA-256 proves it wrong."""


class FragmentProblem(NamedTuple):
    """One fragment that a get could not use, for repair to look at."""

    kind: ProblemKind
    block: BlockHash
    volume: VolumeId
    epoch: int
    """Of the volume as the get knew it."""
    slot: int
    node_id: NodeId
    detail: str


ReportFragment: TypeAlias = Callable[[FragmentProblem], None]


def ignore_problem(_problem: FragmentProblem) -> None:
    """For clients without a repair service behind them."""
