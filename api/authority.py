"""Which blocks an account may read, name or learn of: those its namespace references, and those it
holds a claim to.  The hash alone gives no right.

Step 2 of a get, of a check and of a fetch.  Called by `block_routes`, `batch_routes` and
`metadata_routes`.  A block that does not exist and a block of another account take the same way
through the code, with the same queries: neither is referenced, neither is claimed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final, NamedTuple

from api.authentication import WATCHER
from cluster.block_index import BlockIndex
from cluster.coalescer import Coalescer
from metadata.accounts import Account
from metadata.tree import Tree
from protocol.ids import BlockHash

JOINED_MAX: Final = 512
"""Questions about single blocks that share a query."""

WAITING_MAX: Final = 16_384


class _Question(NamedTuple):
    account: Account
    block: BlockHash


class Authority:
    """Asks both databases.  Questions about single blocks that come while one is being asked are
    asked together, next: a hundred concurrent gets cost two queries, not two hundred."""

    def __init__(self, tree: Tree, index: BlockIndex) -> None:
        self._tree = tree
        self._index = index
        self._single = Coalescer[_Question, bool](self._ask, JOINED_MAX, WAITING_MAX)

    async def among(self, account: Account, hashes: Sequence[BlockHash]) -> set[BlockHash]:
        """Those of `hashes` that the account may know of.

        Few are asked of both databases at the same time; of many, the index is asked only for
        those that the namespace does not reference.
        """
        if len(hashes) <= JOINED_MAX:
            referenced, claimed = await asyncio.gather(
                self._tree.references(account, hashes), self._index.claimed(account.id, hashes)
            )
            return referenced | claimed
        referenced = await self._tree.references(account, hashes)
        others = [block for block in hashes if block not in referenced]
        return referenced | (await self._index.claimed(account.id, others) if others else set())

    async def covers(self, account: Account, block: BlockHash) -> bool:
        """Whether the account may know of one block.  Raises `Overloaded` if too many ask."""
        if account is WATCHER:
            return True
        (answer,) = await self._single.submit((_Question(account, block),))
        return answer

    async def claims_needed(self, account: Account, hashes: Sequence[BlockHash]) -> set[BlockHash]:
        """For a commit: the claims to those of `hashes` that the namespace does not reference."""
        referenced = await self._tree.references(account, hashes)
        others = [block for block in hashes if block not in referenced]
        return await self._index.claimed(account.id, others) if others else set()

    async def _ask(self, questions: list[_Question]) -> list[bool]:
        by_account: dict[Account, list[BlockHash]] = {}
        for account, block in questions:
            by_account.setdefault(account, []).append(block)
        known: dict[Account, set[BlockHash]] = {}
        for account, blocks in by_account.items():
            known[account] = await self.among(account, blocks)
        return [block in known[account] for account, block in questions]
