"""Lease pushes to every node, and what their answers say about its health.

The ears of `placement_service`, which turns the events into rows.  Pure asyncio over node ports: no
SQL, no Ray.  Every node has at most one push in flight, so a slow one delays nobody.

Health is a level, not an edge: `event_for` says at any time what should happen to a node in its
present state, so an event whose transaction failed is simply seen again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from cluster.disk_reports import DiskReport
from cluster.map_rows import NodeReport
from cluster.placement_settings import PlacementSettings
from cluster.topology import NodeEvent, NodeState, NodeView, may_happen
from protocol.clock import Clock
from protocol.errors import HaversackError, StaleIncarnation
from protocol.ids import NodeId
from protocol.messages import LeaseReply
from storage_node.interface import NodePort
from storage_node.service_state import Fault, ServiceState

Ports = Callable[[NodeView], NodePort]

_DETAIL_CHARACTERS_MAX = 300
"""Of a node's own words that are kept in its row."""


_SHUNNED_STATES = frozenset({NodeState.UP, NodeState.SUSPECT, NodeState.DOWN})
"""In which a node counts as missed if no gateway reaches it."""


@dataclass(slots=True)
class _Health:
    """What is known of one node in its present incarnation."""

    view: NodeView
    heard_at: float
    """When silence began to count: the last answer, or the start of the watch."""
    answered: bool = False
    """The last push was answered by a serving node of this incarnation."""
    misses: int = 0
    refuses: bool = False
    """It answers that it does not serve its directory, or that its disk is bad."""
    disk_failed: bool = False
    """It said that its disk is bad, and has not served without that fault since."""
    is_full: bool = False
    """It has no free space, and has not had much since."""
    write_failures: int | None = None
    """How many it has counted; None before its first answer."""
    write_failed_at: float = float("-inf")
    """When it was last heard to have failed one."""
    ahead: int = 0
    """An incarnation that the node says it has, higher than its row's."""
    detail: str = ""
    shunned: str = ""
    """What gateways say if none of them reaches it; empty otherwise."""
    shunned_at: float = float("inf")
    """Since when."""
    report: NodeReport | None = None
    reported_at: float = float("-inf")
    disk: DiskReport | None = None
    """What it last said of its disk."""
    disk_stored: DiskReport | None = None
    disk_stored_at: float = float("-inf")
    port: NodePort | None = None
    push: asyncio.Task[None] | None = None


class NodeWatch:
    """One per placement service; one event loop."""

    def __init__(
        self, ports: Ports, clock: Clock, settings: PlacementSettings, wake: Callable[[], None]
    ) -> None:
        """`wake` is called when a node's health calls for a transaction."""
        self._ports = ports
        self._clock = clock
        self._settings = settings
        self._wake = wake
        self._nodes: dict[NodeId, _Health] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._lost_not_before = clock.monotonic() + settings.start_grace_s

    def adopt(self, views: Iterable[NodeView]) -> None:
        """Take over rows as they are now in SQL.  A new incarnation or endpoint starts afresh."""
        for view in views:
            health = self._nodes.get(view.node_id)
            if health is None:
                self._nodes[view.node_id] = self._begin(view)
            elif _same_life(health.view, view):
                health.view = view
            elif view.incarnation >= health.view.incarnation:  # else it was read before the other
                self._retire(health)
                self._nodes[view.node_id] = self._begin(view)

    def _begin(self, view: NodeView) -> _Health:
        now = self._clock.monotonic()
        return _Health(view, heard_at=now, disk_failed=view.disk_failed)

    def views(self) -> tuple[NodeView, ...]:
        """Rows as last adopted, in id order."""
        return tuple(self._nodes[node_id].view for node_id in sorted(self._nodes))

    def answers(self, node_id: NodeId) -> bool:
        """Whether a process of the node served it at the last push."""
        health = self._nodes.get(node_id)
        return health is not None and health.answered

    # -- pushing -------------------------------------------------------------------------------

    def push_due(self) -> None:
        """Start a push to every node that has none in flight."""
        for node_id in sorted(self._nodes):
            health = self._nodes[node_id]
            if health.push is not None and health.push.done():
                health.push.result()  # a push ends by an error only through a mistake of ours
                health.push = None
            if health.push is None and health.view.endpoint and _is_watched(health.view):
                health.push = asyncio.get_running_loop().create_task(self._push(health))

    async def push_now(self, node_id: NodeId) -> None:
        """Push one node's lease and wait for its answer, whatever it is."""
        health = self._nodes[node_id]
        if health.push is None or health.push.done():
            health.push = asyncio.get_running_loop().create_task(self._push(health))
        await asyncio.wait([health.push])

    async def settle(self) -> None:
        """Wait for the pushes in flight; each ends by its deadline."""
        pushes = [health.push for health in self._nodes.values() if health.push is not None]
        if pushes:
            await asyncio.wait(pushes)

    async def _push(self, health: _Health) -> None:
        deadline_s = self._settings.call_deadline_s
        if health.port is None:
            health.port = self._ports(health.view)
        try:
            async with asyncio.timeout(deadline_s):
                reply = await health.port.lease(
                    health.view.incarnation, self._settings.lease_s, deadline_s
                )
            self._heard(health, reply)
            if self._clock.monotonic() - health.reported_at >= self._settings.report_interval_s:
                async with asyncio.timeout(deadline_s):
                    await self._ask_report(health, health.port, deadline_s)
        except StaleIncarnation as error:
            ahead = error.details.get("incarnation")
            health.ahead = ahead if isinstance(ahead, int) else 0
            self._missed(health, error.message)
        except HaversackError as error:
            self._missed(health, error.message)
        except TimeoutError:
            self._missed(health, f"no answer within {deadline_s:g} s")
        disk_news = health.disk_failed != health.view.disk_failed
        if self.event_for(health.view.node_id) is not None or self._is_ahead(health) or disk_news:
            self._wake()

    def _heard(self, health: _Health, reply: LeaseReply) -> None:
        was_unwritable = self._is_unwritable(health)
        self._note_writes(health, reply)
        if self._is_unwritable(health) and not was_unwritable:
            self._wake()
        health.refuses = reply.state == ServiceState.REFUSING or reply.fault == Fault.DISK
        if reply.fault == Fault.DISK:
            # It may go on serving reads; it is down all the same, so that nobody relies on it.
            health.disk_failed = True
            self._missed(health, f"its disk is bad: {reply.detail or reply.state}")
            return
        if reply.state != ServiceState.SERVING or reply.incarnation != health.view.incarnation:
            self._missed(health, f"{reply.state}: {reply.detail}" if reply.detail else reply.state)
            return
        health.answered = True
        health.disk_failed = False
        health.misses = 0
        health.heard_at = self._clock.monotonic()
        health.detail = reply.detail

    def _note_writes(self, health: _Health, reply: LeaseReply) -> None:
        """Whether it could take writes, whatever it says of reads."""
        known, health.write_failures = health.write_failures, reply.write_failures
        if reply.state == ServiceState.FAILED or (
            known is not None and reply.write_failures > known
        ):
            health.write_failed_at = self._clock.monotonic()
        if reply.free_bytes >= 0:
            room = min(self._settings.room_bytes_min, health.view.capacity_bytes // 16)
            health.is_full = reply.free_bytes < (room if health.is_full else 1)

    def _missed(self, health: _Health, detail: str) -> None:
        health.answered = False
        health.misses += 1
        health.detail = detail[:_DETAIL_CHARACTERS_MAX]

    async def _ask_report(self, health: _Health, port: NodePort, deadline_s: float) -> None:
        summary = await port.summary(deadline_s)
        health.reported_at = self._clock.monotonic()
        health.report = NodeReport(
            health.view.node_id,
            free_bytes=summary.disk_free_bytes,
            used_bytes=summary.fragment_bytes,
            fragments=summary.fragments,
            placement_free_bytes=(
                summary.space.placement_free_bytes if summary.space.capacity_bytes else -1
            ),
        )
        health.disk = DiskReport(health.view.node_id, summary.space, summary.scrub)

    # -- what gateways say -----------------------------------------------------------------------

    def shun(self, unreachable: Mapping[NodeId, str]) -> None:
        """No gateway reaches these nodes, and why; some gateway reaches all others, or none says
        anything of them."""
        for node_id, health in self._nodes.items():
            said = unreachable.get(node_id, "")
            if said and not health.shunned:
                health.shunned_at = self._clock.monotonic()
            health.shunned = said

    # -- what it means ---------------------------------------------------------------------------

    def event_for(self, node_id: NodeId) -> NodeEvent | None:
        """What should happen to a node now, given the state that was adopted last."""
        health = self._nodes[node_id]
        state = health.view.state
        now = self._clock.monotonic()
        # A node that is being emptied takes no writes anyway: what gateways say changes nothing.
        shunned = bool(health.shunned) and state in _SHUNNED_STATES
        answered = health.answered and not shunned
        bad_since = min(
            now if health.answered else health.heard_at, health.shunned_at if shunned else now
        )
        lost = now - bad_since >= self._settings.down_after_s and now >= self._lost_not_before
        missed = health.misses >= self._settings.misses_until_suspect or shunned
        for holds, event in (
            (health.refuses, NodeEvent.DISK_FAILED),
            (answered, NodeEvent.ANSWERED),
            (missed, NodeEvent.MISSED),
            (lost and not answered, NodeEvent.LOST),
        ):
            if holds and may_happen(state, event):
                return event
        return None

    def disk_verdicts(self) -> dict[NodeId, bool]:
        """Nodes whose rows do not say what they say of their disks: True for a bad one."""
        return {
            node_id: health.disk_failed
            for node_id, health in self._nodes.items()
            if health.disk_failed != health.view.disk_failed and _is_watched(health.view)
        }

    def detail_of(self, node_id: NodeId) -> str:
        """What the last push told, and gateways if they alone miss the node, for its row."""
        health = self._nodes[node_id]
        if health.shunned and health.answered and health.view.state in _SHUNNED_STATES:
            said = f"it answers the placement service, but {health.shunned}"
            return said[:_DETAIL_CHARACTERS_MAX]
        return health.detail

    def ahead(self) -> dict[NodeId, int]:
        """Nodes that hold a higher incarnation than their rows: `cell.db` was set back in time."""
        return {
            node_id: health.ahead
            for node_id, health in self._nodes.items()
            if self._is_ahead(health)
        }

    def unwritable(self) -> frozenset[NodeId]:
        """Nodes that answer and take no writes, as they say themselves: their states stay, since
        they serve reads, and new volumes do without them."""
        return frozenset(
            node_id for node_id, health in self._nodes.items() if self._is_unwritable(health)
        )

    def _is_unwritable(self, health: _Health) -> bool:
        failed_s = self._clock.monotonic() - health.write_failed_at
        return health.is_full or failed_s < self._settings.write_failed_s

    def all_heard(self) -> bool:
        """Whether every node that could serve has answered since the watch began, or is down."""
        return all(
            health.answered
            for health in self._nodes.values()
            if _is_watched(health.view) and health.view.state is not NodeState.DOWN
        )

    def changed_reports(self) -> list[NodeReport]:
        """Reports that differ from the rows."""
        return [
            health.report
            for health in self._nodes.values()
            if health.report is not None and _differs(health.report, health.view)
        ]

    def disk_reports_due(self) -> list[DiskReport]:
        """Reports of disks to be stored now."""
        due_before = self._clock.monotonic() - self._settings.disk_report_interval_s
        return [
            health.disk
            for health in self._nodes.values()
            if health.disk is not None and _is_worth_storing(health, health.disk, due_before)
        ]

    def disk_reports_stored(self, reports: Iterable[DiskReport]) -> None:
        """These are in SQL."""
        now = self._clock.monotonic()
        for report in reports:
            health = self._nodes.get(report.node_id)
            if health is not None:
                health.disk_stored, health.disk_stored_at = report, now

    # -- end -------------------------------------------------------------------------------------

    async def aclose(self) -> None:
        """Stop pushing and close every port.  Idempotent."""
        for health in self._nodes.values():
            self._retire(health)
        self._nodes.clear()
        while self._closing:
            await asyncio.wait(self._closing)

    def _is_ahead(self, health: _Health) -> bool:
        return health.ahead > health.view.incarnation

    def _retire(self, health: _Health) -> None:
        """Drop what belongs to an earlier life, in the background."""
        if health.push is not None:
            health.push.cancel()
        if health.port is not None:
            task = asyncio.get_running_loop().create_task(health.port.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)


def _is_watched(view: NodeView) -> bool:
    return view.state is not NodeState.GONE


def _same_life(held: NodeView, new: NodeView) -> bool:
    return (held.incarnation, held.endpoint) == (new.incarnation, new.endpoint)


def _is_worth_storing(health: _Health, disk: DiskReport, due_before: float) -> bool:
    stored = health.disk_stored
    if stored is None or disk.differs_in_kind(stored):
        return True
    return disk != stored and health.disk_stored_at <= due_before


def _differs(report: NodeReport, view: NodeView) -> bool:
    held = NodeReport(
        view.node_id,
        view.free_bytes,
        view.used_bytes,
        view.fragments,
        view.placement_free_bytes,
    )
    return held != report
