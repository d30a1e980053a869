"""What is on the disks of a real cell, as its operator would have it counted.

Three witnesses that know nothing of each other: the verifier (`haversack verify --deep`), which
asks the nodes; `haversack fsck`, which reads the directories of a stopped cell; and the rows of
`cell.db`, which say what repair believes.
"""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chaos.live.cell import CellFailed, LiveCell

COMMAND_S_MAX = 240.0

STRAYS = frozenset({"misplaced", "stale copy", "orphan", "too young to tell"})
"""Classes of `haversack verify` by which no block lacks anything."""

LOSSES = frozenset(
    {
        "unreadable block",
        "block in an unknown volume",
        "reference to an unknown block",
        "owed fragment",
        "missing fragment",
        "corrupt record",
        "index entry without a record",
        "unreadable record",
        "block with fragments of two seals",
        "block whose lengths the index has wrong",
        "misplaced fragment",
    }
)
"""Kinds of `haversack fsck` by which a block lacks a fragment, or could."""


def run_command(*arguments: str, codes: Sequence[int] = (0,)) -> Any:
    """Run `haversack ... --json`; its JSON.  Raises `CellFailed` for another exit code."""
    done = subprocess.run(
        (str(Path(sys.executable).with_name("haversack")), *arguments, "--json"),
        check=False,
        capture_output=True,
        text=True,
        timeout=COMMAND_S_MAX,
        env={**os.environ, "NO_COLOR": "1"},
    )
    if done.returncode not in codes:
        said = f"{done.stderr}{done.stdout}"
        raise CellFailed(f"haversack {' '.join(arguments)}: {done.returncode}: {said}")
    return json.loads(done.stdout)


def ask_cell(cell: LiveCell, *arguments: str, codes: Sequence[int] = (0,)) -> Any:
    """The same, against a running cell."""
    where = ("--server", cell.url, "--token-file", str(cell.token_file))
    return run_command(*arguments, *where, codes=codes)


def verified(cell: LiveCell) -> dict[str, Any]:
    """A deep pass: what the nodes say that is on their disks."""
    return dict(ask_cell(cell, "verify", "--deep", codes=(0, 1)))


def lacking(report: dict[str, Any]) -> dict[str, int]:
    """Of a pass: the classes by which a block lacks a fragment, and slots nobody looked at."""
    found = {
        name: int(entry["count"])
        for name, entry in report["differences"].items()
        if entry["count"] and name not in STRAYS
    }
    if report["unlooked_slots"]:
        found["not looked at"] = int(report["unlooked_slots"])
    return found


def stray_count(report: dict[str, Any]) -> int:
    """Of a pass: fragments that are in no row's slot."""
    return sum(int(report["differences"][name]["count"]) for name in STRAYS)


def lacking_on_disk(data: Path) -> dict[str, int]:
    """What `haversack fsck --deep` of a stopped cell finds lost."""
    report = run_command("fsck", str(data), "--deep", "--quiet", codes=(0, 1, 2))
    return {name: entry for name, entry in report["found"].items() if name in LOSSES}


def rows(cell: LiveCell, query: str) -> list[tuple[Any, ...]]:
    """Read `cell.db` beside the processes that write it."""
    connection = sqlite3.connect(f"file:{cell.data / 'cell.db'}?mode=ro", uri=True)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


def slots_of(cell: LiveCell, node: str) -> int:
    """Slots that the map gives to a node."""
    return len(rows(cell, f"SELECT 1 FROM volume_slots WHERE node_id = '{node}'"))


def pending(cell: LiveCell) -> int:
    """Debts, moves and vacant slots of sealed volumes: what repair has yet to do."""
    vacant = (
        "SELECT 1 FROM volume_slots s JOIN volumes v USING (volume_id)"
        " WHERE s.node_id IS NULL AND v.state = 'sealed'"
    )
    return len(
        rows(cell, f"SELECT 1 FROM debts UNION ALL SELECT 1 FROM slot_moves UNION ALL {vacant}")
    )


def moves_begun(cell: LiveCell) -> int:
    """Moves under way."""
    return len(rows(cell, "SELECT 1 FROM slot_moves"))
