"""What the block index asks of SQL; `block_sql_sqlite` and `block_sql_portable` answer it.

Called by `block_index` inside its transactions.  Functions over a connection; no event loop, no
clock, no Ray.

The SQLite way exists because Python's SQLite module gives the interpreter lock away at every row
it binds or fetches, and gets it back only when the event loop's thread lets go: beside a busy loop
4,096 fetched rows took 3 s, the same rows folded into one text 19 ms (`docs/design/008`).  So a
batch goes in as one blob of hashes and one JSON text, and comes back as one row.  Both ways are
held to the same tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol

from sqlalchemy import Connection

from protocol.ids import BlockHash, NodeId, VolumeId

LIVE: Final = 0
"""State of a block that may be read and referenced: the only one so far.  Append-only numbers."""


class BlockValues(NamedTuple):
    """A row of `blocks`, without what the transaction adds."""

    hash: BlockHash
    volume: VolumeId
    stored_bytes: int
    plain_bytes: int
    owner: int


class FoundRows(NamedTuple):
    """Columns of the rows that a lookup found, all of one length."""

    positions: list[int]
    volumes: list[int]
    stored_bytes: list[int]
    plain_bytes: list[int]


class Fence(NamedTuple):
    """What a volume's receipts are compared with."""

    epoch: int
    slots: tuple[tuple[int, NodeId | None, int], ...]
    """(slot, node, the node's incarnation) in slot order; incarnation -1 for a vacant slot."""


class Growth(NamedTuple):
    """What a transaction adds to one volume's counters."""

    volume: VolumeId
    blocks: int
    stored_bytes: int
    plain_bytes: int


class Debt(NamedTuple):
    """A fragment that nobody acknowledged."""

    volume: VolumeId
    slot: int
    hash: BlockHash


class BlockSql(Protocol):
    """The statements.  A `position` is an index into the given hashes, which are distinct and
    sorted; instants are wall-clock seconds."""

    def lookup(self, connection: Connection, hashes: Sequence[BlockHash]) -> FoundRows:
        """Each live block."""
        ...

    def claim_life(
        self,
        connection: Connection,
        owner: int,
        hashes: Sequence[BlockHash],
        created_after: float,
        expires_after: float,
    ) -> tuple[list[int], list[int]]:
        """Positions of live blocks that `owner` claims by a put after `created_after` or by a claim
        lasting beyond `expires_after`; and positions of the other live blocks."""
        ...

    def write_claims(
        self,
        connection: Connection,
        rows: Sequence[tuple[int, BlockHash]],
        created_after: float,
        renew_before: float,
        expires: float,
    ) -> None:
        """Claims for (owner, live block) pairs, sorted, unless the owner's put made the row after
        `created_after`, or its claim lasts beyond `renew_before`."""
        ...

    def compare(
        self, connection: Connection, hashes: Sequence[BlockHash], volume_ids: Sequence[VolumeId]
    ) -> tuple[set[int], dict[VolumeId, Fence]]:
        """Positions of the live blocks, and the fences of the volumes that exist."""
        ...

    def insert_blocks(
        self, connection: Connection, rows: Sequence[BlockValues], created: float
    ) -> set[BlockHash]:
        """Insert rows, sorted by hash, that `compare` did not find, and return those inserted: all,
        unless another transaction came first.  A row that exists stays as it is."""
        ...

    def grow(self, connection: Connection, growths: Sequence[Growth]) -> None:
        """Add to the counters of volumes."""
        ...

    def insert_debts(self, connection: Connection, rows: Sequence[Debt], since: float) -> None:
        """Write debts down; one that exists keeps its age."""
        ...
