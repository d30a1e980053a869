"""Whether this gateway should get traffic: what `/readyz` answers, and `haversack up` waits for.

    starting --the cell is whole, or can take writes after a while--> settled

A gateway that is starting says no until every node of the cell is there, so that the first puts
are not written short; after `WHOLE_S` it is content when writes work, after `WRITES_S`, when a node
that is late has been given up, when reads do.  Once settled it says yes whenever reads work: a cell
that has lost nodes still serves them.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, text

from cluster.topology import LEAVING
from cluster.volume_map import VolumeMap
from erasure.scheme import Scheme
from protocol.clock import Clock
from protocol.errors import HaversackError
from sql.database import Database

WHOLE_S: Final = 5.0
WRITES_S: Final = 30.0

MAP_AGE_S: Final = 0.5
"""How old the volume map may be for this question."""


class Readiness(NamedTuple):
    """The answer, and why."""

    ready: bool
    details: dict[str, Any]


class ReadinessProbe:
    """Asks the databases and the volume map.  One event loop."""

    def __init__(
        self,
        databases: dict[str, Database],
        volume_map: VolumeMap,
        schemes: tuple[Scheme, ...],
        clock: Clock,
    ) -> None:
        """`schemes`: those that need open volumes, the cell's own first."""
        self._databases = databases
        self._map = volume_map
        self._schemes = schemes
        self._clock = clock
        self._started = clock.monotonic()
        self._settled = False

    async def ask(self) -> Readiness:
        """Never raises for a part that is away: that is an answer."""
        sql = {name: await self._answers(database) for name, database in self._databases.items()}
        try:
            await self._map.refresh(MAP_AGE_S)
        except HaversackError as error:
            sql["map"] = error.message
        nodes = [node for node in self._map.nodes() if node.state not in LEAVING]
        reading = sum(node.serves_reads for node in nodes)
        writing = sum(node.takes_writes for node in nodes)
        schemes = self._map.schemes or self._schemes
        reads = reading >= schemes[0].k
        writes = all(self._writable(scheme, scheme.write_minimum) for scheme in schemes)
        whole = writing == len(nodes) and all(
            self._writable(scheme, min(scheme.n, len(nodes))) for scheme in schemes
        )
        reachable = all(answer == "ok" for answer in sql.values())
        ready = reachable and reads and self._settle(whole=whole, writes=writes)
        return Readiness(
            ready,
            {
                "ready": ready,
                "reads": reachable and reads,
                "writes": reachable and writes,
                "whole": reachable and whole,
                "sql": sql,
                "nodes": {"all": len(nodes), "reading": reading, "writing": writing},
                "needs": {"read": schemes[0].k, "write": schemes[0].write_minimum},
            },
        )

    def _settle(self, *, whole: bool, writes: bool) -> bool:
        age_s = self._clock.monotonic() - self._started
        if whole or (writes and age_s > WHOLE_S) or age_s > WRITES_S:
            self._settled = True
        return self._settled

    def _writable(self, scheme: Scheme, slots: int) -> bool:
        """Whether an open volume of `scheme` has so many slots whose nodes take writes."""
        volumes = self._map.open_volumes(scheme)
        return any(len(self._map.writable_slots(volume)) >= slots for volume in volumes)

    async def _answers(self, database: Database) -> str:
        try:
            await database.read(_select_one)
        except HaversackError as error:
            return error.message
        return "ok"


def _select_one(connection: Connection) -> None:
    connection.execute(text("SELECT 1"))
