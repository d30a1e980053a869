"""Rows of the block index that a gateway has seen lately (step 1 of the life of a get).

A block's bytes never change and its volume hardly ever does, so a row may be kept until a
fragment is not found where it says.  Called by `block_client`, `put_path` and `get_path`; reads
through `BlockIndex` only.
"""

from __future__ import annotations

from collections.abc import Sequence

from cluster.block_index import BlockIndex, BlockRow
from protocol.ids import BlockHash


class BlockRows:
    """A bounded least-recently-used cache in front of `BlockIndex.lookup`.

    Knows nothing about absence: a block that is missing is asked for again each time.
    """

    def __init__(self, index: BlockIndex, rows_max: int) -> None:
        assert rows_max > 0
        self._index = index
        self._rows_max = rows_max
        self._rows: dict[BlockHash, BlockRow] = {}

    async def find(self, hashes: Sequence[BlockHash]) -> dict[BlockHash, BlockRow]:
        """The rows of those that exist.  Does not suspend when all are cached.

        Raises `DatabaseBusy`.
        """
        found: dict[BlockHash, BlockRow] = {}
        unknown: list[BlockHash] = []
        for block in hashes:
            row = self._rows.pop(block, None)
            if row is None:
                unknown.append(block)
            else:
                self._rows[block] = found[block] = row  # now the youngest
        if unknown:
            looked_up = await self._index.lookup(unknown)
            for block in unknown:
                row = looked_up.get(block)
                if row is not None:
                    found[block] = row
                    self.learn(row)
        return found

    def learn(self, row: BlockRow) -> None:
        """Remember a row that the index holds."""
        self._rows.pop(row.hash, None)
        self._rows[row.hash] = row
        if len(self._rows) > self._rows_max:
            del self._rows[next(iter(self._rows))]

    def forget(self, block: BlockHash) -> None:
        """Ask the index next time."""
        self._rows.pop(block, None)
