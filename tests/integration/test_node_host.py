"""The life of a node process, without Ray: opening, registering, failing, healing, stopping."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from node_parts import (
    CLUSTER_ID,
    IDENTITY,
    SECRET,
    formatted,
    fragment_key,
    fragment_record,
    rocks,
    until,
)

from protocol.clock import SystemClock
from protocol.errors import NodeRefuses, NodeUnavailable
from protocol.ids import NodeId
from protocol.limits import KIB
from protocol.messages import ItemStatus
from storage_node import host as host_module
from storage_node.host import NodeConfig, NodeHost, file_system_bytes, read_secret
from storage_node.identity import Identity, initialise
from storage_node.interface import NodeRegistration
from storage_node.port_client import SocketPort
from storage_node.rocks_store import RocksStore
from storage_node.service_state import ServiceState

OK = ItemStatus.OK
DEADLINE_S = 20.0


class Placement:
    """Registers nodes and pushes leases, as the placement service does."""

    def __init__(self) -> None:
        self.registrations: list[NodeRegistration] = []
        self.grants = True
        self.down = False

    async def register(self, registration: NodeRegistration) -> None:
        if self.down:
            raise ConnectionError("placement is away")
        self.registrations.append(registration)
        if self.grants:
            incarnation = len(self.registrations)
            await self.call(lambda port: port.lease(incarnation, 600, DEADLINE_S))

    async def call(self, what: Callable[[SocketPort], object]) -> object:
        async with self.port() as port:
            return await what(port)  # type: ignore[misc]

    @asynccontextmanager
    async def port(self) -> AsyncIterator[SocketPort]:
        last = self.registrations[-1]
        port = SocketPort(last.node_id, last.endpoint, CLUSTER_ID, SECRET, SystemClock())
        try:
            yield port
        finally:
            await port.close()


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "OPEN_RETRY_S",
        "OPEN_RETRY_S_MAX",
        "WATCH_S",
        "REGISTER_RETRY_S",
        "UPKEEP_S",
        "IDLE_S",
    ):
        monkeypatch.setattr(host_module, name, 0.01)
    monkeypatch.setattr(host_module, "LEASE_WAIT_S", 0.1)


@pytest.fixture
def config(tmp_path: Path) -> NodeConfig:
    secret = tmp_path / "cluster.secret"
    secret.write_text(SECRET.hex() + "\n")
    return NodeConfig(
        node_id=IDENTITY.node_id,
        directory=str(tmp_path / "node"),
        cluster_id=CLUSTER_ID,
        secret_file=str(secret),
        bind_host="127.0.0.1",
        capacity_bytes=None,
        namespace="unused",
        registrar="unused",
        reserve_bytes=0,
    )


@asynccontextmanager
async def running(config: NodeConfig, placement: Placement) -> AsyncIterator[NodeHost]:
    host = NodeHost(config, placement.register, SystemClock(), os.urandom)
    task = asyncio.create_task(host.run())
    try:
        yield host
    finally:
        await host.stop()
        await task


async def serves(placement: Placement, number: int = 1) -> None:
    async with placement.port() as port:
        incarnation = (await port.summary(DEADLINE_S)).incarnation
        key, record = fragment_record(number)
        assert (await port.put(incarnation, [[record]], DEADLINE_S)).statuses == [OK]
        assert (await port.get([key], DEADLINE_S))[0].record == record


async def test_a_node_opens_registers_gets_a_lease_and_serves(config: NodeConfig) -> None:
    directory = formatted(Path(config.directory))
    placement = Placement()
    async with running(config, placement) as host:
        await until(lambda: host.node.has_lease)
        (registration,) = placement.registrations
        assert (registration.node_id, registration.store_id) == (
            IDENTITY.node_id,
            IDENTITY.store_id,
        )
        assert registration.pid == os.getpid()
        assert registration.capacity_bytes == file_system_bytes(directory)
        await serves(placement)
    rocks(directory).close()  # in order: nobody holds it any more


async def test_a_stopped_node_keeps_everything_for_its_next_life(config: NodeConfig) -> None:
    formatted(Path(config.directory))
    placement = Placement()
    async with running(config, placement) as host:
        await until(lambda: host.node.has_lease)
        await serves(placement, 1)
    with pytest.raises(NodeUnavailable):
        await serves(placement)
    async with running(config, placement) as host:
        await until(lambda: host.node.has_lease)
        async with placement.port() as port:
            (answer,) = await port.get([fragment_key(1)], DEADLINE_S)
            assert answer.record == fragment_record(1)[1]
        assert host.node.incarnation == 2
    await host.stop()


@pytest.mark.parametrize("trouble", ["missing", "empty", "foreign", "storeless"])
async def test_a_directory_that_is_not_its_own_is_refused_until_it_is(
    config: NodeConfig, trouble: str, tmp_path: Path
) -> None:
    directory = Path(config.directory)
    away = tmp_path / "away"
    formatted(directory)
    store = rocks(directory)
    key, record = fragment_record(7)
    store.put_group([(key, record)])
    store.close()
    shutil.move(directory, away)
    _put_in_place(trouble, directory, away)
    placement = Placement()
    before = _listing(directory)
    async with running(config, placement) as host:
        await until(lambda: host.node.state is ServiceState.REFUSING)
        assert str(directory) in host.node.detail
        # It says where it can be asked and why it does not serve, and registers no life.
        await until(lambda: len(placement.registrations) > 1)
        assert all(str(directory) in said.refusal for said in placement.registrations)
        async with placement.port() as port:
            assert (await port.summary(DEADLINE_S)).state == "refusing"
        assert _listing(directory) == before
        shutil.rmtree(directory, ignore_errors=True)
        shutil.move(away, directory)  # the disk is mounted after all
        await until(lambda: host.node.has_lease)
        assert placement.registrations[-1].refusal == ""
        async with placement.port() as port:
            (answer,) = await port.get([key], DEADLINE_S)
            assert answer.record == record


def _put_in_place(trouble: str, directory: Path, away: Path) -> None:
    if trouble == "foreign":
        initialise(directory, Identity(CLUSTER_ID, NodeId("node-02"), "store-2"))
    elif trouble != "missing":
        directory.mkdir()
    if trouble == "storeless":
        shutil.copy(away / "identity", directory / "identity")


def _listing(directory: Path) -> list[str]:
    return sorted(str(path) for path in directory.rglob("*"))


async def test_a_directory_in_use_is_waited_for(config: NodeConfig) -> None:
    directory = formatted(Path(config.directory))
    holder = rocks(directory)
    placement = Placement()
    async with running(config, placement) as host:
        await until(lambda: "another process" in host.node.detail)
        assert host.node.state is ServiceState.OPENING
        holder.close()
        await until(lambda: host.node.has_lease)
        await serves(placement)


async def test_after_a_failed_write_the_store_is_opened_again(config: NodeConfig) -> None:
    directory = formatted(Path(config.directory))
    placement = Placement()
    async with running(config, placement) as host:
        await until(lambda: host.node.has_lease)
        await serves(placement, 1)
        shutil.rmtree(directory / "incoming")  # the next extent cannot be written
        async with placement.port() as port:
            _, record = fragment_record(2, 400 * KIB)
            with pytest.raises(Exception, match="failed while writing"):
                await port.put(1, [[record]], DEADLINE_S)
            await until(lambda: host.node.state is ServiceState.SERVING)
            with pytest.raises(NodeRefuses):
                await port.put(1, [[record]], DEADLINE_S)  # no lease was carried over
            await port.lease(1, 600, DEADLINE_S)
            assert (await port.put(1, [[record]], DEADLINE_S)).statuses == [OK]
            (answer,) = await port.get([fragment_key(1)], DEADLINE_S)
            assert answer.status is OK


async def test_registration_is_repeated_until_placement_answers(config: NodeConfig) -> None:
    formatted(Path(config.directory))
    placement = Placement()
    placement.down = True
    async with running(config, placement) as host:
        await until(lambda: host.node.state is ServiceState.SERVING)
        await asyncio.sleep(0.05)
        placement.down = False
        await until(lambda: host.node.has_lease)
        assert len(placement.registrations) == 1


async def test_a_node_that_gets_no_lease_registers_again_after_a_while(config: NodeConfig) -> None:
    formatted(Path(config.directory))
    placement = Placement()
    placement.grants = False
    async with running(config, placement) as host:
        await until(lambda: len(placement.registrations) >= 2)
        placement.grants = True
        await until(lambda: host.node.has_lease)


async def test_an_idle_node_tidies_its_store(
    config: NodeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    formatted(Path(config.directory))
    asked: list[int] = []

    def tidy(_store: RocksStore, budget: int) -> int:
        asked.append(budget)
        return 1 if len(asked) < 3 else 0

    monkeypatch.setattr(RocksStore, "tidy", tidy)
    placement = Placement()
    async with running(config, placement) as host:
        await until(lambda: host.node.has_lease)
        await serves(placement)
        await until(lambda: len(asked) >= 3)
        done = len(asked)
        await asyncio.sleep(0.1)
        assert len(asked) == done  # nothing was written since


async def test_a_node_can_be_stopped_at_once(config: NodeConfig) -> None:
    formatted(Path(config.directory))
    for _ in range(3):
        async with running(config, Placement()):
            pass
    rocks(Path(config.directory)).close()


async def test_a_capacity_is_kept(config: NodeConfig) -> None:
    directory = formatted(Path(config.directory))
    store = rocks(directory, capacity_bytes=10_000)
    store.put_group([fragment_record(1, 5_000)])
    assert store.space().client_free_bytes == 10_000 - len(fragment_record(1, 5_000)[1])
    store.delete_group([fragment_key(1)])
    assert store.space().client_free_bytes == 10_000 - len(
        fragment_record(1, 5_000)[1]
    )  # not yet given back
    store.close()


def test_the_secret_is_one_line_of_hex(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("00ff\n")
    assert read_secret(tmp_path / "secret") == b"\x00\xff"


def test_a_node_process_loads_only_what_it_needs() -> None:
    script = (
        "import sys, storage_node.host, storage_node.actor\n"
        "heavy = {'numpy', 'sqlalchemy', 'fastapi', 'pydantic', 'pyeclib', 'cryptography'}\n"
        "found = heavy & {name.partition('.')[0] for name in sys.modules}\n"
        "assert not found - set(sys.argv[1:]), found\n"
    )
    plain = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, ray; print(*{n.partition('.')[0] for n in sys.modules})",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded_by_ray = plain.stdout.split()
    subprocess.run([sys.executable, "-c", script, *loaded_by_ray], check=True)
