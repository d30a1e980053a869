"""An operator of a simulated cell, who changes it all the time: drains, rebalances, transcodes.

Started by `chaos/sim/run.py` in runs of the scenario `changes`; takes everything back when faults
end, so that the cell can be whole again.  Asks as the gateway does, through `cluster.change`.
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from chaos.sim.trace import Trace
from cluster import map_rows
from cluster.change import requests
from cluster.change.jobs import UNFINISHED, JobEvent, JobKind, JobState, read_jobs
from cluster.change.requests import parse_request
from cluster.topology import NodeState
from erasure.scheme import Scheme
from protocol.clock import Clock
from protocol.errors import WrongState
from sql.database import Database
from sql.engine import sqlite_url

OTHER: Scheme = Scheme.parse("rs-3-2")
"""What blocks of the cell's scheme are transcoded to, and back."""


class SimOperator:
    """Asks for one thing after the other; at most one node drains at a time."""

    def __init__(
        self, directory: Path, clock: Clock, rng: random.Random, scheme: Scheme, trace: Trace
    ) -> None:
        self._db = Database(sqlite_url(directory / "cell.db"), inline=True)
        self._clock = clock
        self._rng = rng
        self._schemes = (scheme, OTHER)
        self._trace = trace

    async def run(self, gap_mean_s: float) -> None:
        """Until it is cancelled."""
        while True:
            await asyncio.sleep(self._rng.expovariate(1 / gap_mean_s))
            self._ask_for_something()

    def take_back(self) -> None:
        """Cancel what is under way; nodes that were drained take new volumes again."""

        def work(connection: Connection) -> None:
            now = self._clock.wall()
            for job in read_jobs(connection, UNFINISHED):
                requests.act(connection, job.job_id, JobEvent.CANCEL, now)
            for node in map_rows.read_nodes(connection):
                if node.state in (NodeState.DRAINING, NodeState.DRAINED):
                    requests.undrain(connection, node.node_id, now)

        self._db.transact(work)
        self._trace.record("operator", "takes everything back")

    def jobs_done(self) -> dict[str, int]:
        """Jobs that came to their end, by kind."""
        found: dict[str, int] = {}
        for job in self._db.read_now(lambda c: read_jobs(c, [JobState.DONE], limit=1_000)):
            found[str(job.kind)] = found.get(str(job.kind), 0) + 1
        return found

    def close(self) -> None:
        """Release the database."""
        self._db.close()

    def _ask_for_something(self) -> None:
        what = self._rng.choice(["drain", "drain", "undrain", "rebalance", "transcode", "steer"])
        try:
            said = self._db.transact(lambda connection: self._ask(connection, what))
        except WrongState as error:
            said = f"refused: {error.message}"
        self._trace.record("operator", what, said)

    def _ask(self, connection: Connection, what: str) -> str:
        now = self._clock.wall()
        nodes = map_rows.read_nodes(connection)
        leaving = [n for n in nodes if n.state in (NodeState.DRAINING, NodeState.DRAINED)]
        if what in ("drain", "undrain"):
            if leaving:
                requests.undrain(connection, leaving[0].node_id, now)
                return str(leaving[0].node_id)
            node = self._rng.choice(nodes).node_id
            return self._submit(connection, "drain", {"node": str(node)})
        if what == "steer":
            return self._steer(connection, now)
        if what == "transcode":
            source, target = self._rng.sample(self._schemes, 2)
            return self._submit(connection, what, {"from": str(source), "to": str(target)})
        return self._submit(connection, what, {})

    def _submit(self, connection: Connection, kind: str, fields: dict[str, Any]) -> str:
        job = requests.submit(connection, parse_request(kind, fields), self._clock.wall())
        return f"{job.name} {job.subject}"

    def _steer(self, connection: Connection, now: float) -> str:
        found = read_jobs(connection, UNFINISHED)
        if not found:
            return "nothing"
        job = self._rng.choice(found)
        paused = job.state is JobState.PAUSED
        event = JobEvent.RESUME if paused else JobEvent.PAUSE
        if job.kind is not JobKind.DRAIN and self._rng.random() < 0.3:
            event = JobEvent.CANCEL
        requests.act(connection, job.job_id, event, now)
        return f"{job.name} {event}"
