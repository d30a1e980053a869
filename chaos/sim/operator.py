"""An operator of a simulated cell, who changes it: drains, rebalances, transcodes, adds nodes, ...

Started by `chaos/sim/run.py` in runs whose options say how often; takes everything back when faults
end, so that the cell can be whole again.  Asks as the gateway does, through `cluster.change`, and
previews each change before asking for it: a dry run must not write a thing.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

from sqlalchemy import Connection

from chaos import checkers
from chaos.sim.cell import SimCell
from chaos.sim.inject import WRITES_TO
from cluster import map_rows
from cluster.change import requests
from cluster.change.jobs import UNFINISHED, JobEvent, JobKind, JobState, read_jobs
from cluster.change.requests import parse_request
from cluster.topology import NodeState, NodeView
from erasure.scheme import Scheme
from protocol.errors import WrongState
from protocol.ids import NodeId

OTHERS: Final = (Scheme.parse("rs-3-2"), Scheme.parse("rs-2-1"))
"""What blocks of the cell's scheme are transcoded to, and back: the first that is not its own."""

NODES_ADDED_MAX: Final = 4

WISHES: Final = {
    "drain": 4.0,
    "undrain": 2.0,
    "rebalance": 2.0,
    "transcode": 2.0,
    "steer": 2.0,
    "add": 1.0,
    "decommission": 1.0,
    "replace": 1.0,
    "scrub": 1.0,
    "verify": 1.0,
}
"""What is asked for, by weight."""

STEERED_AWAY: Final = 0.3
"""Share of steered jobs that are cancelled, rather than paused or resumed."""


class SimOperator:
    """Asks for one thing after the other; at most one node leaves at a time."""

    def __init__(self, cell: SimCell, rng: random.Random, arm: Callable[[], None]) -> None:
        """`arm` has new nodes report what faults did to them."""
        self._cell = cell
        self._rng = rng
        self._arm = arm
        scheme = cell.options.scheme
        self._schemes = (scheme, next(other for other in OTHERS if other != scheme))
        self._unwilling: dict[NodeId, int] = {}
        self.asked: Counter[str] = Counter()

    async def run(self, gap_mean_s: float) -> None:
        """Until it is cancelled."""
        kinds, weights = list(WISHES), list(WISHES.values())
        while True:
            await asyncio.sleep(self._rng.expovariate(1 / gap_mean_s))
            (what,) = self._rng.choices(kinds, weights)
            try:
                said = self._ask(what)
                self.asked[what] += 1
            except WrongState as error:
                said = f"refused: {error.message}"
            self._cell.trace.record("operator", what, said)
            self._note_unwilling()

    def take_back(self) -> None:
        """Cancel what is under way; nodes that were drained take new volumes again."""

        def work(connection: Connection) -> None:
            now = self._now()
            for job in read_jobs(connection, UNFINISHED):
                requests.act(connection, job.job_id, JobEvent.CANCEL, now)
            for node in map_rows.read_nodes(connection):
                if node.state in (NodeState.DRAINING, NodeState.DRAINED):
                    requests.undrain(connection, node.node_id, now)

        self._cell.transact(work)
        self._cell.trace.record("operator", "takes everything back")
        self._note_unwilling()

    def jobs_done(self) -> dict[str, int]:
        """Jobs that came to their end, by kind."""
        done = self._cell.read_now(lambda c: read_jobs(c, [JobState.DONE], limit=1_000))
        return dict(Counter(str(job.kind) for job in done))

    def _now(self) -> float:
        return self._cell.hosts["repair"].clock.wall()

    def _note_unwilling(self) -> None:
        """Nodes that are to leave take no new volumes: puts have fewer nodes to choose from."""
        states = self._cell.inspector.node_states()
        leaving = {node for node, state in states.items() if state in ("draining", "drained")}
        now = self._cell.loop.time()
        for node in leaving - self._unwilling.keys():
            number = self._cell.impairments.begin(f"{WRITES_TO}{node}", "leaving", now)
            self._unwilling[node] = number
        for node in self._unwilling.keys() - leaving:
            self._cell.impairments.finish(self._unwilling.pop(node), now)

    # -- wishes --------------------------------------------------------------------------------

    def _ask(self, what: str) -> str:
        match what:
            case "add":
                return self._add()
            case "scrub":
                node = self._rng.choice(self._members()).node_id
                self._cell.ask_for_scrub(node)
                return str(node)
            case "verify":
                deep = self._rng.random() < 0.5
                self._cell.request_pass(deep=deep, remove_strays=self._rng.random() < 0.7)
                return "deep" if deep else "shallow"
            case "steer":
                return self._cell.transact(self._steer)
            case "undrain":
                leaving = self._leaving()
                if leaving:
                    self._cell.transact(
                        lambda c: requests.undrain(c, leaving[0].node_id, self._now())
                    )
                return ", ".join(str(node.node_id) for node in leaving[:1])
            case _:
                return self._change(what)

    def _members(self) -> list[NodeView]:
        nodes = self._cell.read_now(map_rows.read_nodes)
        return [node for node in nodes if node.state is not NodeState.GONE]

    def _leaving(self) -> list[NodeView]:
        leaving = (NodeState.DRAINING, NodeState.DRAINED)
        return [node for node in self._members() if node.state in leaving]

    def _add(self) -> str:
        if len(self._cell.disks) >= self._cell.options.nodes + NODES_ADDED_MAX:
            return "no room for another"
        node = self._cell.add_node()
        self._arm()
        return str(node)

    def _change(self, what: str) -> str:
        fields = self._fields(JobKind(what))
        if fields is None:
            return "not now"
        return self._submit(what, fields)

    def _fields(self, kind: JobKind) -> dict[str, Any] | None:
        """What to ask for; None if a cell like this should not be asked now."""
        members = self._members()
        match kind:
            case JobKind.REBALANCE:
                return {}
            case JobKind.TRANSCODE:
                source, target = self._rng.sample(self._schemes, 2)
                return {"from": str(source), "to": str(target)}
            case JobKind.DRAIN:
                return None if self._leaving() else {"node": str(self._rng.choice(members).node_id)}
            case JobKind.DECOMMISSION | JobKind.REPLACE:
                up = [node for node in members if node.state is NodeState.UP]
                if self._leaving() or len(up) <= self._cell.options.scheme.n:
                    return None
                node = self._rng.choice(members).node_id
                if kind is JobKind.DECOMMISSION:
                    return {"node": str(node)}
                others = [other for other in up if other.node_id != node]
                emptiest = min(others, key=lambda other: (other.fragments, other.node_id))
                return {"node": str(node), "target": str(emptiest.node_id)}

    def _submit(self, what: str, fields: dict[str, Any]) -> str:
        request = parse_request(what, fields)
        before = self._cell.inspector.commits()
        self._cell.read_now(lambda c: requests.preview(c, request))
        after = self._cell.inspector.commits()
        self._cell.witness.rule(
            "dry_run_changes_nothing", checkers.dry_run_changes_nothing(what, before, after)
        )
        job = self._cell.transact(lambda c: requests.submit(c, request, self._now()))
        return f"{job.name} {job.subject}"

    def _steer(self, connection: Connection) -> str:
        found = read_jobs(connection, UNFINISHED)
        if not found:
            return "nothing"
        job = self._rng.choice(found)
        paused = job.state is JobState.PAUSED
        event = JobEvent.RESUME if paused else JobEvent.PAUSE
        if self._rng.random() < STEERED_AWAY:
            event = JobEvent.CANCEL
        requests.act(connection, job.job_id, event, self._now())
        return f"{job.name} {event}"
