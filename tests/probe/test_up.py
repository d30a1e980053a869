"""`haversack up`: starting, stopping, and the death of each process in turn."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from chaos.live.blocks import Ledger, Writer, put_block, wrong_blocks
from chaos.live.cell import LiveCell

HAVERSACK = str(Path(sys.executable).with_name("haversack"))


def test_the_first_start_writes_a_private_admin_token(shared_cell: LiveCell) -> None:
    mode = stat.S_IMODE(shared_cell.token_file.stat().st_mode)
    assert mode == 0o600
    assert shared_cell.ask("GET", "/v1/account")[0] == 200


def test_status_names_every_node_with_its_process_and_directory(shared_cell: LiveCell) -> None:
    done = subprocess.run(
        (
            *(HAVERSACK, "status", "--json", "--server", shared_cell.url),
            *("--token-file", str(shared_cell.token_file)),
        ),
        capture_output=True,
        text=True,
        check=True,
    )
    nodes = json.loads(done.stdout)["nodes"]
    assert len(nodes) == 9
    assert {node["state"] for node in nodes} == {"up"}
    assert len({node["pid"] for node in nodes}) == 9
    for node in nodes:
        assert set(node) >= {
            "id",
            "state",
            "pid",
            "directory",
            "host",
            "rack",
            "bytes",
            "fragments",
        }
        assert Path(node["directory"]).is_dir()
        os.kill(node["pid"], 0)


def test_a_second_up_on_the_same_directory_is_refused_with_the_pid(shared_cell: LiveCell) -> None:
    done = subprocess.run(
        (HAVERSACK, "up", "--data", str(shared_cell.data), "--port", "0"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert f"in use by pid {shared_cell.pid}" in done.stderr


def test_everything_listens_on_loopback_only(shared_cell: LiveCell) -> None:
    addresses = {
        connection.laddr.ip
        for process in shared_cell.processes()
        for connection in process.net_connections("tcp")
        if connection.status == "LISTEN"
    }
    assert addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_sigterm_stops_every_process_and_a_second_start_opens_the_same_data(
    own_cell: LiveCell,
) -> None:
    own_cell.start()
    own_cell.wait_for_nodes(9)
    ledger = Ledger()
    put_block(own_cell, b"kept over a restart" * 10_000, ledger)
    token = own_cell.token
    processes = own_cell.processes()
    own_cell.stop()
    assert [process for process in processes if process.is_running()] == []
    own_cell.start()
    assert own_cell.token == token
    assert len(ledger.acknowledged) == 1
    assert wrong_blocks(own_cell, ledger) == []


TAKES_ALL_NODES = {"cluster.supervisor", "gcs_server", "raylet/raylet"}
"""Processes without which Ray ends: the storage nodes go with them."""


def lives_of(cell: LiveCell) -> dict[str, int]:
    """The incarnation of each node."""
    return {str(node["id"]): int(node["incarnation"]) for node in cell.status()["nodes"]}


@pytest.mark.parametrize(
    "victim",
    [
        "api.gateway",
        "cluster.supervisor",
        "gcs_server",
        "raylet/raylet",
        "Placement",
        "StorageNode",
    ],
)
def test_sigkill_of_any_process_loses_nothing_and_the_cell_comes_back(
    own_cell: LiveCell, victim: str
) -> None:
    own_cell.start()
    own_cell.wait_for_nodes(9)
    writer = Writer(own_cell, clients=3, seed=1)
    writer.start()
    own_cell.wait_until("some blocks are acknowledged", lambda: writer.acknowledged() > 20, 60)
    before = lives_of(own_cell)
    process = own_cell.find(victim)
    doomed = {
        str(node["id"])
        for node in own_cell.status()["nodes"]
        if victim in TAKES_ALL_NODES or node["pid"] == process.pid
    }
    process.kill()
    own_cell.wait_until("the process is gone", lambda: not process.is_running(), 30)

    def doomed_nodes_live_again() -> bool:
        """What the last life still answers, while it lasts, proves nothing."""
        lives = lives_of(own_cell)
        return all(lives[name] > before[name] for name in doomed)

    own_cell.wait_until("what went with it lives again", doomed_nodes_live_again, 90)
    own_cell.wait_for_nodes(9, 90)
    after = lives_of(own_cell)

    def writes_work() -> bool:
        return put_block(own_cell, os.urandom(200_000), fresh) in fresh.acknowledged

    fresh = Ledger()
    own_cell.wait_until("writes work again", writes_work, 90)
    ledger = writer.stop()
    ledger.acknowledged.update(fresh.acknowledged)
    own_cell.wait_until("all reads back", lambda: wrong_blocks(own_cell, ledger) == [], 90)
    assert wrong_blocks(own_cell, ledger) == []
    assert lives_of(own_cell) == after  # nothing was ended once more, later than the rest


def test_a_controller_killed_as_soon_as_it_is_ready_leaves_no_process_behind(
    own_cell: LiveCell,
) -> None:
    """Ray would serve on for seconds beside its successor, or its GCS for ever."""
    own_cell.start()
    own_cell.wait_for_nodes(9)
    gateway = own_cell.gateway_pid
    old = [process for process in own_cell.processes() if process.pid != gateway]
    before = lives_of(own_cell)
    own_cell.find("cluster.supervisor").kill()

    def nodes_live_again() -> bool:
        return any(number > before[name] for name, number in lives_of(own_cell).items())

    own_cell.wait_until("a node lives again", nodes_live_again, 90)
    assert [process for process in old if process.is_running()] == []
    own_cell.wait_for_nodes(9, 90)


def test_sigkill_of_everything_in_the_middle_of_puts_loses_nothing_acknowledged(
    own_cell: LiveCell,
) -> None:
    own_cell.start()
    own_cell.wait_for_nodes(9)
    writer = Writer(own_cell, clients=6, seed=2)
    writer.start()
    own_cell.wait_until("many blocks are acknowledged", lambda: writer.acknowledged() > 60, 60)
    assert own_cell.kill_everything() > 12
    ledger = writer.stop()
    own_cell.start()
    assert len(ledger.acknowledged) > 60
    assert wrong_blocks(own_cell, ledger) == []


def test_a_terminal_interrupt_stops_the_cell_in_order(own_cell: LiveCell) -> None:
    own_cell.start()
    processes = own_cell.processes()
    os.killpg(own_cell.pid, signal.SIGINT)
    own_cell.wait_until(
        "every process has ended", lambda: not any(p.is_running() for p in processes), 60
    )
    own_cell.stop()
