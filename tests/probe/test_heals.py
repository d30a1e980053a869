"""A small cell is hurt in every way that one or two disks can be, and heals: counted on the disks.

One cell for all of it: a cell has to stand one thing after another.
Each test begins with everything repaired, ends so, and can be run alone.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chaos.live import proof
from chaos.live.blocks import Ledger, Writer, put_block, wrong_blocks
from chaos.live.cell import LiveCell

NODES = 9
SIZES = (1, 4_096, 100_000, 128 * 1024, 1_333_333, 4 * 1024 * 1024)

SOON = {
    "HAVERSACK_NODE_DOWN_AFTER_S": "4",
    "HAVERSACK_LEASE_S": "6",
    "HAVERSACK_NODE_OUT_AFTER_S": "5",
    "HAVERSACK_NODE_REFUSING_OUT_AFTER_S": "6",
}
"""A lost disk is out within seconds, whether its node is silent or refuses."""

PATIENT = {**SOON, "HAVERSACK_NODE_REFUSING_OUT_AFTER_S": "3600"}
"""A mount to be put right is waited for."""


class Hurt:
    """The cell, and what it has acknowledged so far."""

    def __init__(self, cell: LiveCell, patch: pytest.MonkeyPatch) -> None:
        self.cell = cell
        self.ledger = Ledger()
        self.nodes = NODES
        """That are not lost for good."""
        self._patch = patch
        self._rng = random.Random(7)

    def start(self, settings: dict[str, str], *, refusing: int = 0) -> None:
        for name, value in settings.items():
            self._patch.setenv(name, value)
        self.cell.start()
        self.cell.wait_for_nodes(self.nodes - refusing)

    def fill(self) -> None:
        for size in SIZES:
            put_block(self.cell, self._rng.randbytes(size), self.ledger)
        assert self.ledger.refused == {}
        assert self.ledger.unknown == set()

    def node(self, name: str) -> dict[str, Any]:
        (found,) = [node for node in self.cell.status()["nodes"] if node["id"] == name]
        return dict(found)

    def busiest(self, count: int = 1) -> list[dict[str, Any]]:
        """Nodes that are up, those with most bytes first."""
        up = [node for node in self.cell.status()["nodes"] if node["state"] == "up"]
        return sorted(up, key=lambda node: -int(node["bytes"]))[:count]

    def assert_whole(self) -> None:
        """Every acknowledged byte, every fragment, and the status line."""
        assert wrong_blocks(self.cell, self.ledger) == []
        assert proof.lacking(proof.verified(self.cell)) == {}
        status = self.cell.status()
        assert status["debts"] == 0
        assert min(map(int, status["redundancy"]["blocks_by_spare"])) >= 2

    def wait_repaired(self, *lost: str) -> None:
        def repaired() -> bool:
            left = sum(proof.slots_of(self.cell, node) for node in lost)
            return left == 0 and proof.pending(self.cell) == 0

        self.cell.wait_until(f"{', '.join(lost) or 'all'} repaired", repaired, 90)


@pytest.fixture(scope="module")
def hurt(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hurt]:
    """Nine nodes of an rs-3-2 cell: four more than a block has fragments."""
    with pytest.MonkeyPatch.context() as patch:
        data = tmp_path_factory.mktemp("heals") / "data"
        with LiveCell(nodes=NODES, scheme="rs-3-2", data=data) as cell:
            hurt = Hurt(cell, patch)
            hurt.start(SOON)
            hurt.fill()
            yield hurt


def test_a_node_lost_with_its_directory_under_load_is_made_again_on_the_others(hurt: Hurt) -> None:
    cell = hurt.cell
    writer = Writer(cell, clients=2, seed=11)
    writer.start()
    cell.wait_until("blocks are written", lambda: writer.acknowledged() > 20, 60)
    (victim,) = hurt.busiest()
    shutil.rmtree(victim["directory"])
    os.kill(victim["pid"], signal.SIGKILL)
    hurt.nodes -= 1
    cell.wait_for_nodes(hurt.nodes)
    seen = writer.acknowledged()
    cell.wait_until("writes go on", lambda: writer.acknowledged() > seen + 10, 60)
    written = writer.stop()
    assert len(written.acknowledged) > seen
    hurt.ledger.acknowledged.update(written.acknowledged)
    hurt.wait_repaired(str(victim["id"]))
    hurt.assert_whole()
    assert hurt.node(str(victim["id"]))["state"] == "down"
    assert not Path(victim["directory"]).exists(), "nobody made a store in its place"


def test_a_node_that_was_stopped_past_its_time_comes_back_fenced(hurt: Hurt) -> None:
    cell = hurt.cell
    (victim,) = hurt.busiest()
    name = str(victim["id"])
    os.kill(victim["pid"], signal.SIGSTOP)
    try:
        hurt.wait_repaired(name)
        hurt.fill()
        assert wrong_blocks(cell, hurt.ledger) == []
    finally:
        os.kill(victim["pid"], signal.SIGCONT)
    cell.wait_until("it is up again", lambda: hurt.node(name)["state"] == "up", 60)
    assert wrong_blocks(cell, hurt.ledger) == []
    # It may get slots of new volumes, and none of the old ones back.
    report = proof.verified(cell)
    assert proof.lacking(report) == {}
    assert report["differences"]["stale copy"]["count"] > 0, "what it held is in no slot any more"
    hurt.fill()
    hurt.assert_whole()


def test_a_flipped_byte_in_an_sst_file_is_found_by_a_scrub_and_mended(hurt: Hurt) -> None:
    cell = hurt.cell
    (victim,) = hurt.busiest()
    cell.stop()
    files = sorted(Path(victim["directory"], "store").glob("*.sst"))
    extent = next(path for path in files if path.stat().st_size > 100_000)  # the oldest
    with extent.open("r+b") as file:
        file.seek(extent.stat().st_size // 2)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes((byte ^ 1,)))
    hurt.start(SOON)
    assert _found_by_scrub(cell, "findings_of_pass") > 0

    def mended() -> bool:
        return _found_by_scrub(cell, "findings") == 0 and proof.pending(cell) == 0

    cell.wait_until("the fragment is mended", mended, 90)
    events = [row[0] for row in proof.rows(cell, "SELECT kind FROM events")]
    assert "debt found" in events
    hurt.assert_whole()


def test_swapped_directories_are_refused_and_serve_again_when_they_are_put_right(
    hurt: Hurt,
) -> None:
    cell = hurt.cell
    first, second = hurt.busiest(2)
    cell.stop()
    _swap(first["directory"], second["directory"])
    hurt.start(PATIENT, refusing=2)
    before = proof.moves_begun(cell), proof.slots_of(cell, str(first["id"]))
    assert before[1] > 0
    for node, other in ((first, second), (second, first)):

        def says_whose(name: str = str(node["id"]), other: str = str(other["id"])) -> bool:
            return f"belongs to {other}" in hurt.node(name)["detail"]

        cell.wait_until("it says whose directory that is", says_whose, 60)
    assert wrong_blocks(cell, hurt.ledger) == []
    _assert_no_mass_repair(hurt, first, second)

    _swap(first["directory"], second["directory"])
    cell.wait_for_nodes(hurt.nodes)
    assert proof.slots_of(cell, str(first["id"])) == before[1]
    hurt.wait_repaired()
    hurt.assert_whole()


def test_an_emptied_directory_is_refused_with_advice_and_starts_no_repair(hurt: Hurt) -> None:
    cell = hurt.cell
    cell.stop()
    hurt.start(PATIENT)
    (victim,) = hurt.busiest()
    name, directory = str(victim["id"]), Path(victim["directory"])
    aside = directory.with_name("aside")
    directory.rename(aside)
    directory.mkdir()
    os.kill(victim["pid"], signal.SIGKILL)
    cell.wait_until(
        "it asks for its disk", lambda: "is the disk mounted?" in hurt.node(name)["detail"], 60
    )
    _assert_no_mass_repair(hurt, victim)
    assert list(directory.iterdir()) == [], "a node never makes a store where one was"
    assert wrong_blocks(cell, hurt.ledger) == []
    assert proof.slots_of(cell, name) > 0

    directory.rmdir()
    aside.rename(directory)
    cell.wait_for_nodes(hurt.nodes)
    hurt.wait_repaired()
    hurt.assert_whole()
    cell.stop()
    assert proof.lacking_on_disk(cell.data) == {}, "counted once more, without any node's help"


def _found_by_scrub(cell: LiveCell, count: str) -> int:
    """Have every node read all it holds; the sum of a count.  A lost node makes the exit code 1."""
    answers = proof.ask_cell(cell, "scrub", "--now", "--quiet", codes=(0, 1))
    return sum(int(answer["scrub"][count]) for answer in answers if not answer["error"])


def _swap(first: str, second: str) -> None:
    spare = Path(first).with_name("spare")
    os.rename(first, spare)
    os.rename(second, first)
    os.rename(spare, second)


def _assert_no_mass_repair(hurt: Hurt, *nodes: dict[str, Any]) -> None:
    """Long after a silent node would be out, repair has looked and moved nothing."""
    cell = hurt.cell
    held = [_slots_with_blocks(cell, str(node["id"])) for node in nodes]
    for node in nodes:

        def advises(name: str = str(node["id"])) -> bool:
            return "put its directory right" in str(proof.ask_cell(cell, "why", name)["next"])

        cell.wait_until("why tells what to do", advises, 30)

    def is_overdue() -> bool:
        names = ", ".join(f"'{node['id']}'" for node in nodes)
        ages = proof.rows(
            cell,
            f"SELECT state_since FROM nodes WHERE node_id IN ({names})",
        )
        silent_s = 3 * float(SOON["HAVERSACK_NODE_OUT_AFTER_S"])
        return all(time.time() - since > silent_s for (since,) in ages)

    cell.wait_until("a silent node would be out for long", is_overdue, 60)
    assert [_slots_with_blocks(cell, str(node["id"])) for node in nodes] == held
    assert proof.moves_begun(cell) == 0


def _slots_with_blocks(cell: LiveCell, node: str) -> int:
    """Open volumes that never got a block go when they are sealed: nothing moves by that."""
    ((count,),) = proof.rows(
        cell,
        "SELECT count(*) FROM volume_slots JOIN volumes USING (volume_id) "
        f"WHERE blocks > 0 AND node_id = '{node}'",
    )
    return int(count)
