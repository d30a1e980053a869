"""A cell that lost its block index, made again from its disks and used again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from chaos.live.blocks import Ledger, put_block, wrong_blocks
from chaos.live.cell import LiveCell
from cli.compare import compare_trees

HAVERSACK = str(Path(sys.executable).with_name("haversack"))
SIZES = (1, 4_096, 100_000, 128 * 1024, 1_000_003, 4 * 1024 * 1024)


def haversack(cell: LiveCell, *arguments: str) -> None:
    server = ("--server", cell.url, "--token-file", str(cell.token_file))
    subprocess.run((HAVERSACK, *arguments, *server), check=True, capture_output=True)


def fsck(data: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(
        (HAVERSACK, "fsck", str(data), "--json", "--quiet", *arguments),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def make_tree(root: Path) -> None:
    for number, size in enumerate((0, 100, 5_000, 200_000, 9_000_001)):
        folder = root / f"folder-{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"noise-{number}").write_bytes(os.urandom(size))
        (folder / f"text-{number}").write_bytes(b"compresses well " * (size // 16))


def test_cell_without_its_index_and_without_a_disk_serves_every_block_again(
    own_cell: LiveCell, tmp_path: Path
) -> None:
    own_cell.start()
    own_cell.wait_for_nodes(9)
    ledger = Ledger()
    for size in SIZES:
        put_block(own_cell, os.urandom(size), ledger)
    make_tree(tmp_path / "tree")
    haversack(own_cell, "put", str(tmp_path / "tree"), "/tree")

    running, _ = subprocess.getstatusoutput(f"{HAVERSACK} fsck {own_cell.data}")
    assert running == 6, "a cell that runs is not looked at"
    own_cell.stop()
    code, report = fsck(own_cell.data, "--deep")
    assert (code, report["found"]) == (0, {})

    for path in own_cell.data.glob("cell.db*"):
        path.unlink()
    shutil.rmtree(own_cell.data / "nodes" / "node-04")
    code, made = fsck(own_cell.data, "--rebuild-index")
    assert code == 0, made
    assert made["blocks"] == report["blocks"]
    assert made["vacant_slots"] > 0
    assert made["unreadable"] == 0

    own_cell.start()
    own_cell.wait_for_nodes(9)  # the ninth is new, under the name of the lost one
    haversack(own_cell, "get", "/tree", str(tmp_path / "back"))
    compared = compare_trees(str(tmp_path / "tree"), str(tmp_path / "back"), frozenset())
    assert (compared.files, compared.differences) == (10, [])

    assert len(wrong_blocks(own_cell, ledger)) == len(SIZES), (
        "no reference, and the claims are lost"
    )
    for data in list(ledger.acknowledged.values()):
        assert put_block(own_cell, data, ledger) in ledger.acknowledged
    assert own_cell.status()["blocks"] == made["blocks"], "they were there: nothing new was stored"
    assert wrong_blocks(own_cell, ledger) == []
    for size in SIZES:
        put_block(own_cell, os.urandom(size), ledger)
    assert len(ledger.acknowledged) == 2 * len(SIZES)
    assert wrong_blocks(own_cell, ledger) == []
