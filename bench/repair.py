"""How fast a lost node is made again: `python -m bench.repair [--gib 2] [--live]`.

Ten nodes as a user starts them, rs-6-3, no other traffic.  Random blocks of 4 MiB are put until a
node holds `--gib` of fragments; then that node is killed and its directory removed, and the time is
taken from the first move to the last publication: reading, decoding, writing, syncing and the
verification of every fragment on its new disk.  CPU is of all processes of the cell together, what
it costs when idle included.

`--live` measures GETs of whole blocks at half of the cell's maximum, on the whole cell, between the
loss and the repair, and during the repair.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sqlite3
import time
from typing import Any, NamedTuple

from bench import processes
from bench.repair_live import LiveClients
from chaos.live.blocks import Ledger, put_block
from chaos.live.cell import LiveCell
from protocol.limits import BLOCK_BYTES_MAX, GIB, MIB

NODES = 10
OUT_AFTER_S = "10"
WAIT_S = 1_800.0
WARM_S, MAXIMUM_S, HEALTHY_S = 3.0, 8.0, 20.0


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


def fill(cell: LiveCell, fragment_bytes: int) -> list[str]:
    """Put blocks until each node holds about so much; their names."""
    ledger = Ledger()
    blocks = fragment_bytes * NODES * 6 // 9 // BLOCK_BYTES_MAX
    names = []
    for _ in range(blocks):
        names.append(put_block(cell, os.urandom(BLOCK_BYTES_MAX), ledger))
        ledger.acknowledged.clear()  # it keeps the bodies
    return names


class Spell(NamedTuple):
    """A time by the monotonic clock."""

    began: float
    ended: float


def measure(cell: LiveCell) -> tuple[Spell, Spell]:
    """Lose the fullest node, wait until nothing of it is missed, print; when it was missed without
    being repaired, and when it was repaired."""
    victim = max(cell.status()["nodes"], key=lambda node: slots_of(cell, str(node["id"])))
    name, held = str(victim["id"]), int(victim["bytes"])
    shutil.rmtree(victim["directory"])
    os.kill(victim["pid"], signal.SIGKILL)
    lost = time.monotonic()
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
        f"repair wrote {made(cell)[1] / GIB:.2f} GiB",
        flush=True,
    )
    return Spell(lost, began), Spell(began, began + spent_s)


def measure_live(cell: LiveCell, names: list[str]) -> None:
    """`measure` beside clients; print their latencies."""
    LiveClients(cell, names, 0.0, WARM_S).samples()
    most = len(LiveClients(cell, names, 0.0, MAXIMUM_S).samples()) / MAXIMUM_S
    clients = LiveClients(cell, names, most / 2, WAIT_S)
    time.sleep(WARM_S)
    healthy = time.monotonic()
    time.sleep(HEALTHY_S)
    before = Spell(healthy, time.monotonic())
    missed, repaired = measure(cell)
    samples = clients.samples()
    print(f"GET 4 MiB: {most:.0f} a second at most; open loop at {most / 2:.0f} a second")
    p95 = 0.0
    for name, spell in (("whole", before), ("node lost", missed), ("in repair", repaired)):
        took = sorted(s.took_s * 1e3 for s in samples if spell.began <= s.due < spell.ended)
        p50, now, p99 = (took[int(len(took) * share)] for share in (0.5, 0.95, 0.99))
        p95 = p95 or now
        print(
            f"  {name:9}  {len(took):5} GETs, p50 {p50:6.1f} ms, p95 {now:6.1f} ms, "
            f"p99 {p99:6.1f} ms; p95 {now / p95:.2f} times that of the whole cell"
        )


def main() -> None:
    """Print one line."""
    parser = argparse.ArgumentParser(prog="python -m bench.repair")
    parser.add_argument("--gib", type=float, default=2.0, help="fragments on the lost node")
    parser.add_argument("--live", action="store_true", help="with clients beside it")
    arguments = parser.parse_args()
    os.environ["HAVERSACK_NODE_OUT_AFTER_S"] = OUT_AFTER_S
    os.environ["HAVERSACK_NODE_REFUSING_OUT_AFTER_S"] = OUT_AFTER_S
    with LiveCell(nodes=NODES) as cell:
        cell.start()
        cell.wait_for_nodes(NODES)
        names = fill(cell, int(arguments.gib * GIB))
        if arguments.live:
            measure_live(cell, names)
        else:
            measure(cell)


if __name__ == "__main__":
    main()
