"""Which blocks an account may read, name or learn of: those its namespace references, and those it
holds a claim to.  The hash alone gives no right.

Step 2 of a get, of a check and of a fetch.  Called by `block_routes`, `batch_routes` and
`metadata_routes`.  The same look-ups are made whatever the answer will be, and never one into the
block index by a hash that is not the caller's: an unknown block and another account's block take
the same way through the code, and the same time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from cluster.block_index import BlockIndex
from metadata.accounts import Account
from metadata.tree import Tree
from protocol.ids import BlockHash


class Authority:
    """Asks both databases."""

    def __init__(self, tree: Tree, index: BlockIndex) -> None:
        self._tree = tree
        self._index = index

    async def among(self, account: Account, hashes: Sequence[BlockHash]) -> set[BlockHash]:
        """Those of `hashes` that the account may know of: two queries, at the same time."""
        referenced, claimed = await asyncio.gather(
            self._tree.references(account, hashes), self._index.claimed(account.id, hashes)
        )
        return referenced | claimed

    async def covers(self, account: Account, block: BlockHash) -> bool:
        """Whether the account may know of one block."""
        return block in await self.among(account, (block,))

    async def claims_needed(self, account: Account, hashes: Sequence[BlockHash]) -> set[BlockHash]:
        """For a commit: the claims to those of `hashes` that the namespace does not reference."""
        referenced = await self._tree.references(account, hashes)
        others = [block for block in hashes if block not in referenced]
        return await self._index.claimed(account.id, others) if others else set()
