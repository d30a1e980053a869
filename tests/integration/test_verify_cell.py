"""`haversack verify` against a cell with real databases, data ports and HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from api_cell import CLUSTER_ID, SECRET, Cell, block_of, running_cell
from typer.testing import CliRunner

from cli.main import app
from cluster.leadership import take_role
from cluster.topology import NodeView
from cluster.verify.lead import ROLE
from cluster.verify.service import VerifierService
from cluster.verify.settings import VerifierSettings
from protocol.clock import SystemClock
from protocol.errors import ConfigInvalid
from protocol.ids import BlockHash
from sql.database import Database
from sql.engine import sqlite_url
from storage_node.interface import FragmentKey, NodePort
from storage_node.port_client import SocketPort

SETTINGS = VerifierSettings(
    settle_s=0.2, asked_settle_s=0.2, grace_s=0.4, poll_s=0.05, inventory_page_keys=7
)


@contextmanager
def verifier_of(cell: Cell) -> Iterator[None]:
    """The service in the loop that serves the cell, with a database and ports of its own."""
    running = cell.running
    assert running is not None
    clock = SystemClock()
    kept: list[tuple[Database, VerifierService, asyncio.Task[None]]] = []

    def connect(view: NodeView) -> NodePort:
        return SocketPort(view.node_id, view.endpoint, CLUSTER_ID, SECRET, clock)

    async def start() -> None:
        database = Database(sqlite_url(cell.directory / "cell.db"))
        epoch = await database.write(lambda c: take_role(c, ROLE, "test", clock.wall()))
        service = VerifierService(database, clock, connect, lambda: epoch, SETTINGS)
        task = asyncio.get_running_loop().create_task(service.run())
        kept.append((database, service, task))

    async def stop() -> None:
        database, service, task = kept[0]
        await service.stop()
        await task
        await database.aclose()

    running.call(start)
    try:
        yield
    finally:
        running.call(stop)


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cell]:
    directory = tmp_path_factory.mktemp("cell")
    with running_cell(directory, scheme="rs-2-1", nodes=4) as cell:
        (directory / "admin.token").write_text(cell.tokens["admin"])
        yield cell


def run(cell: Cell, *arguments: str) -> tuple[int, str]:
    assert cell.running is not None
    token = str(cell.directory / "admin.token")
    given = ["verify", "--server", cell.running.url, "--token-file", token, *arguments]
    done = CliRunner().invoke(app, given)
    return done.exit_code, done.stdout


def test_verify_finds_what_was_planted_and_removes_strays_only_when_told(cell: Cell) -> None:
    hashes = []
    with cell.client() as client:
        for seed in range(12):
            name, data = block_of(seed, 200_000 if seed % 2 else 500)
            assert client.put(f"/v1/blocks/{name}", content=data).status_code == 201
            hashes.append(BlockHash.parse(name))
    with verifier_of(cell):
        code, text = run(cell, "--deep", "--json")
        assert code == 0, text
        answer = json.loads(text)
        assert answer["blocks"] == 12
        assert {entry["count"] for entry in answer["differences"].values()} == {0}

        places = {
            FragmentKey.unpack(packed): (node, disk)
            for node, disk in cell.disks.items()
            for packed in disk.keys
        }
        of_large = [key for key in sorted(places) if key.block == hashes[1]]
        of_small = [key for key in sorted(places) if key.block == hashes[2]]
        holder, disk = places[of_large[0]]
        spare = next(node for node in cell.disks if node not in {places[k][0] for k in of_large})
        record = disk.entries[of_large[0].pack()].record
        cell.disks[spare].replace_undetected(of_large[0], record)
        places[of_large[1]][1].lose(of_large[1])
        places[of_small[0]][1].corrupt(of_small[0])

        code, text = run(cell)
        assert code == 1
        assert f"{str(hashes[1])[:16]} slot 1" in text
        code, text = run(cell, "--deep", "--json")
        counts = {name: entry["count"] for name, entry in json.loads(text)["differences"].items()}
        assert counts["wrong bytes"] == 1
        assert counts["stale copy"] == 1
        assert counts["missing"] == 0, "known by now"

        _, text = run(cell, "--remove-strays", "--dry-run")
        assert "would remove  1 stale copy" in text
        assert of_large[0].pack() in cell.disks[spare].entries
        code, text = run(cell, "--remove-strays", "--json")
        assert code == 0
        assert json.loads(text)["removed"] == 1
        assert of_large[0].pack() not in cell.disks[spare].entries
        assert of_large[0].pack() in cell.disks[holder].entries
    with cell.client() as client:
        for seed, block in enumerate(hashes):
            data = block_of(seed, 200_000 if seed % 2 else 500)[1]
            assert client.get(f"/v1/blocks/{block}").content == data


def test_requests_that_contradict_themselves_are_refused(cell: Cell) -> None:
    with cell.client() as client:
        for body in ({"dry_run": True}, {"deep": True, "remove_strays": True}, {"other": 1}):
            assert client.post("/v1/admin/verify", json=body).status_code == 422
    done = CliRunner().invoke(app, ["verify", "--dry-run"])
    assert isinstance(done.exception, ConfigInvalid)
