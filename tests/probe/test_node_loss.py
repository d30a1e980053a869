"""Loss of nodes and directories of a running cell, up to m of k+m and one beyond."""

from __future__ import annotations

import os

from chaos.live.blocks import Ledger, put_block, wrong_blocks
from chaos.live.cell import LiveCell

SIZES = (1, 4_096, 100_000, 128 * 1024, 3_333_333, 4 * 1024 * 1024)


def _fill(cell: LiveCell, ledger: Ledger) -> None:
    for size in SIZES:
        put_block(cell, os.urandom(size), ledger)


def test_every_block_survives_m_nodes_and_writes_stop_cleanly_below_k_plus_1(
    own_cell: LiveCell,
) -> None:
    own_cell.start()
    own_cell.wait_for_nodes(9)
    ledger = Ledger()
    _fill(own_cell, ledger)
    assert len(ledger.acknowledged) == len(SIZES)

    own_cell.destroy_nodes(2)
    own_cell.wait_for_nodes(7)
    _fill(own_cell, ledger)
    assert len(ledger.acknowledged) == 2 * len(SIZES), "k+1 nodes are left: writes are taken"
    assert own_cell.status()["debts"] > 0
    assert wrong_blocks(own_cell, ledger) == []

    own_cell.destroy_nodes(1)
    own_cell.wait_for_nodes(6)
    assert wrong_blocks(own_cell, ledger) == [], "k nodes are left: everything reads back"
    before = len(ledger.acknowledged)
    put_block(own_cell, os.urandom(1_000_000), ledger)
    assert ledger.refused == {503: 1}, "k nodes are too few to take a write of a large block"
    assert len(ledger.acknowledged) == before
