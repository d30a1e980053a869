"""A rack is lost from a cell of four, and its repair is killed again and again until it is done."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from chaos.live import proof
from chaos.live.blocks import Ledger, put_block, wrong_blocks
from chaos.live.cell import LiveCell

RACKS = 4
NODES = 12
INTERRUPTIONS = 10
SIZES = (1, 4_096, 100_000, 128 * 1024, 1_333_333, 4 * 1024 * 1024)

SETTINGS = {
    "HAVERSACK_NODE_DOWN_AFTER_S": "4",
    "HAVERSACK_LEASE_S": "6",
    "HAVERSACK_NODE_OUT_AFTER_S": "5",
    "HAVERSACK_NODE_REFUSING_OUT_AFTER_S": "6",
    # So slow that ten interruptions find it at work: some 40 MB have to be made.
    "HAVERSACK_REPAIR_BYTES_PER_S_MAX": "1000000",
    "HAVERSACK_REPAIR_BYTES_PER_S_MIN": "1000000",
    # Many small volumes, so that interruptions meet every step of a move.
    "HAVERSACK_VOLUME_BYTES": "8000000",
}


def _labels() -> list[str]:
    return [f"node-{1 + at:02}:rack=r{1 + at % RACKS}" for at in range(NODES)]


def test_a_lost_rack_is_survived_as_foretold_and_repaired_through_ten_interruptions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    rng = random.Random(23)
    arguments = [word for label in _labels() for word in ("--label", label)]
    with LiveCell(nodes=NODES, data=tmp_path / "data", arguments=arguments) as cell:
        cell.start()
        cell.wait_for_nodes(NODES)
        ledger = Ledger()
        for _ in range(20):
            for size in SIZES:
                put_block(cell, rng.randbytes(size), ledger)
        assert (ledger.refused, ledger.unknown) == ({}, set())

        foretold = proof.ask_cell(cell, "what-if", "lose", "r2")
        assert foretold["unreadable"]["blocks"] == 0
        assert foretold["fragments_of_one_block_max"] <= 3
        assert len(foretold["nodes"]) == NODES // RACKS
        lost = _lose_rack(cell, "r2")
        assert sorted(lost) == sorted(foretold["nodes"])
        assert wrong_blocks(cell, ledger) == [], "every block reads without the rack"

        cell.wait_until("repair begins", lambda: proof.moves_begun(cell) > 0, 60)
        for number in range(INTERRUPTIONS):
            _interrupt(cell, lost, number, rng)
            if number % 3 == 2:
                assert wrong_blocks(cell, ledger) == []

        cell.wait_until("the rack's slots are elsewhere", lambda: _left(cell, lost) == 0, 150)
        assert wrong_blocks(cell, ledger) == []
        assert proof.lacking(proof.verified(cell)) == {}
        cell.stop()
        assert proof.lacking_on_disk(cell.data) == {}


def _lose_rack(cell: LiveCell, rack: str) -> list[str]:
    """Directories and processes, all at once; the ids."""
    victims = [node for node in cell.status()["nodes"] if node["rack"] == rack]
    for node in victims:
        shutil.rmtree(node["directory"])
    for node in victims:
        os.kill(node["pid"], signal.SIGKILL)
    cell.wait_for_nodes(NODES - len(victims))
    return [str(node["id"]) for node in victims]


def _left(cell: LiveCell, lost: list[str]) -> int:
    """Slots that lost nodes hold, and whatever else repair has yet to do."""
    return proof.pending(cell) + sum(proof.slots_of(cell, node) for node in lost)


def _interrupt(cell: LiveCell, lost: list[str], number: int, rng: random.Random) -> None:
    """SIGKILL at some point of a move: of repair itself, once of a target, once of everything."""
    looks = iter([False] * rng.randrange(20))

    def at_work() -> bool:
        return _left(cell, lost) == 0 or (proof.moves_begun(cell) > 0 and next(looks, True))

    cell.wait_until("repair is at work", at_work, 90)
    assert _left(cell, lost) > 0, f"repair was done before interruption {number}: slow it down"
    match number:
        case 4:
            target = rng.choice(proof.rows(cell, "SELECT target FROM slot_moves") or [("",)])[0]
            nodes = [node for node in cell.status()["nodes"] if node["state"] == "up"]
            victim = next((node for node in nodes if node["id"] == target), nodes[0])
            os.kill(victim["pid"], signal.SIGKILL)
            cell.wait_until("it lives again", lambda: _lives(cell, victim), 60)
        case 7:
            cell.kill_everything()
            cell.start()
        case _:
            repair = cell.find("RepairActor")
            repair.kill()
            cell.wait_until("it is gone", lambda: not _runs(repair), 30)
            cell.wait_until("another leads", lambda: _runs(cell.find("RepairActor")), 60)


def _lives(cell: LiveCell, before: dict[str, Any]) -> bool:
    nodes = {node["id"]: node for node in cell.status()["nodes"]}
    now = nodes[before["id"]]
    return bool(now["incarnation"] > before["incarnation"] and now["state"] == "up")


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False
