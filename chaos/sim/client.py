"""`CellClient` of `chaos/workloads.py` over the simulated network.

One per user; each operation goes to a gateway drawn at random, as behind a load balancer.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from chaos.sim.cell import SimCell
from chaos.sim.network import Connection, NotSent, Unanswered
from chaos.sim.process import SimProcess
from chaos.workloads import EntrySeen, NoAnswer, NotDelivered
from protocol.errors import HaversackError
from protocol.hashing import Buffer
from protocol.ids import BlockHash

DEADLINE_S = 150.0
"""A batch may take two schemes' puts, one after the other, each with all its retries."""


class SimClient:
    """One user.  `connect` is handed to `workloads.Client`."""

    def __init__(self, cell: SimCell, name: str, owner: str, rng: random.Random) -> None:
        self._cell = cell
        self._token = cell.tokens[owner]
        self._rng = rng
        self._process = SimProcess(cell.loop, name)
        self._connections: dict[str, Connection] = {}

    async def _call(self, method: str, *args: Any) -> Any:
        gateway = self._rng.choice(list(self._cell.gateways))
        connection = self._connections.get(gateway)
        if connection is None:
            connection = Connection(self._process, f"{gateway}:1")
            self._connections[gateway] = connection
        try:
            return await self._cell.network.call(
                connection, method, (self._token, *args), DEADLINE_S
            )
        except NotSent as error:
            raise NotDelivered(str(error)) from None
        except Unanswered as error:
            raise NoAnswer(str(error)) from None

    async def put(self, data: bytes) -> None:
        await self._call("put", data)

    async def put_many(self, blocks: Sequence[bytes]) -> list[HaversackError | None]:
        results: list[HaversackError | None] = await self._call("put_many", list(blocks))
        return results

    async def get(self, block: BlockHash) -> Buffer:
        data: Buffer = await self._call("get", block)
        return data

    async def get_many(self, blocks: Sequence[BlockHash]) -> list[Buffer | HaversackError]:
        results: list[Buffer | HaversackError] = await self._call("get_many", list(blocks))
        return results

    async def check(self, blocks: Sequence[BlockHash]) -> set[BlockHash]:
        found: set[BlockHash] = await self._call("check", list(blocks))
        return found

    async def commit(
        self, path: str, blocks: tuple[BlockHash, ...], size: int, parent_rev: str | None
    ) -> str:
        rev: str = await self._call("commit", path, blocks, size, parent_rev)
        return rev

    async def entry(self, path: str) -> EntrySeen:
        seen: EntrySeen = await self._call("entry", path)
        return seen

    async def delete(self, path: str, parent_rev: str | None) -> None:
        await self._call("delete", path, parent_rev)
