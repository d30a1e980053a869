"""One simulated run: a seed in, a verdict out.

    1. create a cell and wait until it serves
    2. clients work while the nemesis breaks things
    3. heal: faults end, dead processes start, clients finish
    4. the cell converges, or that is a liveness failure
    5. quiet time, gateways restarted: nothing may rest on their memory
    6. everything acknowledged is read back; every checker judges everything

Called by `chaos/sim/__main__.py` and `tests/sim`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import enum
import functools
import hashlib
import logging
import random
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from chaos import checkers
from chaos.checkers import Violation
from chaos.faults import FaultKind
from chaos.ledger import Kind, Ledger, Operation, Outcome
from chaos.nemesis import Nemesis
from chaos.sim.cell import OWNERS, Parts, SimCell, prepare_directory
from chaos.sim.client import DEADLINE_S, SimClient
from chaos.sim.database import memory_directory
from chaos.sim.inject import Injector
from chaos.sim.judge import LivenessViolation, SafetyViolation, SimJudge
from chaos.sim.loop import SimLoop, SimulationStuck
from chaos.sim.operator import SimOperator
from chaos.sim.options import SCENARIOS, Options, draw_options
from chaos.sim.process import ProcessDied
from chaos.sim.trace import Trace
from chaos.workloads import Client, SharedWorld
from cluster.verify.differences import STRAYS
from erasure.codec import Codec
from protocol.errors import HaversackError
from protocol.ids import BlockHash
from storage_node import disk_health

READY_S = 120.0
"""A cold start: nodes register, leases, volumes."""

CONVERGE_S = disk_health.FAILURES_WINDOW_S + 300.0
"""After the last fault: every node with a disk is up, and puts are whole again.  A disk that failed
writes calls itself bad until they are forgotten."""

HEAL_S = 300.0
"""After that, and after lost nodes are out: everything lost is made again."""

SCRUB_S = 300.0
"""After that: the scrubbers have been round, and what they set aside is made again."""

VERIFY_S = 1800.0
"""After that: a deep pass finds nothing; each takes a minute, to tell strays from puts."""

OUT_WAITED_FOR_S_MAX = 300.0
"""Runs in which a node is out later do not wait for it."""

STEPS_PER_RUN_MAX = 60_000_000

STEP_S = 1e-6
"""Virtual time of one callback."""

PROBE_OWNER = 999
"""Account number that probes put under: nobody's."""

READERS = 8
"""Blocks read back at a time."""

_CODEC = Codec()


class Verdict(enum.Enum):
    """How a run ended; the values are exit codes."""

    PASSED = 0
    CRASH = 3
    """Code of ours failed in a way it does not declare."""
    LIVENESS = 4
    """Something that had to happen did not."""
    SAFETY = 5
    """A promise was broken."""


@dataclass(frozen=True, slots=True)
class Report:
    """What one run did and found."""

    seed: int
    scenario: str
    hours: float | None
    options: list[str]
    verdict: Verdict
    finding: str
    trace_hash: str
    trace_tail: list[str]
    fired: dict[FaultKind, int]
    operations: dict[str, int]
    checks: dict[str, int]
    restarts: int
    excused_reads: int
    excused_puts: int
    fragments_destroyed: int
    virtual_s: float
    """Simulated seconds."""
    wall_s: float
    steps: int

    @property
    def command(self) -> str:
        """What repeats this run."""
        hours = "" if self.hours is None else f" --hours {self.hours:g}"
        return f"python -m chaos.sim --seed {self.seed} --scenario {self.scenario}{hours}"


class SimRun:
    """Everything of one run."""

    def __init__(self, options: Options, parts: Parts, directory: Path) -> None:
        shuffle = random.Random(f"{options.seed}-shuffle") if options.shuffle else None
        self.options = options
        self.loop = SimLoop(shuffle=shuffle, step_s=STEP_S, steps_max=STEPS_PER_RUN_MAX)
        self.loop.set_exception_handler(self._unhandled)
        self.trace = Trace(self.loop.time)
        self.cell = SimCell(options, self.loop, self.trace, directory, _CODEC, parts)
        self.ledger = TracedLedger(self.trace, self.loop)
        self.judge = SimJudge(self.cell, self.ledger)
        self.injector = Injector(self.cell, self._rng("injector"))
        self._stopped = False
        self.started_at = self.loop.time()

    def _rng(self, purpose: str) -> random.Random:
        return random.Random(f"{self.options.seed}-{purpose}")

    def _unhandled(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """A callback failed: always a bug."""
        error = context.get("exception")
        self.loop.fail(error if error is not None else RuntimeError(context["message"]))

    # -- phases --------------------------------------------------------------------------------

    async def main(self) -> None:
        """All six phases."""
        await self.cell.create()
        self.injector.arm()
        await self._until_whole_puts("ready", READY_S)
        await self._fault_phase()
        await self._until_whole_puts("converged", CONVERGE_S)
        await self._until_healed()
        if self.options.verified:
            await self._until_verified()
        await asyncio.sleep(self.options.quiet_s)
        for name in list(self.cell.gateways):
            self.cell.kill(name, 0.1, "forget caches")
        await asyncio.sleep(1.0)
        await self._read_back()
        self.judge.judge_rows(DEADLINE_S)
        self._look_for_lost_errors()

    async def _fault_phase(self) -> None:
        self.trace.record("run", "faults begin")
        world = SharedWorld(self.ledger, self.judge, self.options.workload, self.loop.time)
        clients = [
            asyncio.create_task(self._client(number, world).run(lambda: self._stopped))
            for number in range(self.options.workload.clients)
        ]
        nemesis = asyncio.create_task(self._nemesis())
        tasks = [nemesis]
        if self.options.changes_gap_s:
            tasks.append(asyncio.create_task(self._change()))
        await asyncio.sleep(self.options.fault_s)
        self._stopped = True
        for task in tasks:
            task.cancel()
        self.injector.heal()
        _, late = await asyncio.wait(clients, timeout=2 * DEADLINE_S)
        if late:
            raise LivenessViolation(f"{len(late)} clients never got their last answer")
        await asyncio.gather(*clients)

    def _client(self, number: int, world: SharedWorld) -> Client:
        owner = OWNERS[number % self.options.workload.owners]
        name = f"client-{number + 1}"
        connection = SimClient(self.cell, name, owner, self._rng(f"{name}-gateways"))
        return Client(
            name, owner, world, lambda: connection, asyncio.sleep, self._rng(f"{name}-work")
        )

    async def _nemesis(self) -> None:
        if not self.options.nemesis.weights:
            return
        nemesis = Nemesis(self.options.nemesis, self.injector, self._rng("nemesis"))
        while True:
            await asyncio.sleep(nemesis.gap_s())
            fault = nemesis.draw()
            if fault is not None:
                self.injector.inject(fault)

    async def _change(self) -> None:
        """The operator at work, until it is cancelled; then everything is taken back."""
        operator = SimOperator(self.cell, self._rng("operator"), self.injector.arm)
        try:
            await operator.run(self.options.changes_gap_s)
        finally:
            operator.take_back()
            for kind, count in operator.jobs_done().items():
                self.judge.checks[f"{kind}_was_done"] += count

    async def _until_whole_puts(self, what: str, within_s: float) -> None:
        """Every node that has a disk is up, and each gateway stores a small and a large block
        without a debt, if there are nodes enough."""
        give_up_at = self.loop.time() + within_s
        while (problem := await self._problem()) is not None:
            if self.loop.time() > give_up_at:
                raise LivenessViolation(f"not {what} after {within_s:.0f} s: {problem}")
            await asyncio.sleep(1.0)
        self.trace.record("run", what)

    async def _until_healed(self) -> None:
        """Debts are repaid, and no slot is left on a lost disk while another node could have it."""
        out_after_s = self.options.out_after_s
        give_up_at = self.loop.time() + HEAL_S + 3 * min(out_after_s, OUT_WAITED_FOR_S_MAX)
        while found := self._unhealed():
            if self.loop.time() > give_up_at:
                raise LivenessViolation("; ".join(str(violation) for violation in found[:3]))
            await asyncio.sleep(2.0)
        self.trace.record("run", "healed")
        self.judge.checks["healed_block_is_whole"] += 1
        await self._until_scrubbed()

    async def _until_scrubbed(self) -> None:
        """Scrubs go round, and what they find is made again."""
        give_up_at = self.loop.time() + SCRUB_S
        lost = frozenset(self.cell.atlas.lost_disks())
        while True:
            stripes = self.cell.inspector.stripes().values()
            found = [v for stripe in stripes for v in checkers.scrub_finds_damage(stripe, lost)]
            if not found:
                break
            if self.loop.time() > give_up_at:
                raise LivenessViolation("; ".join(str(violation) for violation in found[:3]))
            await asyncio.sleep(10.0)
        self.judge.checks["scrub_finds_damage"] += 1

    async def _until_verified(self) -> None:
        """Deep passes find what nobody has read, repair mends it, and one finds nothing."""
        give_up_at = self.loop.time() + VERIFY_S
        while damage := await self._deep_pass(give_up_at):
            if self.loop.time() > give_up_at:
                raise LivenessViolation(f"deep passes still find {damage}")
            await asyncio.sleep(10.0)
        lost = frozenset(self.cell.atlas.lost_disks())
        found = [
            violation
            for stripe in self.cell.inspector.stripes().values()
            for violation in checkers.verifier_misses_nothing(stripe, lost)
        ]
        self.judge.rule("verifier_misses_nothing", found)
        self.cell.witness.judge_layout()
        self.trace.record("run", "verified")

    async def _deep_pass(self, give_up_at: float) -> dict[str, int]:
        """What a whole pass finds wrong; strays are no harm."""
        self.cell.request_pass(deep=True)
        while True:
            state = self.cell.verification()
            if state["request"]["ended"] is not None:
                break
            if self.loop.time() > give_up_at:
                raise LivenessViolation(f"a pass does not end: {state['current']}")
            await asyncio.sleep(5.0)
        strays = {kind.value for kind in STRAYS}
        return {
            name: entry["count"]
            for name, entry in state["finished"]["differences"].items()
            if entry["count"] and name not in strays
        }

    def _unhealed(self) -> list[Violation]:
        lost = frozenset(self.cell.atlas.lost_disks())
        healthy = frozenset(self.cell.disks) - lost - self.cell.gone_nodes()
        if self.options.out_after_s > OUT_WAITED_FOR_S_MAX:
            healthy = frozenset()  # too patient for a run to wait for
        stripes = self.cell.inspector.stripes().values()
        # A slot that lacks blocks which nobody can make waits a day for its old disk.
        waiting = {stripe.volume for stripe in stripes if len(stripe.intact) < stripe.scheme.k}
        found = [
            violation
            for stripe in stripes
            if stripe.volume not in waiting
            for violation in checkers.healed_block_is_whole(stripe, lost, healthy)
        ]
        if healthy and not found:
            moves = [volume for volume, _, _ in self.cell.inspector.moves()]
            beyond = [volume for volume, _ in self.cell.inspector.unrepairable()]
            found = checkers.nothing_is_under_way(moves, beyond, waiting)
        return found

    async def _problem(self) -> str | None:
        lost = self.cell.atlas.lost_disks()
        states = self.cell.inspector.node_states()
        states = {node: state for node, state in states.items() if state != "gone"}
        down = [node for node, state in states.items() if state != "up" and node not in lost]
        if down:
            return f"nodes {', '.join(down)} are {', '.join(states[node] for node in down)}"
        wrong = [node for node in lost if states.get(node) == "up"]
        if wrong:
            return f"nodes {', '.join(wrong)} have no disk and are called up"
        healthy = len(states.keys() - set(lost))
        if healthy < self.options.scheme.write_minimum:
            return None
        for name, gateway in self.cell.gateways.items():
            for length in (100, 200_000):
                data = self._rng(f"probe-{self.loop.time()}-{name}").randbytes(length)
                problem = await self._probe(name, gateway, data, healthy)
                if problem is not None:
                    return problem
        return None

    async def _probe(self, name: str, gateway: Any, data: bytes, healthy: int) -> str | None:
        life = self.cell.hosts[name].life
        if life is None or not life.process.alive:
            return f"{name} is not running"
        block = BlockHash(hashlib.sha256(data).digest())
        try:
            result = await life.process.ask(
                gateway.blocks.put(PROBE_OWNER, block, (data,), len(data)), "probe"
            )
        except (HaversackError, ProcessDied) as error:
            return f"{name}: {error}"
        if result.degraded and healthy >= self.options.scheme.n:
            return f"{name} stores blocks with debts although {healthy} nodes are healthy"
        return None

    async def _read_back(self) -> None:
        """Every acknowledged block through every gateway."""
        turns = asyncio.Semaphore(READERS)

        async def read(name: str, block: BlockHash) -> None:
            async with turns:
                await self._read_one(name, block)

        blocks = self.ledger.acknowledged_blocks()
        await asyncio.gather(
            *(read(name, block) for name in self.cell.gateways for block in blocks)
        )

    async def _read_one(self, name: str, block: BlockHash) -> None:
        life, gateway = self.cell.hosts[name].life, self.cell.gateways[name]
        assert life is not None
        try:
            data = await life.process.ask(gateway.blocks.get(block), "read-back")
        except HaversackError as error:
            self.judge.read_back(block, None, f"{error.kind}: {error}")
        else:
            self.judge.read_back(block, data, "")

    def _look_for_lost_errors(self) -> None:
        """Tasks that failed while nobody was looking."""
        lost = [
            task
            for task in self.loop.unnoticed_failures()
            if task.process is None or task.process.alive
        ]
        if lost:
            error = lost[0].exception()
            raise UnnoticedFailure(f"{lost[0].get_name()} failed unnoticed: {error!r}") from error


class UnnoticedFailure(Exception):
    """A task of the product failed and nobody awaited it."""


class TracedLedger(Ledger):
    """A ledger whose entries are part of the trace."""

    def __init__(self, trace: Trace, loop: SimLoop) -> None:
        super().__init__(loop.time)
        self._trace = trace

    def begin(self, client: str, owner: str, kind: Kind, **details: Any) -> Operation:
        operation = super().begin(client, owner, kind, **details)
        self._trace.record(client, kind.value, operation.path or operation.blocks[:3])
        return operation

    def end(self, operation: Operation, outcome: Outcome, **details: Any) -> None:
        super().end(operation, outcome, **details)
        what = f"{operation.number} {outcome.value} {operation.error}"
        self._trace.record(operation.client, "answer", what)


def simulate(
    seed: int,
    scenario: str = "mixed",
    hours: float | None = None,
    parts: Parts | None = None,
) -> Report:
    """Run one seed to its verdict.  Never raises for what it finds."""
    options = SCENARIOS[scenario](draw_options(seed))
    if hours is not None:
        options = dataclasses.replace(options, fault_s=hours * 3600.0)
    started = time.perf_counter()
    with _quiet_logs():
        run = SimRun(options, parts or Parts(), prepare_directory(_run_directory()))
        verdict, finding = _execute(run)
        return Report(
            seed=seed,
            scenario=scenario,
            hours=hours,
            options=options.describe(),
            verdict=verdict,
            finding=finding,
            trace_hash=run.trace.hash(),
            trace_tail=run.trace.tail(),
            fired=run.injector.fired(),
            operations=run.ledger.counts(),
            checks=dict(run.judge.checks),
            restarts=run.cell.restarts,
            excused_reads=run.judge.excused_reads,
            excused_puts=run.judge.excused_puts,
            fragments_destroyed=run.cell.atlas.destroyed,
            virtual_s=run.loop.time() - run.started_at,
            wall_s=time.perf_counter() - started,
            steps=run.loop.steps,
        )


def _execute(run: SimRun) -> tuple[Verdict, str]:
    """Run and translate what ended it."""
    try:
        run.loop.run_until_complete(run.main())
    except SafetyViolation as error:
        return Verdict.SAFETY, str(error)
    except (LivenessViolation, SimulationStuck) as error:
        return Verdict.LIVENESS, f"{type(error).__name__}: {error}"
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the finding
        return Verdict.CRASH, "".join(traceback.format_exception(error))
    finally:
        run.loop.close()
        run.cell.close()
    return Verdict.PASSED, ""


def _run_directory() -> Path:
    """The same for every run of this Python process: statements compiled for its databases are
    kept (`chaos/sim/database.py`)."""
    return Path(_process_directory().name) / "cell"


@functools.cache
def _process_directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="haversack-sim-", dir=memory_directory())


@contextlib.contextmanager
def _quiet_logs() -> Iterator[None]:
    """Product logs say nothing while thousands of things go wrong on purpose."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    node_log = logging.getLogger("haversack")
    disabled, node_log.disabled = node_log.disabled, True
    propagates, node_log.propagate = node_log.propagate, False
    level = node_log.level
    node_log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        structlog.configure(**before)
        node_log.disabled, node_log.propagate = disabled, propagates
        node_log.setLevel(level)
