"""The block index: which blocks exist, in which volume, and who may reference them
(steps 2 and 5 of a put, step 1 of a get, all of a check).

Called by `block_client` and `api`.  Reads and writes `cell.db` through `sql.database`; may not
import the placement service, a node port or Ray.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from protocol.clock import Clock
from protocol.ids import BlockHash, NodeId, VolumeId
from sql.database import Database


class BlockRow(NamedTuple):
    """One live block of the index."""

    hash: BlockHash
    volume: VolumeId
    stored_bytes: int
    plain_bytes: int


class Receipt(NamedTuple):
    """A node's word that it holds a slot durably, and in which of its lives it gave it."""

    slot: int
    node_id: NodeId
    incarnation: int


class NewBlock(NamedTuple):
    """A block whose fragments are durable, to be made known by `record_puts`."""

    hash: BlockHash
    owner: int
    """Account that sent the bytes: gets the claim."""
    volume: VolumeId
    epoch: int
    """The volume's epoch that the fragments were written under."""
    stored_bytes: int
    plain_bytes: int
    receipts: tuple[Receipt, ...]
    missing_slots: tuple[int, ...] = ()
    """Slots that nobody acknowledged: become debts.  With the receipts they name every slot once."""


class RecordOutcome(enum.Enum):
    """What became of one `NewBlock`."""

    NEW = "new"
    EXISTS = "exists"
    """Known already, perhaps in another volume; the owner has a claim now all the same."""
    FENCED = "fenced"
    """A receipt is from another incarnation, or the volume moved on: nothing was recorded.
    Refresh the map, write the block again."""


class Totals(NamedTuple):
    """Sums over all live blocks."""

    blocks: int
    plain_bytes: int
    stored_bytes: int
    """After the envelope, before coding."""


class BlockIndex:
    """One per process and event loop.  All methods may raise `DatabaseBusy` (nothing was done)."""

    def __init__(self, db: Database, clock: Clock) -> None:
        raise NotImplementedError

    async def lookup(self, hashes: Sequence[BlockHash]) -> dict[BlockHash, BlockRow]:
        """The rows of those that exist, in no particular order; any number of hashes."""
        raise NotImplementedError

    async def claimed(self, owner: int, hashes: Sequence[BlockHash]) -> set[BlockHash]:
        """Those that `owner` holds a live claim to."""
        raise NotImplementedError

    async def claim(self, owner: int, hashes: Sequence[BlockHash]) -> set[BlockHash]:
        """Claim those that exist and return them, for at least half of `CLAIM_SECONDS` from now.

        The caller has decided that `owner` may know of each.  Existence and claim are one
        transaction; nothing is written for claims with more than half of their life left.
        """
        raise NotImplementedError

    async def record_puts(self, entries: Sequence[NewBlock]) -> list[RecordOutcome]:
        """Make blocks known, durably, one outcome per entry in order.

        One transaction, shared with other calls that are waiting; it compares every receipt with
        the node and volume tables, inserts first-wins, and writes claims, debts and volume
        counters.  Raises `UnknownOutcome` if the commit's own result is not known: look the
        blocks up before writing them again.
        """
        raise NotImplementedError

    async def totals(self) -> Totals:
        """Sums from the volume counters: cheap."""
        raise NotImplementedError

    async def debts(self) -> int:
        """Fragments known to be missing."""
        raise NotImplementedError


def unique_sorted(hashes: Iterable[BlockHash]) -> list[BlockHash]:
    """Each once, in key order: neighbours share index pages."""
    return sorted(set(hashes))
