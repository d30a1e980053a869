"""`haversack node`, `rebalance` and `jobs` as a person reads them, and a cell with labels."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_cell import Cell, running_cell

from cli.prepare import prepare
from cluster.cell import open_cell
from protocol.config import load
from sql.database import Database
from sql.engine import sqlite_url


@pytest.fixture
def cell(tmp_path: Path) -> Iterator[Cell]:
    with running_cell(tmp_path, scheme="rs-2-1", nodes=4) as running:
        (tmp_path / "admin.token").write_text(running.tokens["admin"])
        yield running


def run(cell: Cell, *arguments: str) -> tuple[int, str, str]:
    assert cell.running is not None
    done = subprocess.run(
        (
            str(Path(sys.executable).with_name("haversack")),
            *("--server", cell.running.url, "--token-file", str(cell.directory / "admin.token")),
            *arguments,
        ),
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr


def test_nodes_plans_and_jobs_are_shown_and_steered(cell: Cell) -> None:
    code, out, _ = run(cell, "node", "list")
    assert code == 0
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [
        [f"node-0{number}", "up"] for number in range(1, 5)
    ]
    code, out, _ = run(cell, "node", "drain", "node-02", "--dry-run")
    assert code == 0
    assert "drain of node-02: 0 slots to move" in out
    assert "nothing was done" in out
    assert "moved later: " in out
    assert "is open: the placement service seals it first" in out
    assert "blocked" not in out
    code, out, _ = run(cell, "node", "drain", "node-02", "--detach")
    assert (code, out.splitlines()[0]) == (0, "job 1: drain of node-02, planned")
    code, _, err = run(cell, "node", "drain", "node-02", "--detach")
    assert code == 4
    assert "wrong_state" in err
    assert "haversack jobs cancel 1" in err
    assert run(cell, "jobs", "pause", "1")[0] == 0
    code, out, _ = run(cell, "jobs")
    assert (code, out.split()[:4]) == (0, ["1", "paused", "drain", "node-02"])
    code, out, _ = run(cell, "jobs", "show", "1", "--follow")
    assert (code, out.splitlines()[0]) == (1, "job 1: drain of node-02, paused")
    assert run(cell, "jobs", "resume", "1")[0] == 0
    code, out, _ = run(cell, "node", "undrain", "node-02")
    assert code == 0
    assert "up" in out
    assert "cancelled" in run(cell, "jobs", "show", "1")[1]
    assert run(cell, "jobs", "show", "9")[0] == 4


def test_a_cell_of_four_racks_of_three_is_made_by_labels(tmp_path: Path) -> None:
    labels = [f"node-{n + 1:02d}:rack=r{n // 3},host=h{n},weight=2" for n in range(12)]
    prepare(load(data=tmp_path, nodes=12, scheme="rs-6-3", node_labels=labels))
    database = Database(sqlite_url(tmp_path / "cell.db"), inline=True)
    made = open_cell(database)
    database.close()
    assert made is not None
    assert Counter(node.rack for node in made.nodes) == {f"r{n}": 3 for n in range(4)}
    assert len({node.host for node in made.nodes}) == 12
    assert {node.weight for node in made.nodes} == {2.0}
