"""What an operator asks of the nodes' scrubbers, and how far each has come.

Called by the gateway's scrub routes.  Speaks to the nodes themselves over their data ports, all at
once, each with a deadline: one that is silent is named, and holds nobody up.  May not import Ray.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from cluster.node_pool import NodePool
from cluster.topology import NodeState, NodeView
from cluster.volume_map import VolumeMap
from protocol.errors import HaversackError, NodeNotFound
from protocol.ids import NodeId
from protocol.messages import ScrubAction, ScrubProgress

DEADLINE_S: Final = 5.0
"""An order is written to the node's disk before it is answered."""

MAP_AGE_S: Final = 1.0


class ScrubDesk:
    """Orders to scrubbers, and their answers, JSON-ready."""

    def __init__(self, volume_map: VolumeMap, pool: NodePool) -> None:
        self._map = volume_map
        self._pool = pool

    async def read(self) -> list[dict[str, Any]]:
        """Per node in id order: its progress, or why it did not tell."""
        await self._map.refresh(MAP_AGE_S)
        nodes = self._chosen(())
        return list(await asyncio.gather(*(self._look(node) for node in nodes)))

    async def order(
        self, action: ScrubAction, names: Sequence[str], bytes_per_s: int
    ) -> list[dict[str, Any]]:
        """Give an order to some nodes, or to all for none named; what each answered.

        Raises `NodeNotFound` before anything is ordered.
        """
        await self._map.refresh(MAP_AGE_S)
        nodes = self._chosen(names)
        return list(
            await asyncio.gather(*(self._give(node, action, bytes_per_s) for node in nodes))
        )

    def _chosen(self, names: Sequence[str]) -> list[NodeView]:
        members = {
            str(node.node_id): node
            for node in self._map.nodes()
            if node.state is not NodeState.GONE
        }
        for name in names:
            if name not in members:
                raise NodeNotFound(f"no node {name!r} in this cell", {"node": name})
        return [members[name] for name in sorted(set(names) or members)]

    async def _look(self, node: NodeView) -> dict[str, Any]:
        try:
            summary = await self._pool.port(node.node_id).summary(DEADLINE_S)
        except HaversackError as error:
            return _silent(node.node_id, error)
        return _answer(node.node_id, summary.scrub)

    async def _give(self, node: NodeView, action: ScrubAction, bytes_per_s: int) -> dict[str, Any]:
        try:
            port = self._pool.port(node.node_id)
            progress = await port.scrub(action, bytes_per_s, DEADLINE_S)
        except HaversackError as error:
            return _silent(node.node_id, error)
        return _answer(node.node_id, progress)


def _answer(node_id: NodeId, progress: ScrubProgress) -> dict[str, Any]:
    return {"node": str(node_id), "error": "", "scrub": msgspec.structs.asdict(progress)}


def _silent(node_id: NodeId, error: HaversackError) -> dict[str, Any]:
    return {"node": str(node_id), "error": error.message, "scrub": None}
