"""The cached map volume -> nodes -> endpoints (step 3 of a put, step 2 of a get).

Called by `block_client` and `node_pool` in a gateway.  Reads `cell.db` only; may not import
the placement service, the block index or Ray.  A gateway goes on with its cached map while the
placement service is away.
"""

from __future__ import annotations

from collections.abc import Iterable

from cluster.topology import NodeView, VolumeView
from erasure.scheme import Scheme
from protocol.clock import Clock
from protocol.ids import NodeId, VolumeId
from sql.database import Database


class VolumeMap:
    """Nodes and open volumes, always in memory; other volumes loaded when asked for and kept.

    One event loop.  Every change of the map that matters to a client (a node's state, incarnation
    or endpoint, a volume's slots, epoch or state) raises the version row in its own transaction,
    and `refresh` reads only what changed since the version it holds.
    """

    def __init__(self, db: Database, clock: Clock) -> None:
        raise NotImplementedError

    @property
    def version(self) -> int:
        """The map version held; 0 before the first `refresh`."""
        raise NotImplementedError

    async def refresh(self, max_age_s: float = 0.0) -> bool:
        """Bring the map up to date unless it was read less than `max_age_s` ago; True if it changed.

        One small query when the version row is unchanged; concurrent callers share one query.
        Call it with about a second at the start of an operation, and with zero after a node
        answered STALE_EPOCH or a stale incarnation, or after FENCED.  Raises `DatabaseBusy`.
        """
        raise NotImplementedError

    def node(self, node_id: NodeId) -> NodeView:
        """The node as of the last refresh.  Raises `NodeUnavailable` for one the map does not know."""
        raise NotImplementedError

    def nodes(self) -> tuple[NodeView, ...]:
        """All nodes in id order."""
        raise NotImplementedError

    async def volume(self, volume_id: VolumeId) -> VolumeView:
        """One volume; see `volumes`.  Raises `NeedsRepair` if the table has no such volume."""
        raise NotImplementedError

    async def volumes(self, volume_ids: Iterable[VolumeId]) -> dict[VolumeId, VolumeView]:
        """Volumes from the cache, the others in one query; ids that do not exist are left out.

        Does not suspend when all are cached.
        """
        raise NotImplementedError

    def open_volumes(self, scheme: Scheme) -> tuple[VolumeView, ...]:
        """Open volumes of a scheme in id order, those with vacant slots or failed nodes included:
        the caller ranks them (`writable_slots`)."""
        raise NotImplementedError

    def writable_slots(self, volume: VolumeView) -> tuple[int, ...]:
        """Slots of a volume whose node takes writes as of the last refresh."""
        raise NotImplementedError

    def healthy_domains(self) -> int:
        """How many failure domains can take a fragment now: nodes that take writes, since two
        fragments of a block never share a node (hosts and racks only spread them further)."""
        raise NotImplementedError
