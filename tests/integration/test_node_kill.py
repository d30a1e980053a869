"""SIGKILL of a real process in the middle of its group commits: every acknowledged record is back,
whole, and the store goes on."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from node_parts import fragment_key, noise, rocks

from protocol.limits import KIB

REPOSITORY = Path(__file__).resolve().parents[2]
SUPPORT = REPOSITORY / "tests" / "support"
ACKNOWLEDGED_MIN = 40

WRITER = """
    import sys
    from pathlib import Path
    from node_parts import fragment_key, noise, rocks
    from protocol.limits import MIB
    from storage_node import merge_plan

    directory, first, size, group, tidy = Path(sys.argv[1]), *map(int, sys.argv[2:])
    merge_plan.RUN_FILES_MIN = 4
    store = rocks(directory)
    number = first
    while True:
        numbers = range(number, number + group)
        store.put_group([(fragment_key(n), noise(n, size)) for n in numbers])
        if number > first:
            store.delete_group([fragment_key(number - group)])
            print(f"deleted {number - group}", flush=True)
        for n in numbers:
            print(f"stored {n}", flush=True)
        if tidy and number % (8 * group) == 0:
            store.tidy(64 * MIB)
        number += group
"""


def write_until_killed(directory: Path, first: int, size: int, group: int, tidy: bool) -> list[str]:
    """Start a writer, SIGKILL it once it has acknowledged enough; its acknowledgements."""
    command = [sys.executable, "-c", textwrap.dedent(WRITER)]
    command += map(str, (directory, first, size, group, int(tidy)))
    environment = {"PYTHONPATH": f"{REPOSITORY}:{SUPPORT}", "PATH": ""}
    lines: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.strip())
            if len(lines) == ACKNOWLEDGED_MIN + first % 17:  # another moment in each round
                process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    return lines


@pytest.mark.parametrize(
    ("size", "group", "tidy"),
    [(700, 5, False), (300 * KIB, 1, False), (300 * KIB, 3, False), (300 * KIB, 2, True)],
)
def test_every_acknowledged_record_outlives_a_sigkill(
    tmp_path: Path, size: int, group: int, tidy: bool
) -> None:
    directory = tmp_path / "node"
    for turn in range(3):
        first = 1 + 10_000 * turn
        lines = write_until_killed(directory, first, size, group, tidy)
        assert len(lines) >= ACKNOWLEDGED_MIN
        deleted = {int(line.split()[1]) for line in lines if line.startswith("deleted")}
        stored = {int(line.split()[1]) for line in lines if line.startswith("stored")}
        store = rocks(directory)
        last = max(stored)
        for number in sorted(stored - deleted):
            (answer,) = store.get_many([fragment_key(number)])
            if number > last - group and answer.record is None:
                continue  # its delete was under way, and may have been done
            assert answer.record == noise(number, size), number
        for number in deleted:
            (answer,) = store.get_many([fragment_key(number)])
            assert answer.record is None, number
        stats = store.stats()
        assert (stats.fragments, stats.fragment_bytes) == store.recount()
        store.put_group([(fragment_key(0), noise(0, size))])
        store.close()
