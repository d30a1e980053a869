"""Tells the cell what one gateway sees of nodes in trouble, and looks again at what others say.

One task per gateway, beside its requests.  Each look: which nodes does this gateway suspect, which
does another gateway call unreachable, which does the map call suspect or down?  Of these it says
whether it reaches them: by the reads of its clients if there were any lately, by a question of its
own otherwise.  Rows are written when something changed and refreshed while anything is amiss;
otherwise there are none.  What they mean is decided in `sightings`.  May not import Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Sequence
from typing import Final, NamedTuple

import structlog
from sqlalchemy import Connection

from cluster.node_pool import Direction, NodePool
from cluster.sightings import (
    REASON_CHARACTERS_MAX,
    ROWS_MAX,
    Sighting,
    SightingBook,
    read_sightings,
    replace_sightings,
)
from cluster.topology import NodeState, NodeView
from cluster.volume_map import VolumeMap
from protocol.clock import Clock
from protocol.errors import HaversackError, RetryLater, UnknownOutcome
from protocol.ids import NodeId
from sql.database import Database

LOOK_S: Final = 2.0
"""Between two looks at what others say; own suspicion is told at once."""

GAP_S: Final = 0.25
"""Between two looks however often suspicion changes."""

REFRESH_S: Final = 10.0
"""Between two transactions that say the same; a third of `sightings.FRESH_S`."""

READ_WINDOW_S: Final = 10.0
"""A read that was answered within this shows that a node is reached."""

ASKED_MAX: Final = 8
"""Other nodes asked in one look, to know whether this gateway has a network."""

log = structlog.get_logger()


class _Said(NamedTuple):
    """A row without its times and counts: when this changes, it is written at once."""

    incarnation: int
    reachable: bool


class Lookout:
    """One per gateway; one event loop."""

    def __init__(
        self,
        name: str,
        db: Database,
        volume_map: VolumeMap,
        pool: NodePool,
        clock: Clock,
        rng: random.Random,
        look_s: float = LOOK_S,
    ) -> None:
        """`name`: of this process, as no other has it."""
        self.name = name
        self._db = db
        self._map = volume_map
        self._pool = pool
        self._clock = clock
        self._rng = rng
        self._look_s = look_s
        self._book = SightingBook()
        self._said: dict[NodeId, _Said] = {}
        self._since: dict[NodeId, float] = {}
        self._written_at = float("-inf")
        self._wake = asyncio.Event()
        pool.tell_suspicion(self._wake.set)

    async def run(self) -> None:
        """Look until cancelled; a look that fails is made again."""
        while True:
            try:
                await self.look()
            except (RetryLater, UnknownOutcome) as error:
                log.warning("sightings not told yet", error=error.message)
            await self._clock.sleep(GAP_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._look_s):
                    await self._wake.wait()
            self._wake.clear()

    async def look(self) -> None:
        """One look.  Raises `DatabaseBusy`, `UnknownOutcome`."""
        await self._map.refresh(max_age_s=self._look_s)
        self._book.update(await self._db.read(read_sightings), self._clock.monotonic())
        nodes = self._in_trouble()
        rows = await self._see(nodes) if nodes else []
        said = {row.node: _Said(row.incarnation, row.reachable) for row in rows}
        now = self._clock.monotonic()
        if said == self._said and (not said or now - self._written_at < REFRESH_S):
            return

        def work(connection: Connection) -> None:
            replace_sightings(connection, self.name, rows)

        await self._db.write(work)
        self._said, self._written_at = said, now

    def sightings(self) -> dict[NodeId, list[Sighting]]:
        """What all gateways say now, as of the last look."""
        return self._book.fresh(self._clock.monotonic())

    async def withdraw(self) -> None:
        """Say nothing any more: this gateway ends."""
        if self._said:
            await self._db.write(lambda connection: replace_sightings(connection, self.name, []))
            self._said = {}

    def _in_trouble(self) -> list[NodeView]:
        named = {
            node
            for node, rows in self._book.fresh(self._clock.monotonic()).items()
            if any(row.gateway != self.name and not row.reachable for row in rows)
        }
        named |= set(self._pool.suspected(Direction.READ))
        states = (NodeState.SUSPECT, NodeState.DOWN)
        return [
            view
            for view in self._map.nodes()
            if view.endpoint
            and view.state is not NodeState.GONE
            and (view.node_id in named or view.state in states)
        ][:ROWS_MAX]

    async def _see(self, nodes: Sequence[NodeView]) -> list[Sighting]:
        """What this gateway says of `nodes`, and how well it reaches the others."""
        looked = {view.node_id for view in nodes}
        others = [
            view.node_id
            for view in self._map.nodes()
            if view.endpoint and view.serves_reads and view.node_id not in looked
        ]
        read = [node for node in others if self._pool.has_read(node, READ_WINDOW_S)]
        rest = sorted(set(others) - set(read))
        sample = self._rng.sample(rest, min(ASKED_MAX, len(rest)))
        asked = [*(view.node_id for view in nodes), *sample]
        answers = dict(
            zip(asked, await asyncio.gather(*(self._reach(node) for node in asked)), strict=True)
        )
        reached = len(read) + sum(reason is None for reason in answers.values())
        missed = len(asked) - (reached - len(read))
        wall = self._clock.wall()
        rows = []
        for view in nodes:
            reason = answers[view.node_id]
            before = self._said.get(view.node_id)
            if before is None or before.reachable is not (reason is None):
                self._since[view.node_id] = wall
            rows.append(
                Sighting(
                    self.name,
                    view.node_id,
                    view.incarnation,
                    reason is None,
                    "" if reason is None else reason[:REASON_CHARACTERS_MAX],
                    reached,
                    missed,
                    self._since.setdefault(view.node_id, wall),
                    wall,
                )
            )
        self._since = {view.node_id: self._since[view.node_id] for view in nodes}
        return rows

    async def _reach(self, node: NodeId) -> str | None:
        """Why a node is of no use to reads; None if it is."""
        if self._pool.is_suspected(node, Direction.READ):
            return self._pool.reason(node, Direction.READ)
        if self._pool.has_read(node, READ_WINDOW_S):
            return None
        try:
            await self._pool.ask(node, Direction.READ)
        except HaversackError as error:
            return error.message
        return None
