"""The cached map volume -> nodes -> endpoints (step 3 of a put, step 2 of a get).

Called by `block_client` and `node_pool` in a gateway.  Reads `cell.db` only; may not import
the placement service, the block index or Ray.  A gateway goes on with its cached map while the
placement service is away.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Final, NamedTuple

from sqlalchemy import Connection

from cluster import map_rows
from cluster.topology import NodeView, VolumeState, VolumeView
from erasure.scheme import Scheme
from protocol.clock import Clock
from protocol.errors import NeedsRepair, NodeUnavailable
from protocol.ids import NodeId, VolumeId
from sql.database import Database

CACHED_VOLUMES_MAX: Final = 65_536
"""Volumes kept besides the open ones: 64 TiB of stored blocks in some 30 MB."""


class _Change(NamedTuple):
    """What one refresh read in one snapshot."""

    version: int
    nodes: list[NodeView]
    open_volumes: list[VolumeView]
    changed: list[VolumeId]
    scheme: Scheme | None


class VolumeMap:
    """Nodes and open volumes, always in memory; other volumes loaded when asked for and kept.

    One event loop.  Every change of the map that matters to a client (a node's state, incarnation
    or endpoint, a volume's slots, epoch or state) raises the version row in its own transaction,
    and `refresh` reads only what changed since the version it holds.
    """

    def __init__(
        self, db: Database, clock: Clock, cached_volumes_max: int = CACHED_VOLUMES_MAX
    ) -> None:
        self._db = db
        self._clock = clock
        self._cached_volumes_max = cached_volumes_max
        self._version = 0
        self._read_at = float("-inf")
        self._nodes: dict[NodeId, NodeView] = {}
        self._volumes: dict[VolumeId, VolumeView] = {}
        self._open: dict[Scheme, tuple[VolumeView, ...]] = {}
        self._scheme: Scheme | None = None
        self._refreshing: asyncio.Task[bool] | None = None
        self._refresh_began = float("-inf")

    @property
    def version(self) -> int:
        """The map version held; 0 before the first `refresh`."""
        return self._version

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """What new large and small blocks get, each once; empty before the first `refresh`."""
        if self._scheme is None:
            return ()
        return tuple(dict.fromkeys((self._scheme, self._scheme.small_twin())))

    async def refresh(self, max_age_s: float = 0.0) -> bool:
        """Bring the map up to date unless it is younger than `max_age_s`; True if it changed.

        One small query when the version row is unchanged; concurrent callers share one query, but
        never one that began before the caller's patience allows.  Call it with about a second at
        the start of an operation, and with zero after a node answered STALE_EPOCH or a stale
        incarnation, or after FENCED.  Raises `DatabaseBusy`.
        """
        asked = self._clock.monotonic()
        if asked - self._read_at < max_age_s:
            return False
        before = self._version
        while True:
            task = self._refreshing
            # A task that is done and whose callback has not run yet answers without suspending:
            # waiting for it again and again would never let that callback run.
            if task is None or task.done():
                self._refresh_began = self._clock.monotonic()
                task = asyncio.get_running_loop().create_task(self._read_changes())
                task.add_done_callback(self._refreshed)
                self._refreshing = task
            began = self._refresh_began
            await asyncio.shield(task)
            if began >= asked - max_age_s:
                return self._version != before

    def node(self, node_id: NodeId) -> NodeView:
        """The node as of the last refresh.  Raises `NodeUnavailable` for an unknown one."""
        view = self._nodes.get(node_id)
        if view is None:
            raise NodeUnavailable(f"{node_id} is not in this cell's map", {"node": str(node_id)})
        return view

    def nodes(self) -> tuple[NodeView, ...]:
        """All nodes in id order."""
        return tuple(self._nodes[node_id] for node_id in sorted(self._nodes))

    async def volume(self, volume_id: VolumeId) -> VolumeView:
        """One volume; see `volumes`.  Raises `NeedsRepair` if the table has no such volume."""
        view = self._volumes.get(volume_id)
        if view is None:
            view = (await self.volumes((volume_id,))).get(volume_id)
        if view is None:
            raise NeedsRepair(
                f"the volume table has no {volume_id}: rebuild it with haversack fsck",
                {"volume": str(volume_id)},
            )
        return view

    async def volumes(self, volume_ids: Iterable[VolumeId]) -> dict[VolumeId, VolumeView]:
        """Volumes from the cache, the others in one query; ids that do not exist are left out.

        Does not suspend when all are cached.
        """
        found: dict[VolumeId, VolumeView] = {}
        absent: list[VolumeId] = []
        for volume_id in volume_ids:
            view = self._volumes.get(volume_id)
            if view is None:
                absent.append(volume_id)
            else:
                found[volume_id] = view
        if absent:
            version, loaded = await self._db.read(
                lambda connection: (
                    map_rows.read_version(connection),
                    map_rows.read_volumes(connection, absent),
                )
            )
            for view in loaded:
                found[view.volume_id] = view
                # A refresh may have overtaken this query: what it would drop is not kept.
                if version >= self._version:
                    self._keep(view)
        return found

    def open_volumes(self, scheme: Scheme) -> tuple[VolumeView, ...]:
        """Open volumes of a scheme in id order, those with vacant slots or failed nodes included:
        the caller ranks them (`writable_slots`)."""
        return self._open.get(scheme, ())

    def writable_slots(self, volume: VolumeView) -> tuple[int, ...]:
        """Slots of a volume whose node takes writes as of the last refresh."""
        nodes = self._nodes
        return tuple(
            slot
            for slot, node_id in enumerate(volume.slots)
            if node_id is not None and (view := nodes.get(node_id)) and view.takes_writes
        )

    def healthy_domains(self) -> int:
        """How many failure domains can take a fragment now: nodes that take writes, since two
        fragments of a block never share a node (hosts and racks only spread them further)."""
        return sum(1 for view in self._nodes.values() if view.takes_writes)

    # -- refreshing ----------------------------------------------------------------------------

    async def _read_changes(self) -> bool:
        held = self._version

        def work(connection: Connection) -> _Change | None:
            version = map_rows.read_version(connection)
            if version == held:
                return None
            return _Change(
                version,
                map_rows.read_nodes(connection, held if held else -1),
                map_rows.read_open_volumes(connection),
                # A new map has nothing cached that could have changed.
                map_rows.changed_volumes(connection, held) if held else [],
                map_rows.read_scheme(connection),
            )

        began = self._clock.monotonic()
        change = await self._db.read(work)
        if change is not None:
            self._apply(change)
        self._read_at = began
        return change is not None

    def _refreshed(self, task: asyncio.Task[bool]) -> None:
        if self._refreshing is task:
            self._refreshing = None
        if not task.cancelled():
            task.exception()  # every caller has it too; none may be left when all were cancelled

    def _apply(self, change: _Change) -> None:
        """Take over a snapshot; synchronous, so no reader sees half of it."""
        for node in change.nodes:
            self._nodes[node.node_id] = node
        for volume_id in change.changed:
            self._volumes.pop(volume_id, None)
        for volumes in self._open.values():
            for volume in volumes:
                # Sealed since, or removed because it stayed empty.
                self._volumes.pop(volume.volume_id, None)
        grouped: dict[Scheme, list[VolumeView]] = {}
        for volume in change.open_volumes:
            grouped.setdefault(volume.scheme, []).append(volume)
            self._keep(volume)
        self._open = {scheme: tuple(volumes) for scheme, volumes in grouped.items()}
        self._scheme = change.scheme
        self._version = change.version

    def _keep(self, volume: VolumeView) -> None:
        if len(self._volumes) >= self._cached_volumes_max:
            self._make_room()
        self._volumes[volume.volume_id] = volume

    def _make_room(self) -> None:
        """Forget the sealed volume that was loaded first."""
        for volume_id, volume in self._volumes.items():
            if volume.state is VolumeState.SEALED:
                del self._volumes[volume_id]
                return
