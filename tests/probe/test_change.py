"""A running cell that is changed on purpose, by the commands an operator has."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from chaos.live.cell import LiveCell
from protocol.hashing import hash_block

DRAINED = "node-03"


def haversack(cell: LiveCell, *arguments: str) -> Any:
    """Run a command against the cell; its JSON."""
    done = subprocess.run(
        (
            str(Path(sys.executable).with_name("haversack")),
            *arguments,
            *("--json", "--server", cell.url, "--token-file", str(cell.token_file)),
        ),
        check=False,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "NO_COLOR": "1"},
    )
    assert done.returncode == 0, f"{arguments}: {done.stderr}{done.stdout}\n{cell.explain()}"
    return json.loads(done.stdout)


def put_blocks(cell: LiveCell, count: int, seed: int) -> dict[str, bytes]:
    """Large and small blocks, by their names."""
    rng = random.Random(seed)
    blocks = {}
    for number in range(count):
        data = rng.randbytes(300_000 if number % 2 else 4_000)
        name = str(hash_block(data))
        status, body = cell.ask("PUT", f"/v1/blocks/{name}", data)
        assert status == 201, body
        blocks[name] = data
    return blocks


def assert_all_read_back(cell: LiveCell, blocks: dict[str, bytes]) -> None:
    for name, data in blocks.items():
        status, body = cell.ask("GET", f"/v1/blocks/{name}")
        assert (status, body == data) == (200, True), f"block {name}: {status}"


def node(cell: LiveCell, name: str) -> dict[str, Any]:
    (found,) = [each for each in haversack(cell, "node", "list") if each["id"] == name]
    return dict(found)


def test_a_node_is_added_another_drained_and_removed_while_every_block_reads_back() -> None:
    with LiveCell(nodes=6, scheme="rs-2-1") as cell:
        cell.start()
        cell.wait_for_nodes(6)
        blocks = put_blocks(cell, 30, seed=1)
        disk = cell.data / "disk-seven"
        added = haversack(cell, "node", "add", "--directory", str(disk), "--rack", "r2")
        assert (added["id"], added["state"]) == ("node-07", "joining")
        cell.wait_for_nodes(7)

        plan = haversack(cell, "node", "drain", DRAINED, "--dry-run")["plan"]
        assert node(cell, DRAINED)["state"] == "up"
        assert plan["moves"] or plan["waiting"]
        assert plan["blocked"] == []
        job = haversack(cell, "node", "drain", DRAINED)
        assert (job["state"], job["blockers"]) == ("done", [])
        drained = node(cell, DRAINED)
        assert (drained["state"], drained["slots"]) == ("drained", 0)
        blocks |= put_blocks(cell, 6, seed=2)
        assert_all_read_back(cell, blocks)

        pid = next(n["pid"] for n in cell.status()["nodes"] if n["id"] == DRAINED)
        haversack(cell, "node", "decommission", DRAINED)
        assert node(cell, DRAINED)["state"] == "gone"
        cell.wait_until("its process ended", lambda: not _is_alive(pid), 40)
        assert Path(drained["directory"], "identity").exists()
        assert_all_read_back(cell, blocks)

        assert haversack(cell, "rebalance")["state"] == "done"
        assert_all_read_back(cell, blocks)
        cell.kill_everything()
        cell.start()
        cell.wait_for_nodes(6)
        assert_all_read_back(cell, blocks)


def _is_alive(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def test_a_cell_is_transcoded_while_it_is_read_and_every_block_is_identical() -> None:
    with LiveCell(nodes=6, scheme="rs-2-1") as cell:
        cell.start()
        cell.wait_for_nodes(6)
        blocks = put_blocks(cell, 24, seed=3)
        asked = ("transcode", "--from", "rs-2-1", "--to", "rs-3-2", "--for-new")
        plan = haversack(cell, *asked, "--dry-run")["plan"]
        assert len(plan["blocked"]) + len(plan["volumes"]) > 0
        number = haversack(cell, *asked, "--detach")["id"]

        def is_done() -> bool:
            assert_all_read_back(cell, blocks)
            status, body = cell.ask("GET", f"/v1/admin/jobs/{number}")
            assert status == 200, body
            return bool(json.loads(body)["state"] == "done")

        cell.wait_until("the job is done", is_done, 200)
        assert cell.status()["scheme"] == "rs-3-2"
        blocks |= put_blocks(cell, 6, seed=4)
        assert_all_read_back(cell, blocks)
        again = haversack(cell, *asked[:5], "--dry-run")["plan"]
        assert (again["volumes"], again["blocked"]) == ([], [])
        cell.kill_everything()
        cell.start()
        cell.wait_for_nodes(6)
        assert_all_read_back(cell, blocks)
