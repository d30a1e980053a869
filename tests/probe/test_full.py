"""A cell is filled to its limit: it says so; reading and deleting go on."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from chaos.live import proof
from chaos.live.blocks import Ledger, put_block, wrong_blocks
from chaos.live.cell import LiveCell
from protocol.hashing import hash_block

NODES = 6
MIB = 1024 * 1024

SETTINGS = {
    "HAVERSACK_NODE_CAPACITY_BYTES": str(48 * MIB),
    "HAVERSACK_SPACE_PLACEMENT_PERCENT": "45",
    "HAVERSACK_SPACE_CLIENT_PERCENT": "50",
    "HAVERSACK_SPACE_REPAIR_PERCENT": "95",
    "HAVERSACK_NODE_DOWN_AFTER_S": "4",
    "HAVERSACK_LEASE_S": "6",
    "HAVERSACK_NODE_OUT_AFTER_S": "5",
    "HAVERSACK_NODE_REFUSING_OUT_AFTER_S": "6",
}


def test_a_full_cell_refuses_puts_by_name_and_reads_and_deletes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    with LiveCell(nodes=NODES, scheme="rs-2-1", data=tmp_path / "data") as cell:
        cell.start()
        cell.wait_for_nodes(NODES)
        (tmp_path / "file").write_bytes(os.urandom(3_000_000))
        where = ("--server", cell.url, "--token-file", str(cell.token_file))
        proof.run_command("put", str(tmp_path / "file"), "/file", "--quiet", *where)
        ledger = Ledger()
        refusal = _fill(cell, ledger)
        assert len(ledger.acknowledged) > NODES
        assert refusal["kind"] in ("node_full", "not_enough_nodes"), refusal
        assert "reads and deletes go on" in refusal["message"], refusal
        assert wrong_blocks(cell, ledger) == []
        entries = proof.run_command("ls", "/", *where)
        assert [entry["name"] for entry in entries] == ["file"]
        status, said = cell.ask("POST", "/v1/metadata/delete", b'{"path": "/file"}')
        assert status == 200, said
        assert wrong_blocks(cell, ledger) == []


def _fill(cell: LiveCell, ledger: Ledger) -> dict[str, str]:
    """Put until three puts in a row are refused; the last refusal."""
    rng = random.Random(5)
    refused = 0
    while True:
        data = rng.randbytes(4 * MIB)
        before = len(ledger.acknowledged)
        put_block(cell, data, ledger)
        refused = 0 if len(ledger.acknowledged) > before else refused + 1
        assert len(ledger.acknowledged) < 100, "it is never full"
        if refused == 3:
            name = hash_block(data)
            _, body = cell.ask("PUT", f"/v1/blocks/{name}", data)
            answer: dict[str, str] = json.loads(body)["error"]
            return answer
