"""How fast a lost node is made again: `python -m bench.repair [--gib 2]`.

Ten nodes as a user starts them, rs-6-3, no other traffic.  Random blocks of 4 MiB are put until a
node holds `--gib` of fragments; then that node is killed and its directory removed, and the time is
taken from the first move to the last publication: reading, decoding, writing, syncing and the
verification of every fragment on its new disk.  CPU is of all processes of the cell together.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sqlite3
import time
from typing import Any

from bench import processes
from chaos.live.blocks import Ledger, put_block
from chaos.live.cell import LiveCell
from protocol.limits import BLOCK_BYTES_MAX, GIB, MIB

NODES = 10
OUT_AFTER_S = "10"
WAIT_S = 1_800.0


def look(cell: LiveCell, query: str) -> list[tuple[Any, ...]]:
    """Rows of `cell.db`, past the cell."""
    connection = sqlite3.connect(f"file:{cell.data / 'cell.db'}?mode=ro", uri=True)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


def slots_of(cell: LiveCell, node: str) -> int:
    """Slots that the map gives to a node."""
    ((count,),) = look(cell, f"SELECT count(*) FROM volume_slots WHERE node_id = '{node}'")
    return int(count)


def made(cell: LiveCell) -> tuple[int, int]:
    """Fragments and bytes that repair says it made."""
    rows = look(cell, "SELECT body FROM passes WHERE kind = 'repair'")
    body = json.loads(rows[0][0]) if rows else {}
    return int(body.get("made_fragments", 0)), int(body.get("made_bytes", 0))


def fill(cell: LiveCell, fragment_bytes: int) -> None:
    """Put blocks until each node holds about so much."""
    ledger = Ledger()
    blocks = fragment_bytes * NODES * 6 // 9 // BLOCK_BYTES_MAX
    for _ in range(blocks):
        put_block(cell, os.urandom(BLOCK_BYTES_MAX), ledger)


def measure(cell: LiveCell) -> None:
    """Lose the fullest node, wait until nothing of it is missed, print."""
    victim = max(cell.status()["nodes"], key=lambda node: slots_of(cell, str(node["id"])))
    name, held = str(victim["id"]), int(victim["bytes"])
    shutil.rmtree(victim["directory"])
    os.kill(victim["pid"], signal.SIGKILL)
    cell.wait_until(
        "repair begins", lambda: bool(look(cell, "SELECT 1 FROM slot_moves LIMIT 1")), WAIT_S
    )
    began, cpu = time.monotonic(), processes.cpu_seconds(cell.pid)
    cell.wait_until("all is made again", lambda: slots_of(cell, name) == 0, WAIT_S)
    spent_s, cpu = time.monotonic() - began, processes.cpu_seconds(cell.pid) - cpu
    cell.wait_until("repair reports", lambda: made(cell)[1] > 0, 60.0)
    print(
        f"{held / GIB:.2f} GiB of fragments made again and verified in {spent_s:.1f} s: "
        f"{held / spent_s / MIB:.0f} MiB/s, {cpu / (held / GIB):.1f} CPU s a GiB; "
        f"repair wrote {made(cell)[1] / GIB:.2f} GiB"
    )


def main() -> None:
    """Print one line."""
    parser = argparse.ArgumentParser(prog="python -m bench.repair")
    parser.add_argument("--gib", type=float, default=2.0, help="fragments on the lost node")
    gib = parser.parse_args().gib
    os.environ["HAVERSACK_NODE_OUT_AFTER_S"] = OUT_AFTER_S
    os.environ["HAVERSACK_NODE_REFUSING_OUT_AFTER_S"] = OUT_AFTER_S
    with LiveCell(nodes=NODES) as cell:
        cell.start()
        cell.wait_for_nodes(NODES)
        fill(cell, int(gib * GIB))
        measure(cell)


if __name__ == "__main__":
    main()
