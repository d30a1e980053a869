"""A node is lost with its directory: its slots are made again elsewhere, counted on the disks."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
from pathlib import Path

import pytest

from chaos.live.blocks import Ledger, put_block, wrong_blocks
from chaos.live.cell import LiveCell

SIZES = (1, 4_096, 100_000, 128 * 1024, 3_333_333, 4 * 1024 * 1024)


@pytest.fixture
def patient_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LiveCell:
    """Ten nodes, out soon; not started yet."""
    monkeypatch.setenv("HAVERSACK_NODE_OUT_AFTER_S", "8")
    monkeypatch.setenv("HAVERSACK_NODE_REFUSING_OUT_AFTER_S", "8")
    return LiveCell(nodes=10, data=tmp_path / "data")


def _rows(cell: LiveCell, query: str) -> list[tuple[object, ...]]:
    connection = sqlite3.connect(f"file:{cell.data / 'cell.db'}?mode=ro", uri=True)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


def _slots_of(cell: LiveCell, node: str) -> int:
    ((count,),) = _rows(cell, f"SELECT count(*) FROM volume_slots WHERE node_id = '{node}'")
    assert isinstance(count, int)
    return count


def _healed(cell: LiveCell, lost: str) -> bool:
    pending = _rows(cell, "SELECT 1 FROM debts UNION ALL SELECT 1 FROM slot_moves")
    vacant = _rows(
        cell,
        "SELECT 1 FROM volume_slots s JOIN volumes v USING (volume_id)"
        " WHERE s.node_id IS NULL AND v.state = 'sealed'",
    )
    return _slots_of(cell, lost) == 0 and not pending and not vacant


def test_a_lost_node_is_made_again_elsewhere_and_its_empty_return_is_refused(
    patient_cell: LiveCell,
) -> None:
    with patient_cell as cell:
        cell.start()
        cell.wait_for_nodes(10)
        ledger = Ledger()
        for _ in range(4):
            for size in SIZES:
                put_block(cell, os.urandom(size), ledger)
        fragments = sum(
            int(str(blocks)) * (9 if scheme == "rs-6-3" else 4)
            for scheme, blocks in _rows(cell, "SELECT scheme, blocks FROM volumes")
        )
        victim = max(cell.status()["nodes"], key=lambda node: _slots_of(cell, str(node["id"])))
        name = str(victim["id"])
        assert _slots_of(cell, name) > 0
        shutil.rmtree(victim["directory"])
        os.kill(victim["pid"], signal.SIGKILL)
        cell.wait_for_nodes(9)
        cell.wait_until("every slot is made again", lambda: _healed(cell, name), 120)
        assert wrong_blocks(cell, ledger) == []

        def counted() -> bool:
            nodes = cell.status()["nodes"]
            return sum(int(node["fragments"]) for node in nodes if node["id"] != name) >= fragments

        cell.wait_until(f"{fragments} fragments are on the other disks", counted, 30)
        # Any three more may go now: the new fragments carry the blocks.
        os.mkdir(victim["directory"])
        refused = [node for node in cell.status()["nodes"] if node["id"] == name]
        assert refused[0]["state"] == "down"
        assert os.listdir(victim["directory"]) == [], "nobody creates a store under an old name"
        for node in cell.status()["nodes"][:3]:
            if node["id"] != name:
                os.kill(node["pid"], signal.SIGSTOP)
        try:
            assert wrong_blocks(cell, ledger) == []
        finally:
            for node in cell.status()["nodes"]:
                if node["id"] != name:
                    os.kill(node["pid"], signal.SIGCONT)
