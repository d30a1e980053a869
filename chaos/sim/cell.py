"""A whole simulated cell: who runs where, how each process starts, dies and comes back.

Assembled by `chaos/sim/run.py`.  Every process is made of the product's own classes; everything
between them (network, disks, clocks, executor) is simulated.  Nothing survives a kill but disks,
SQLite files and clocks, and a restart is the ordinary start.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection as SqlConnection

from chaos.budget import FaultAtlas, Impairments
from chaos.sim.clock import VirtualClock
from chaos.sim.database import SimDatabase, Watch, copy_databases
from chaos.sim.disk import SimDisk
from chaos.sim.gateway import GatewayParts, SimGateway, watched
from chaos.sim.host import Host, Life
from chaos.sim.inspect import Inspector
from chaos.sim.loop import SimLoop
from chaos.sim.network import Answered, Connection, Network, NotSent, Unanswered
from chaos.sim.node import SimNode
from chaos.sim.options import Options
from chaos.sim.port import SimPort
from chaos.sim.process import SimProcess, current_process
from chaos.sim.trace import Trace
from chaos.sim.witness import Witness
from cluster import map_rows
from cluster.block_client_settings import BlockClientSettings
from cluster.cell import NodeSpec, add_nodes, create_cell
from cluster.change.runner import JobRunner
from cluster.change.transcode import TranscodeParts
from cluster.placement_service import PlacementService
from cluster.placement_settings import PlacementSettings
from cluster.repair.host import first_error
from cluster.repair.service import RepairService
from cluster.repair.settings import RepairSettings
from cluster.topology import NodeView
from cluster.verify.host import run_with_verifier
from cluster.verify.pass_rows import request_pass, verification_of
from cluster.verify.settings import VerifierSettings
from erasure.codec import Codec
from erasure.keyring import Keyring
from metadata.accounts import Accounts
from protocol.errors import HaversackError, NodeUnavailable
from protocol.ids import NodeId
from protocol.messages import ScrubAction
from sql.database import Database
from sql.engine import sqlite_url
from storage_node import identity
from storage_node.identity import Identity
from storage_node.interface import FragmentKey, FragmentStore, NodeRegistration
from storage_node.memory_store import Disk, MemoryStore
from storage_node.node import StorageNode

T = TypeVar("T")

CLUSTER_ID = "simulated-cell"
OWNERS = ("ann", "bob", "cat")
REGISTER_DEADLINE_S = 5.0
VERIFIER = VerifierSettings(
    period_s=120.0,
    poll_s=5.0,
    settle_s=65.0,
    grace_s=300.0,
    section_blocks_max=200,
    index_page_rows=64,
    inventory_page_keys=64,
    call_s=5.0,
    findings_s=15.0,
)
"""Passes all the time, in pages and sections."""

JOBS_LOOK_S = 2.0
"""Between two looks at the jobs."""

OPEN_VOLUME_S = 2.0
"""A pass of the placement service, and the next look of a gateway at the map."""


@dataclass(frozen=True, slots=True)
class Parts:
    """The classes a cell is made of; tests replace one by a mutant."""

    gateway: GatewayParts = field(default_factory=GatewayParts)
    placement: type[PlacementService] = PlacementService
    repair: type[RepairService] = RepairService
    node: type[StorageNode] = StorageNode
    make_store: Callable[[Disk], FragmentStore] = MemoryStore


class SimCell:
    """Hosts, disks, network and evidence of one run."""

    def __init__(
        self,
        options: Options,
        loop: SimLoop,
        trace: Trace,
        directory: Path,
        codec: Codec,
        parts: Parts,
    ) -> None:
        self.options = options
        self.loop = loop
        self.trace = trace
        self.network = Network(loop, self._rng("network"), trace, options.link)
        self.network.observer = self._observe
        self.atlas = FaultAtlas()
        self.impairments = Impairments()
        self.inspector = Inspector(directory, self._read_disk, self.atlas)
        changes = options.changes_gap_s > 0
        self.witness = Witness(self.inspector, self.atlas, loop.time, changes)
        self.disks: dict[NodeId, SimDisk] = {}
        self.hosts: dict[str, Host] = {}
        self.gateways: dict[str, SimGateway] = {}
        self.tokens: dict[str, str] = {}
        self.restarts = 0
        self._directory = directory
        self._codec = codec
        self._parts = parts
        self._recovering: dict[str, list[int]] = {}

    def _rng(self, purpose: str) -> random.Random:
        return random.Random(f"{self.options.seed}-{purpose}")

    # -- creation ------------------------------------------------------------------------------

    async def create(self) -> None:
        """Format everything and start every process."""
        specs = [self._format_node() for _ in range(self.options.nodes)]
        database = Database(sqlite_url(self._directory / "cell.db"), inline=True)
        create_cell(database, self._new_clock(), CLUSTER_ID, self.options.scheme, specs)
        database.close()
        await self._create_accounts()
        self._add_host("placement", self._start_placement)
        self._add_host("repair", self._start_repair)
        for number in range(self.options.gateways):
            self._add_host(f"gateway-{number + 1}", self._start_gateway)
        for name in self.hosts:
            self.start(name)

    async def _create_accounts(self) -> None:
        database = Database(sqlite_url(self._directory / "metadata.db"), inline=True)
        accounts = Accounts(database, self._new_clock(), self._rng("accounts").randbytes)
        for owner in OWNERS[: self.options.workload.owners]:
            account = await accounts.create_account(owner, False)
            self.tokens[owner] = await accounts.issue_token(account, "simulated")
        database.close()

    def _format_node(self) -> NodeSpec:
        """A new disk with its identity, and the host it will stand in."""
        number = len(self.disks) + 1
        node_id = NodeId.numbered(number)
        directory = self._node_directory(node_id)
        expected = Identity(CLUSTER_ID, node_id, f"store-{number}")
        identity.initialise(directory, expected)
        self.disks[node_id] = SimDisk(node_id, self._parts.make_store, self._rng(f"disk-{node_id}"))
        self._add_host(str(node_id), self._start_node)
        host = f"host-{number % self.options.hosts}"
        return NodeSpec(node_id, expected.store_id, str(directory), host, host)

    def _node_directory(self, node_id: NodeId) -> Path:
        return self._directory / "nodes" / node_id

    def _add_host(self, name: str, start: Callable[[Host, Life], None]) -> None:
        host = Host(name, self._new_clock(), start, f"{self.options.seed}")
        self.hosts[name] = host

    def _new_clock(self) -> VirtualClock:
        rng = self._rng(f"clock-{len(self.hosts)}")
        drift = self.options.clock_drift
        return VirtualClock(
            self.loop,
            monotonic_start=rng.uniform(0, 1e6),
            rate=1 + rng.uniform(-drift, drift),
            skew_s=rng.uniform(-1, 1),
        )

    def add_node(self) -> NodeId:
        """An operator adds an empty disk."""
        spec = self._format_node()
        database = self._admin_database()
        add_nodes(database, self.hosts[str(spec.node_id)].clock, [spec])
        database.close()
        self.start(str(spec.node_id))
        return spec.node_id

    def request_pass(self, *, deep: bool, remove_strays: bool = False) -> None:
        """An operator runs `haversack verify`."""
        now = self.hosts["repair"].clock.wall()
        self.transact(
            lambda connection: request_pass(
                connection, now, deep=deep, remove_strays=remove_strays, dry_run=False
            )
        )

    def verification(self) -> dict[str, Any]:
        """What the verifier says."""
        return self.read_now(verification_of)

    def transact(self, work: Callable[[SqlConnection], T]) -> T:
        """What an operator has a gateway do, in no time, whatever is broken."""
        database = self._admin_database()
        try:
            return database.transact(work)
        finally:
            database.close()

    def read_now(self, work: Callable[[SqlConnection], T]) -> T:
        """What an operator sees, whatever is broken."""
        database = self._admin_database()
        try:
            return database.read_now(work)
        finally:
            database.close()

    def _admin_database(self) -> Database:
        return Database(sqlite_url(self._directory / "cell.db"), inline=True)

    # -- processes -----------------------------------------------------------------------------

    def start(self, name: str) -> None:
        """Start a process that is not alive; what a supervisor does."""
        host = self.hosts[name]
        if not host.alive and not host.retired:
            self._begin_life(host)

    def _begin_life(self, host: Host) -> None:
        host.lives += 1
        host.life = Life(host.lives, SimProcess(self.loop, host.name))
        self.trace.record(host.name, "start", host.lives)
        host.life.process.run(host.start, host, host.life)

    def kill(self, name: str, down_s: float | None, why: str) -> None:
        """SIGKILL; started again after `down_s`, or never if None."""
        host = self.hosts[name]
        if not host.alive:
            return
        assert host.life is not None
        self.trace.record(name, "kill", why)
        self.impair(name, why)
        self._end_life(host.life)
        if down_s is not None:
            self.restarts += 1
            self.later(down_s, lambda: self.start(name))

    def kill_running(self, down_s: float, why: str) -> None:
        """SIGKILL the process that runs this very callback, zombie or not."""
        process = current_process()
        assert process is not None
        host = self.hosts[process.name]
        if host.life is not None and host.life.process is process:
            self.kill(process.name, down_s, why)
            return
        for zombie in list(host.zombies):
            if zombie.process is process:
                self._end_zombie(host, zombie)
        assert not process.alive

    def _end_life(self, life: Life) -> None:
        life.end()
        self.network.hang_up(life.process)

    def pause(self, name: str, why: str) -> bool:
        """SIGSTOP; False if the process is not running."""
        host = self.hosts[name]
        if not host.running:
            return False
        assert host.life is not None
        self.trace.record(name, "pause", why)
        self.impair(name, why)
        host.life.process.pause()
        return True

    def resume(self, name: str) -> None:
        """SIGCONT."""
        host = self.hosts[name]
        if host.life is not None and host.alive:
            self.trace.record(name, "resume")
            host.life.process.resume()
            self._may_recover(host)

    def replace_stopped(self, name: str, for_s: float, together_s: float) -> bool:
        """Stop a process, start another in its place, let the first go on after `for_s`, and kill
        it `together_s` later.  False if the process is not running."""
        if not self.pause(name, "replaced while stopped"):
            return False
        host = self.hosts[name]
        zombie = host.life
        assert zombie is not None
        host.zombies.append(zombie)
        self._begin_life(host)
        self.later(for_s, zombie.process.resume)
        self.later(for_s + together_s, lambda: self._end_zombie(host, zombie))
        return True

    def _end_zombie(self, host: Host, zombie: Life) -> None:
        if zombie in host.zombies:
            self.trace.record(host.name, "kill-zombie", zombie.number)
            host.zombies.remove(zombie)
            self.impair(host.name, "zombie killed")
            self._end_life(zombie)

    def retire(self, name: str, why: str) -> None:
        """The process dies and never comes back."""
        host = self.hosts[name]
        host.retired = True
        self.end_zombies(host)
        self.kill(name, None, why)

    def end_zombies(self, host: Host) -> None:
        """Kill the lives that were replaced."""
        for zombie in list(host.zombies):
            self._end_zombie(host, zombie)

    def lose_disk(self, node_id: NodeId, *, reformatted: bool = False) -> None:
        """All that a disk held is gone, its identity first; somebody may format it anew."""
        self.atlas.lose_disk(node_id, self.disks[node_id].stored_keys(), self.loop.time())
        self.impairments.begin(node_id, "disk lost", self.loop.time())
        directory = self._node_directory(node_id)
        shutil.rmtree(directory)
        directory.mkdir()
        self.disks[node_id].wipe()
        if reformatted:
            identity.initialise(directory, Identity(CLUSTER_ID, node_id, f"new-{node_id}"))

    def later(self, delay_s: float, action: Callable[[], object]) -> None:
        """Do something outside every process."""
        self.loop.call_later(delay_s, action, context=contextvars.Context())

    def _guard(self, host: Host, life: Life, main: Any) -> None:
        """Run a process's main task.  If it gives up with an error of ours, its supervisor starts
        it again; any other error is a bug and ends the run."""

        def ended(task: asyncio.Task[Any]) -> None:
            error = None if task.cancelled() else task.exception()
            if error is None or not life.process.alive:
                return
            if not isinstance(error, HaversackError):
                self.loop.fail(error)
            elif life is host.life:
                self.later(0, lambda: self.kill(host.name, 1.0, f"gave up: {error.kind}"))
            else:
                self.later(0, lambda: self._end_zombie(host, life))

        life.process.spawn(main, "main").add_done_callback(ended)

    # -- what each process does at its start ---------------------------------------------------

    def _start_node(self, host: Host, life: Life) -> None:
        node_id = NodeId(host.name)
        endpoint = f"{host.name}:{7000 + life.number}"
        node = SimNode(
            CLUSTER_ID,
            node_id,
            self._node_directory(node_id),
            self.disks[node_id],
            life.process,
            Registrar(self, life.process).register,
            host.clock,
            host.rng("node"),
            life.number,
            endpoint,
            self._parts.node,
        )
        self.network.listen(endpoint, life.process, node)
        self._guard(host, life, node.main())

    def _start_placement(self, host: Host, life: Life) -> None:
        service = self._parts.placement(
            self._open_database(host, life, "cell.db", self.witness.watch_map),
            host.clock,
            host.rng("service"),
            lambda view: self._connect(life.process, view),
            self._placement_settings(),
            holder=f"placement-{life.number}",
        )

        async def main() -> None:
            await service.start()
            self.network.listen(self.placement_address(), life.process, service)
            self._may_recover(host)
            await service.run()

        self._guard(host, life, main())

    def _start_repair(self, host: Host, life: Life) -> None:
        database = self._open_database(host, life, "cell.db", self.witness.watch_changes)

        def connect(view: NodeView) -> SimPort:
            return self._connect(life.process, view)

        service = self._parts.repair(
            database,
            host.clock,
            host.rng("service"),
            connect,
            self._codec,
            self._keyring(),
            _run_inline,
            self._repair_settings(),
            holder=f"repair-{life.number}",
        )
        self._may_recover(host)

        async def main() -> None:
            working = (
                self._with_jobs(host, service, database, connect)
                if self.options.changes_gap_s
                else service.run()
            )
            await run_with_verifier(
                working,
                database,
                host.clock,
                connect,
                lambda: service.epoch,
                dataclasses.replace(VERIFIER, grace_s=self.options.stray_grace_s),
            )

        self._guard(host, life, main())

    async def _with_jobs(
        self,
        host: Host,
        service: RepairService,
        database: Database,
        connect: Callable[[NodeView], SimPort],
    ) -> None:
        """Repair, and the runner of jobs beside it, as in `cluster.repair.host`."""
        parts = TranscodeParts(
            database,
            host.clock,
            host.rng("transcode"),
            connect,
            self._codec,
            self._keyring(),
            _run_inline,
            self._client_settings(),
        )
        jobs = JobRunner(
            database,
            host.clock,
            service.lead,
            service.executor,
            _run_inline,
            parts.work,
            self._members_changed,
            JOBS_LOOK_S,
        )
        await service.start()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(jobs.run(), name="jobs")
                tasks.create_task(service.run(), name="repair")
        except* HaversackError as group:
            raise first_error(group) from None

    async def _members_changed(self) -> None:
        """The controller stops the processes of nodes that have left."""
        for node_id in self.gone_nodes():
            host = self.hosts[node_id]
            if not host.retired:
                host.retired = True
                self.later(0, lambda host=host: self._stop_for_good(host))  # type: ignore[misc]

    def _stop_for_good(self, host: Host) -> None:
        self.end_zombies(host)
        if host.life is not None and host.alive:
            self.trace.record(host.name, "stop", "left the cell")
            self._end_life(host.life)

    def gone_nodes(self) -> set[NodeId]:
        """Nodes that were taken out of the cell."""
        return {node for node, state in self.inspector.node_states().items() if state == "gone"}

    def ask_for_scrub(self, node_id: NodeId) -> None:
        """An operator runs `haversack scrub --now`: a gateway hands it on, or does not."""
        life = self.hosts["gateway-1"].life
        view = self.read_now(lambda connection: map_rows.read_node(connection, node_id))
        if life is None or not life.process.alive or view is None:
            return
        port = self._connect(life.process, view)

        async def ask() -> None:
            with contextlib.suppress(HaversackError):
                await port.scrub(ScrubAction.START, 0, REGISTER_DEADLINE_S)
            await port.close()

        life.process.spawn(ask(), "scrub")

    def _keyring(self) -> Keyring | None:
        return Keyring([bytes(32)]) if self.options.encrypted else None

    def _repair_settings(self) -> RepairSettings:
        """Looks seldom, because looks are most of the steps of a quiet run."""
        return RepairSettings(
            out_after_s=self.options.out_after_s,
            refusing_out_after_s=self.options.out_after_s,
            look_s=3.0,
            batch_blocks=3,
            retry_unrepairable_s=60.0,
        )

    def _start_gateway(self, host: Host, life: Life) -> None:
        parts = self._parts.gateway
        index_class = watched(parts.block_index, self.witness.watch_puts)
        gateway = SimGateway(
            dataclasses.replace(parts, block_index=index_class),
            self._open_database(host, life, "cell.db"),
            self._open_database(host, life, "metadata.db"),
            lambda view: self._connect(life.process, view),
            host.clock,
            host.rng("gateway"),
            _run_inline,
            self._codec,
            self._keyring(),
            self._client_settings(),
            f"{host.name}:{life.number}",
        )
        self.gateways[host.name] = gateway
        self._guard(host, life, gateway.lookout.run())
        self.network.listen(f"{host.name}:1", life.process, gateway)
        self._may_recover(host)

    def _placement_settings(self) -> PlacementSettings:
        return PlacementSettings(lease_interval_s=self.options.lease_interval_s)

    def _client_settings(self) -> BlockClientSettings:
        """A put waits for as long as placement may take to replace a volume whose node died."""
        placement = self._placement_settings()
        notice_s = placement.down_after_s + placement.lease_interval_s + placement.call_deadline_s
        return BlockClientSettings(
            scheme=self.options.scheme,
            rows_cached_max=self.options.rows_cached,
            map_age_s=self.options.map_age_s,
            placement_wait_s=notice_s + OPEN_VOLUME_S,
        )

    def placement_address(self) -> str:
        """Where the placement service that its supervisor knows of answers."""
        return f"placement:{self.hosts['placement'].lives}"

    def _open_database(
        self, host: Host, life: Life, name: str, watch: Watch | None = None
    ) -> SimDatabase:
        database = SimDatabase(self._directory / name, host.rng(name), host.sql_faults, watch)
        life.closers.append(database.close)
        return database

    def _connect(self, process: SimProcess, view: NodeView) -> SimPort:
        return SimPort(self.network, process, view.node_id, view.endpoint, CLUSTER_ID)

    # -- evidence ------------------------------------------------------------------------------

    def impair(self, name: str, why: str) -> int:
        """From now on `name` is excused; until it works again, see `recovers`."""
        number = self.impairments.begin(name, why, self.loop.time())
        self._recovering.setdefault(name, []).append(number)
        return number

    def _may_recover(self, host: Host) -> None:
        """A gateway or the placement service works as soon as it runs; a node once it has a lease
        (`_observe`)."""
        if NodeId(host.name) not in self.disks:
            self._recovered(host.name)

    def _recovered(self, name: str) -> None:
        for number in self._recovering.pop(name, ()):
            self.impairments.finish(number, self.loop.time())

    def _observe(self, answered: Answered) -> None:
        node = answered.target
        if not isinstance(node, SimNode) or answered.error is not None:
            return
        if self.witness.observe(node, answered):
            self._node_has_lease(node.node.node_id)

    def _node_has_lease(self, node_id: NodeId) -> None:
        host = self.hosts[node_id]
        if host.running:
            self._recovered(host.name)

    def _read_disk(self, node_id: NodeId, key: FragmentKey) -> bytes | None:
        if node_id in self.atlas.lost_disks():
            return None
        return self.disks[node_id].peek(key)

    def close(self) -> None:
        """Release files.  Call it after the loop is closed."""
        for host in self.hosts.values():
            for life in (*host.zombies, host.life):
                if life is not None:
                    life.end()
        self.inspector.close()
        shutil.rmtree(self._directory)


class Registrar:
    """How one life of a node reaches the placement service, whichever process that is."""

    def __init__(self, cell: SimCell, process: SimProcess) -> None:
        self._cell = cell
        self._process = process
        self._connection = Connection(process, "")

    async def register(self, registration: NodeRegistration) -> None:
        """Raises what `PlacementService.register` raises, and `NodeUnavailable` for no answer."""
        address = self._cell.placement_address()
        if self._connection.address != address:
            self._connection = Connection(self._process, address)
        call = self._cell.network.call(
            self._connection, "register", (registration,), REGISTER_DEADLINE_S
        )
        try:
            await call
        except (NotSent, Unanswered) as error:
            raise NodeUnavailable(str(error)) from None


async def _run_inline(function: Callable[..., Any], *args: Any) -> Any:
    """The `run` of a gateway: a moment passes before and after, as in a thread."""
    await asyncio.sleep(0)
    result = function(*args)
    await asyncio.sleep(0)
    return result


def prepare_directory(directory: Path) -> Path:
    """Migrated, empty databases in a directory that no other run uses."""
    directory.mkdir(parents=True)
    (directory / "nodes").mkdir()
    copy_databases(directory)
    return directory
