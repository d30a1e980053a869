"""`fsck --rebuild-index` on real node directories: the lost index against the one made again."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from block_cell import data_of
from cell_rows import CLUSTER_ID
from disk_cell import DiskCell, on_disks, rows_of, tree_digest
from node_parts import noise
from test_fsck_report import LARGE, SMALL, TEXT, fill, flip_byte_of, lose_fragment

from cluster.block_index import BlockRow
from cluster.cell import open_cell
from cluster.fsck import switch
from cluster.fsck.check import check
from cluster.fsck.rebuild import Place, RebuildRequest, Rebuilt, rebuild
from cluster.fsck.report import Kind
from cluster.topology import NodeState
from erasure.keyring import Keyring
from erasure.scheme import Scheme
from protocol.errors import ConfigInvalid
from protocol.hashing import hash_block
from protocol.ids import NodeId
from sql.database import Database
from sql.engine import sqlite_url
from storage_node.interface import FragmentKey

NOW = 1_795_400_000.0
HERE = Place("this-host", "rack-1", 1.0)
INDEX = "hash, volume_id, stored_bytes, plain_bytes, state"
COUNTS = "volume_id, scheme, stored_bytes, plain_bytes, blocks"


def again(data: Path, **options: Any) -> Rebuilt:
    return rebuild(RebuildRequest(data, NOW, {}, HERE, **options))


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("filled")
    on_disks(data, fill)
    return data


@pytest.fixture
def data(filled: Path, tmp_path: Path) -> Path:
    """A copy of the filled cell that a test may break."""
    copy = tmp_path / "data"
    shutil.copytree(filled, copy)
    return copy


def lost(data: Path) -> Path:
    """The databases go; returns where the index of before is."""
    before = data.parent / "before.db"
    shutil.move(data / "cell.db", before)
    return before


def used_volumes(before: Path) -> list[tuple[Any, ...]]:
    return [row for row in rows_of(before, "volumes", COUNTS) if row[-1] > 0]


def test_rebuilt_index_is_the_lost_one_row_by_row(data: Path) -> None:
    before = lost(data)
    made = again(data)
    after = data / "cell.db"
    assert made.notes == {}
    assert made.kept == ""
    assert rows_of(after, "blocks", INDEX) == rows_of(before, "blocks", INDEX)
    volumes = used_volumes(before)
    assert rows_of(after, "volumes", COUNTS) == volumes
    slots = rows_of(before, "volume_slots")
    assert rows_of(after, "volume_slots") == [
        row for row in slots if row[0] in {volume[0] for volume in volumes}
    ]
    names = "node_id, store_id, state"
    assert rows_of(after, "nodes", names) == rows_of(before, "nodes", names)
    assert rows_of(after, "debts") == []
    same = "cluster_id, scheme, format, fingerprint"
    assert rows_of(after, "cell", same) == rows_of(before, "cell", same)


def test_numbers_of_the_rebuilt_cell_lie_beyond_all_that_disks_know(data: Path) -> None:
    before = lost(data)
    again(data)
    after = data / "cell.db"
    old = dict(rows_of(before, "nodes", "node_id, incarnation"))
    assert all(
        incarnation > old[node]
        for node, incarnation in rows_of(after, "nodes", "node_id, incarnation")
    )
    epochs = dict(rows_of(before, "volumes", "volume_id, epoch"))
    assert all(
        epoch > epochs[volume] for volume, epoch in rows_of(after, "volumes", "volume_id, epoch")
    )
    ((next_volume,),) = rows_of(after, "map_version", "next_volume")
    assert next_volume > max(epochs)
    assert rows_of(after, "volumes", "DISTINCT state") == [("sealed",)]


def test_check_of_a_rebuilt_cell_is_clean(data: Path) -> None:
    lost(data)
    again(data)
    report = check(data / "cell.db", data / "metadata.db", data, deep=True)
    assert report.clean, report.found


def test_encrypted_and_compressed_blocks_are_found_without_the_key(tmp_path: Path) -> None:
    on_disks(tmp_path, fill, keyring=Keyring([b"k" * 32]), compress=True)
    before = rows_of(tmp_path / "cell.db", "blocks", INDEX)
    made = again(tmp_path)
    assert made.notes == {}
    assert rows_of(tmp_path / "cell.db", "blocks", INDEX) == before


def test_crashed_cell_is_rebuilt_whole(tmp_path: Path) -> None:
    running, data = tmp_path / "running", tmp_path / "data"
    running.mkdir()

    async def crash(cell: DiskCell) -> None:
        await fill(cell)
        shutil.copytree(running, data)

    on_disks(running, crash)
    log = (data / "cell.db-wal").read_bytes()
    made = again(data)
    assert made.blocks == 15
    assert rows_of(data / "cell.db", "blocks", INDEX) == rows_of(
        running / "cell.db", "blocks", INDEX
    )
    assert Path(made.kept + "-wal").read_bytes() == log, "what was only in the log is kept too"
    assert len(rows_of(Path(made.kept), "blocks")) == 15
    assert not (data / "cell.db-wal").exists()


@pytest.mark.parametrize("deep", [False, True])
def test_lost_node_leaves_vacant_slots_and_debts(data: Path, deep: bool) -> None:
    before = lost(data)
    held = [row for row in rows_of(before, "volume_slots") if row[2] == "node-02"]
    used = {row[0] for row in used_volumes(before)}
    shutil.rmtree(data / "nodes" / "node-02")
    made = again(data, deep=deep)
    after = data / "cell.db"
    assert rows_of(after, "blocks", INDEX) == rows_of(before, "blocks", INDEX)
    vacant = [(row[0], row[1]) for row in rows_of(after, "volume_slots") if row[2] is None]
    assert vacant == [(volume, slot) for volume, slot, _ in held if volume in used]
    assert made.vacant_slots == len(vacant) > 0
    debts = rows_of(after, "debts", "volume_id, slot, hash, reason")
    volume_of = {row[0]: row[1] for row in rows_of(before, "blocks", INDEX)}
    assert debts == sorted(
        (volume, slot, name, "missing")
        for volume, slot in vacant
        for name, where in volume_of.items()
        if where == volume
    )
    assert made.unreadable == 0


def test_flipped_byte_becomes_a_debt_of_that_slot(data: Path) -> None:
    lost(data)
    path = flip_byte_of(data, LARGE[0][50_000:50_100])
    made = again(data, deep=True)
    debts = rows_of(data / "cell.db", "debts", "slot, hash, reason")
    assert {reason for _, _, reason in debts} == {"corrupt"}
    assert bytes(hash_block(LARGE[0])) in {name for _, name, _ in debts}
    assert made.debts == len(debts)
    assert path.parents[1].name in {
        node
        for volume, slot, node in rows_of(data / "cell.db", "volume_slots")
        if (volume, slot) in {row[:2] for row in rows_of(data / "cell.db", "debts")}
    }


def test_deleted_blocks_do_not_come_back(tmp_path: Path) -> None:
    async def main(cell: DiskCell) -> None:
        await fill(cell)
        for data in (LARGE[0], SMALL[0]):
            cell.remove_block(hash_block(data))

    on_disks(tmp_path, main)
    before = rows_of(tmp_path / "cell.db", "blocks", INDEX)
    assert again(tmp_path).blocks == 13
    assert rows_of(tmp_path / "cell.db", "blocks", INDEX) == before


def test_block_that_too_few_fragments_are_left_of_is_kept_while_a_node_may_come_back(
    tmp_path: Path,
) -> None:
    async def main(cell: DiskCell) -> None:
        await fill(cell)

    on_disks(tmp_path, main, nodes=4)
    before = rows_of(tmp_path / "cell.db", "blocks", INDEX)
    for number in (1, 2, 3):
        shutil.rmtree(tmp_path / "nodes" / f"node-0{number}")
    made = again(tmp_path)
    assert rows_of(tmp_path / "cell.db", "blocks", INDEX) == [
        row for row in before if row in rows_of(tmp_path / "cell.db", "blocks", INDEX)
    ]
    large = {bytes(hash_block(data)) for data in (*LARGE, *TEXT)}
    assert large <= {row[0] for row in rows_of(tmp_path / "cell.db", "blocks", INDEX)}
    assert {row[0] for row in rows_of(tmp_path / "cell.db", "unrepairable")} == large
    assert made.unreadable == len(large)


def test_remains_of_a_put_that_failed_are_not_taken_for_a_block(tmp_path: Path) -> None:
    """Were they in the index, the next put of the block would be told that it is there."""

    async def main(cell: DiskCell) -> None:
        await fill(cell)
        row = await cell.row_of(LARGE[0])
        assert row is not None
        slots = await cell.slots_of(LARGE[0])
        for slot in (1, 2, 3):
            lose_fragment(cell, FragmentKey(row.volume, row.hash, slot), slots[slot])

    on_disks(tmp_path, main)
    made = again(tmp_path)
    names = {row[0] for row in rows_of(tmp_path / "cell.db", "blocks", INDEX)}
    assert bytes(hash_block(LARGE[0])) not in names
    assert len(names) == 14
    assert made.notes.total() == 1


async def copy_slot(cell: DiskCell, row: BlockRow, slot: int, target: NodeId) -> None:
    source = (await cell.map.volume(row.volume)).slots[slot]
    assert source is not None
    key = FragmentKey(row.volume, row.hash, slot)
    (answer,) = cell.stores[source].get_many([key])
    assert answer.record is not None
    cell.stores[target].put_group([(key, answer.record)])


@pytest.mark.parametrize("whole", [True, False])
def test_slot_with_two_claims_goes_to_the_whole_set_and_then_to_the_later_epoch(
    tmp_path: Path, whole: bool
) -> None:
    """A move that was published, and one that was not finished."""
    expected: list[Any] = []

    async def main(cell: DiskCell) -> None:
        await fill(cell)
        rows = [row for row in cell.all_rows() if row.plain_bytes >= 200_000]
        volume = await cell.map.volume(rows[0].volume)
        mine = [row for row in rows if row.volume == volume.volume_id]
        other = next(node for node in cell.node_ids if node not in volume.slots)
        for row in mine if whole else mine[1:]:
            await copy_slot(cell, row, 2, other)
        name = f"epoch/{volume.volume_id}"
        cell.stores[other].put_state({name: (volume.epoch + 1).to_bytes(8, "big")})
        expected.extend((int(volume.volume_id), 2, other if whole else volume.slots[2]))
        assert len(mine) > 1

    on_disks(tmp_path, main)
    made = again(tmp_path)
    assert tuple(expected) in rows_of(tmp_path / "cell.db", "volume_slots")
    (kind,) = made.notes
    assert kind.startswith("claim to a slot")
    assert made.blocks == 15
    assert made.debts == 0


def test_block_in_two_volumes_belongs_to_the_one_with_more_spare_fragments(tmp_path: Path) -> None:
    places: list[Any] = []

    async def main(cell: DiskCell) -> None:
        """The block is forgotten by the index, put again elsewhere, and loses a fragment there."""
        await cell.put(LARGE[0])
        await cell.put(LARGE[1])
        first = await cell.row_of(LARGE[0])
        assert first is not None
        cell.db.transact(
            lambda c: c.exec_driver_sql("DELETE FROM blocks WHERE hash = ?", (bytes(first.hash),))
        )
        for volume in cell.volumes_opened:
            cell.seal_volume(volume)
        cell.open_volume(cell.scheme)
        await cell.clock.sleep(2)
        _, cell.client = cell.new_client(5)
        await cell.put(LARGE[0])
        second = await cell.row_of(LARGE[0])
        assert second is not None
        assert second.volume != first.volume
        slots = await cell.slots_of(LARGE[0])
        lose_fragment(cell, FragmentKey(second.volume, second.hash, 1), slots[1])
        places.append(int(first.volume))

    on_disks(tmp_path, main)
    made = again(tmp_path)
    rows = dict(rows_of(tmp_path / "cell.db", "blocks", "hash, volume_id"))
    assert rows[bytes(hash_block(LARGE[0]))] == places[0]
    assert made.blocks == 2
    assert made.debts == 0
    assert made.notes.total() == 1


def test_rebuild_of_its_own_output_changes_nothing(data: Path) -> None:
    shutil.rmtree(data / "nodes" / "node-01")
    again(data)
    tables = ("cell", "map_version", "nodes", "volumes", "volume_slots", "blocks", "debts")
    first = {table: rows_of(data / "cell.db", table) for table in tables}
    again(data)
    assert {table: rows_of(data / "cell.db", table) for table in tables} == first


def test_disks_are_not_changed_by_a_rebuild(data: Path) -> None:
    before = tree_digest(data / "nodes")
    again(data, deep=True)
    assert tree_digest(data / "nodes") == before


def test_scheme_is_asked_for_where_the_disks_do_not_say(tmp_path: Path) -> None:
    async def main(cell: DiskCell) -> None:
        for small in SMALL:
            await cell.put(small)

    on_disks(tmp_path, main)
    before = tree_digest(tmp_path)
    with pytest.raises(ConfigInvalid, match="replica-3"):
        again(tmp_path)
    assert tree_digest(tmp_path) == before
    made = again(tmp_path, scheme=Scheme.parse("rs-2-2"))
    assert made.blocks == len(SMALL)
    database = Database(sqlite_url(tmp_path / "cell.db"), inline=True)
    cell = open_cell(database, Scheme.parse("rs-2-2"))
    database.close()
    assert cell is not None
    assert cell.cluster_id == CLUSTER_ID
    assert {node.state for node in cell.nodes} == {NodeState.SUSPECT}


def test_directories_of_two_cells_or_of_one_node_twice_are_refused(data: Path) -> None:
    shutil.copytree(data / "nodes" / "node-01", data / "nodes" / "copy")
    before = tree_digest(data)
    with pytest.raises(ConfigInvalid, match="node-01"):
        again(data)
    assert tree_digest(data) == before


def test_sigkill_before_the_end_leaves_the_old_index_and_a_rerun_works(data: Path) -> None:
    """At moments spread over the whole run, the last of them after it."""
    expected = rows_of(data / "cell.db", "blocks", INDEX)
    command = (sys.executable, "-m", "cli.main", "fsck", str(data), "--rebuild-index", "--json")
    rng = random.Random(7)
    killed = 0
    for attempt in range(6):
        old = (data / "cell.db").read_bytes()
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            until = time.monotonic() + 0.6 + 0.25 * attempt + rng.random() / 4
            while process.poll() is None and time.monotonic() < until:
                os.sched_yield()
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                killed += 1
        switched = (data / switch.REBUILT).exists() or list(data.glob("cell.db.before-*"))
        assert switched or (data / "cell.db").read_bytes() == old
        if switched:
            switch.finish(data)
        assert rows_of(data / "cell.db", "blocks", INDEX) == expected
    assert killed > 0
    again(data)
    assert rows_of(data / "cell.db", "blocks", INDEX) == expected
    leftovers = {path.name for path in data.iterdir() if "rebuil" in path.name}
    assert leftovers == set()


class PowerCut(Exception):
    """The process ends here."""


@pytest.mark.parametrize("log", [True, False])
def test_switch_may_end_at_any_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: bool
) -> None:
    """After each step: either the old files are as they were, or `finish` makes the new one the
    cell's and keeps the old ones together."""
    step = 0
    while True:
        data = tmp_path / f"{log}-{step}"
        data.mkdir()
        (data / "cell.db").write_bytes(b"old")
        if log:
            (data / "cell.db-wal").write_bytes(b"old log")
            (data / "cell.db-shm").write_bytes(b"shared")
        (data / switch.REBUILDING).write_bytes(b"new")
        left = step
        rename, unlink = Path.rename, Path.unlink

        def counted(work: Any) -> Any:
            def wrapped(*arguments: Any, **options: Any) -> Any:
                nonlocal left
                if left == 0:
                    raise PowerCut
                left -= 1
                return work(*arguments, **options)

            return wrapped

        with monkeypatch.context() as patched:
            patched.setattr(Path, "rename", counted(rename))
            patched.setattr(Path, "unlink", counted(unlink))
            try:
                switch.commit(data)
                ended = True
            except PowerCut:
                ended = False
        if step == 0:
            assert (data / "cell.db").read_bytes() == b"old"
            assert not log or (data / "cell.db-wal").read_bytes() == b"old log"
            assert switch.finish(data) is None
        else:
            switch.finish(data)
            assert (data / "cell.db").read_bytes() == b"new"
            (kept,) = data.glob("cell.db.before-*Z")
            assert kept.read_bytes() == b"old"
            assert not log or kept.with_name(kept.name + "-wal").read_bytes() == b"old log"
            assert not (data / "cell.db-wal").exists()
            assert not (data / switch.REBUILT).exists()
        if ended:
            assert step > 2
            return
        step += 1


def test_corrupt_database_is_replaced_and_kept(data: Path) -> None:
    expected = rows_of(data / "cell.db", "blocks", INDEX)
    (data / "cell.db").write_bytes(b"not a database at all" * 1_000)
    made = again(data)
    assert rows_of(data / "cell.db", "blocks", INDEX) == expected
    assert Path(made.kept).read_bytes().startswith(b"not a database")


def test_node_whose_index_is_damaged_speaks_for_what_can_be_read(data: Path) -> None:
    """Its slots stay its own; what was not seen is owed."""
    before = rows_of(data / "cell.db", "blocks", INDEX)
    path = max(
        (data / "nodes" / "node-03" / "store").glob("*.sst"),
        key=lambda file: file.read_bytes().count(bytes(hash_block(LARGE[0]))[:8]),
    )
    path.write_bytes(os.urandom(path.stat().st_size))
    made = again(data)
    assert rows_of(data / "cell.db", "blocks", INDEX) == before
    report = check(data / "cell.db", data / "metadata.db", data, deep=False)
    assert report.found[Kind.UNREADABLE_BLOCK] == 0
    assert made.unreadable == 0


def test_blocks_kept_in_a_rebuilt_index_can_be_put_again_elsewhere_and_read(data: Path) -> None:
    """The rows are rows like any other: a second connection can add to them."""
    lost(data)
    again(data)
    with closing(sqlite3.connect(data / "cell.db")) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert database.execute("SELECT version_num FROM alembic_version").fetchone() is not None


def test_more_blocks_than_a_batch_are_all_found(tmp_path: Path) -> None:
    async def main(cell: DiskCell) -> None:
        for number in range(1_500):
            await cell.put(noise(number, 200))
        await cell.put(data_of(1))

    on_disks(tmp_path, main)
    before = rows_of(tmp_path / "cell.db", "blocks", INDEX)
    assert again(tmp_path).notes == {}
    assert rows_of(tmp_path / "cell.db", "blocks", INDEX) == before
