"""What gateways say of storage nodes that are in trouble: rows, how fresh they are, what they mean.

Written by the lookout of each gateway (`lookout`), read by the placement service (is a node that
answers it of any use to clients?), by repair (does anybody still read from a node that is to be
out?) and by other lookouts (a node that one gateway cannot reach is asked by all).  SQL over a
connection and pure rules; no clock, no event loop, no Ray.

A row is fresh while its `written` changes, on the reader's own monotonic clock: clocks of different
hosts are never compared.

Who is heard.  A gateway that reaches no node at all has lost its network: it is not heard.  A node
is *unreachable* if every gateway that is heard says so, and one of them reaches more nodes than it
misses, or two agree.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, Row, delete, insert, select

from cluster.schema import sightings
from protocol.ids import NodeId

FRESH_S: Final = 30.0
"""A row that did not change for so long says nothing: three times a lookout's refresh."""

FORGOTTEN_S: Final = 600.0
"""A row that did not change for so long is removed: its gateway is gone."""

ROWS_MAX: Final = 64
"""Rows of one gateway; more nodes in trouble are not named."""

REASON_CHARACTERS_MAX: Final = 200

_ALL: Final = select(sightings).order_by(sightings.c.gateway, sightings.c.node_id)


class Sighting(NamedTuple):
    """What one gateway says of one node."""

    gateway: str
    node: NodeId
    incarnation: int
    """Of the node when it was looked at."""
    reachable: bool
    reason: str
    reached: int
    """Nodes that this gateway reached lately."""
    missed: int
    """Nodes that it did not reach."""
    since: float
    """When `reachable` took its value, wall clock of the gateway."""
    written: float
    """Wall clock of the gateway."""

    @property
    def is_heard(self) -> bool:
        """Whether the gateway has a network at all."""
        return self.reachable or self.reached > 0


def unreachable(rows: Sequence[Sighting]) -> bool:
    """Whether the fresh rows about one node's present life mean that clients cannot use it."""
    heard = [row for row in rows if row.is_heard]
    if not heard or any(row.reachable for row in heard):
        return False
    return len(heard) >= 2 or any(row.reached > row.missed for row in heard)


class SightingBook:
    """Rows as one reader has seen them, with the time of their last change on its own clock."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, NodeId], tuple[Sighting, float]] = {}

    def update(self, rows: Iterable[Sighting], now: float) -> None:
        """Take over the table as it is at monotonic time `now`."""
        before = self._rows
        self._rows = {}
        for row in rows:
            place = row.gateway, row.node
            held = before.get(place)
            changed_at = held[1] if held is not None and held[0].written == row.written else now
            self._rows[place] = row, changed_at

    def fresh(self, now: float) -> dict[NodeId, list[Sighting]]:
        """Rows that changed lately, by node."""
        found: dict[NodeId, list[Sighting]] = defaultdict(list)
        for (_, node), (row, changed_at) in sorted(self._rows.items()):
            if now - changed_at < FRESH_S:
                found[node].append(row)
        return dict(found)

    def unreachable(self, incarnations: Mapping[NodeId, int], now: float) -> dict[NodeId, str]:
        """Nodes that clients cannot use in their present lives, and what gateways say of them."""
        found = {}
        for node, rows in self.fresh(now).items():
            present = [row for row in rows if row.incarnation == incarnations.get(node)]
            if unreachable(present):
                first = next(row for row in present if row.is_heard)
                found[node] = (
                    f"{first.gateway} and {len(present) - 1} other gateways cannot reach it: "
                    if len(present) > 1
                    else f"{first.gateway} cannot reach it: "
                ) + first.reason
        return found

    def reached(self, now: float) -> frozenset[NodeId]:
        """Nodes that some gateway reaches."""
        fresh = self.fresh(now)
        return frozenset(node for node, rows in fresh.items() if any(row.reachable for row in rows))

    def forgotten(self, now: float) -> list[str]:
        """Gateways of which no row has changed for long."""
        last: dict[str, float] = {}
        for (gateway, _), (_, changed_at) in self._rows.items():
            last[gateway] = max(changed_at, last.get(gateway, changed_at))
        return sorted(gateway for gateway, at in last.items() if now - at >= FORGOTTEN_S)


def read_sightings(connection: Connection) -> list[Sighting]:
    """The whole table: no rows while nothing is amiss."""
    return [_sighting(row) for row in connection.execute(_ALL)]


def replace_sightings(connection: Connection, gateway: str, rows: Sequence[Sighting]) -> None:
    """Let a gateway say this and nothing else."""
    connection.execute(delete(sightings).where(sightings.c.gateway == gateway))
    if rows:
        values = [{**row._asdict(), "node_id": str(row.node)} for row in rows]
        for value in values:
            del value["node"]
        connection.execute(insert(sightings), values)


def forget_gateways(connection: Connection, gateways: Iterable[str]) -> None:
    """These are gone."""
    for gateway in gateways:
        connection.execute(delete(sightings).where(sightings.c.gateway == gateway))


def _sighting(row: Row[Any]) -> Sighting:
    return Sighting(
        row.gateway,
        NodeId(row.node_id),
        row.incarnation,
        bool(row.reachable),
        row.reason,
        row.reached,
        row.missed,
        row.since,
        row.written,
    )
