"""Ports to nodes for work that takes long: connected when needed, asked again a few times.

Called by the passes of the verifier.  Asyncio over `NodePort`; no SQL, no Ray.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import TypeVar

from cluster.node_watch import Ports
from cluster.topology import NodeView
from cluster.verify.settings import VerifierSettings
from protocol.clock import Clock
from protocol.errors import HaversackError, NodeUnavailable, RetryLater
from protocol.ids import BlockHash, NodeId, VolumeId
from protocol.messages import FindingsReply, InventoryReply
from storage_node.interface import FragmentKey, NodePort, VerifiedRecord

T = TypeVar("T")

_LAST_KEY_OF = (BlockHash(b"\xff" * 32), 255)


class NodePorts:
    """One connection per node and endpoint.  One event loop; close it after the last call."""

    def __init__(self, ports: Ports, clock: Clock, settings: VerifierSettings) -> None:
        self._connect = ports
        self._clock = clock
        self._settings = settings
        self._views: dict[NodeId, NodeView] = {}
        self._open: dict[NodeId, tuple[str, NodePort]] = {}

    async def adopt(self, views: Iterable[NodeView]) -> None:
        """Take over rows as they are now in SQL; connections to earlier endpoints are closed."""
        self._views = {view.node_id: view for view in views}
        for node, (endpoint, port) in list(self._open.items()):
            view = self._views.get(node)
            if view is None or view.endpoint != endpoint:
                del self._open[node]
                await port.close()

    def incarnation(self, node: NodeId) -> int:
        """Of the row last adopted."""
        return self._views[node].incarnation

    def port(self, node: NodeId) -> NodePort:
        """A connection to a node.  Raises `NodeUnavailable` if nobody knows where it is."""
        view = self._views.get(node)
        if view is None or not view.endpoint:
            raise NodeUnavailable(f"{node} has not said where it is", {"node": str(node)})
        held = self._open.get(node)
        if held is None or held[0] != view.endpoint:
            held = self._open[node] = (view.endpoint, self._connect(view))
        return held[1]

    async def inventory(
        self, node: NodeId, after_volume: int, last_volume: int
    ) -> AsyncIterator[InventoryReply]:
        """Pages of what a node holds of the volumes after one and up to another, in key order.

        Raises what the node's last answer was if a page cannot be had: then nothing is known of
        the rest.
        """
        after = FragmentKey(VolumeId(after_volume), *_LAST_KEY_OF) if after_volume >= 0 else None
        end = (last_volume + 1).to_bytes(8, "big")
        while True:
            page = await self._again(node, partial(self._page, after))
            inside = sum(1 for key in page.keys if key[:8] < end) if page.keys else 0
            if inside < len(page.keys):
                yield InventoryReply(page.keys[:inside], page.lengths[:inside], False)
                return
            yield page
            if not page.more or not page.keys:
                return
            after = FragmentKey.unpack(page.keys[-1])

    async def verify(self, node: NodeId, keys: Sequence[FragmentKey]) -> list[VerifiedRecord]:
        """Have a node read records.  Raises what its last answer was."""
        return await self._again(node, lambda port: port.verify(keys, self._settings.call_s))

    async def findings(self, node: NodeId, after: FragmentKey | None) -> FindingsReply:
        """A page of what a node has set aside as bad.  Raises what its last answer was."""
        page, call_s = self._settings.findings_page, self._settings.call_s
        return await self._again(node, lambda port: port.findings(after, page, call_s))

    async def aclose(self) -> None:
        """Close all connections.  Idempotent."""
        held, self._open = self._open, {}
        for _, port in held.values():
            await port.close()

    async def _page(self, after: FragmentKey | None, port: NodePort) -> InventoryReply:
        return await port.inventory(
            after, self._settings.inventory_page_keys, self._settings.call_s
        )

    async def _again(self, node: NodeId, call: Callable[[NodePort], Awaitable[T]]) -> T:
        attempts = 0
        while True:
            try:
                return await call(self.port(node))
            except RetryLater:
                attempts += 1
                if attempts >= self._settings.call_attempts:
                    raise
            await self._clock.sleep(self._settings.retry_pause_s)


def reason_of(error: HaversackError) -> str:
    """Why a node could not be looked at, for people."""
    return f"{error.kind}: {error.message}"[:200]
