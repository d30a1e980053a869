"""A small block workload over plain HTTP with a ledger of what was acknowledged.

The ledger is written before the next request is sent, so that after a SIGKILL of everything it
still says exactly which answers were received.
"""

from __future__ import annotations

import hashlib
import http.client
import random
import threading
from dataclasses import dataclass, field

from chaos.live.cell import LiveCell


@dataclass(slots=True)
class Ledger:
    """Blocks by name.  `acknowledged` were answered 200 or 201; `unknown` were sent without an
    answer; `refused` were answered with anything else, by status."""

    acknowledged: dict[str, bytes] = field(default_factory=dict)
    unknown: set[str] = field(default_factory=set)
    refused: dict[int, int] = field(default_factory=dict)


def put_block(cell: LiveCell, data: bytes, ledger: Ledger) -> str:
    """PUT one block and note what came back; returns its name."""
    name = hashlib.sha256(data).hexdigest()
    try:
        status, _ = cell.ask("PUT", f"/v1/blocks/{name}", data)
    except (OSError, http.client.HTTPException):
        ledger.unknown.add(name)
        return name
    if status in (200, 201):
        ledger.acknowledged[name] = data
    else:
        ledger.refused[status] = ledger.refused.get(status, 0) + 1
    return name


def wrong_blocks(cell: LiveCell, ledger: Ledger) -> list[str]:
    """Acknowledged blocks that do not come back byte for byte."""
    wrong = []
    for name, data in ledger.acknowledged.items():
        status, body = cell.ask("GET", f"/v1/blocks/{name}")
        if status != 200 or body != data:
            wrong.append(f"{name}: {status}, {len(body)} bytes")
    return wrong


class Writer:
    """Threads that put blocks of mixed sizes until told to stop, each with a ledger of its own.

    They are daemons: a test that fails before it stops them still ends.
    """

    SIZES = (1, 1_000, 5_000, 127 * 1024, 128 * 1024, 1_000_003, 4 * 1024 * 1024)

    def __init__(self, cell: LiveCell, clients: int, seed: int) -> None:
        self._cell = cell
        self._stop = threading.Event()
        self._ledgers = [Ledger() for _ in range(clients)]
        self._threads = [
            threading.Thread(
                target=self._run, args=(ledger, random.Random(f"{seed}/{i}")), daemon=True
            )
            for i, ledger in enumerate(self._ledgers)
        ]

    def _run(self, ledger: Ledger, rng: random.Random) -> None:
        while not self._stop.is_set():
            data = rng.randbytes(rng.choice(self.SIZES))
            put_block(self._cell, data, ledger)

    def start(self) -> None:
        """Begin writing."""
        for thread in self._threads:
            thread.start()

    def acknowledged(self) -> int:
        """Blocks acknowledged so far."""
        return sum(len(ledger.acknowledged) for ledger in self._ledgers)

    def stop(self) -> Ledger:
        """Stop, wait for the answers in flight, and join the ledgers."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        whole = Ledger()
        for ledger in self._ledgers:
            whole.acknowledged.update(ledger.acknowledged)
            whole.unknown |= ledger.unknown
            for status, count in ledger.refused.items():
                whole.refused[status] = whole.refused.get(status, 0) + count
        return whole
