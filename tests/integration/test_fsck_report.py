"""`fsck` on real node directories and databases: what it finds, and that it changes nothing."""

from __future__ import annotations

import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from block_cell import data_of
from disk_cell import DiskCell, on_disks, rows_of, tree_digest
from node_parts import noise

from cluster.fsck.check import check
from cluster.fsck.report import Kind, Report
from cluster.topology import NodeState
from erasure.keyring import Keyring
from protocol.hashing import hash_block
from protocol.ids import NodeId
from storage_node.interface import FragmentKey

LARGE = [data_of(seed) for seed in range(6)]
SMALL = [noise(seed, 3_000) for seed in range(6)]
TEXT = [b"the same words over and over %d " % seed * 20_000 for seed in range(2)]


async def fill(cell: DiskCell) -> None:
    for data in (*LARGE, *SMALL, *TEXT, b""):
        await cell.put(data)


def report_on(data: Path, *, deep: bool = False) -> Report:
    return check(data / "cell.db", data / "metadata.db", data, deep=deep)


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


@pytest.mark.parametrize("deep", [False, True])
def test_whole_cell_is_clean(data: Path, deep: bool) -> None:
    report = report_on(data, deep=deep)
    assert report.clean, report.found
    assert report.blocks == 15
    assert report.by_present == {"4/4": 8, "3/3": 7}
    assert [node.node for node in report.nodes] == [f"node-0{n}" for n in range(1, 6)]
    assert sum(node.fragments for node in report.nodes) == 8 * 4 + 7 * 3
    assert all(node.opened for node in report.nodes)


@pytest.mark.parametrize("deep", [False, True])
def test_report_changes_no_byte(data: Path, deep: bool) -> None:
    before = tree_digest(data)
    report_on(data, deep=deep)
    assert tree_digest(data) == before


def test_report_changes_no_byte_after_a_crash(tmp_path: Path) -> None:
    """Extents without index entries on a disk, commits only in the log of a database."""
    running, data = tmp_path / "running", tmp_path / "data"
    running.mkdir()

    async def crash(cell: DiskCell) -> None:
        await fill(cell)
        shutil.copytree(running, data)

    on_disks(running, crash)
    assert (data / "cell.db-wal").stat().st_size > 0
    before = tree_digest(data)
    report = report_on(data, deep=True)
    assert tree_digest(data) == before
    assert report.clean, report.found
    assert report.blocks == 15


def lose_fragment(cell: DiskCell, key: FragmentKey, node_id: NodeId) -> None:
    assert cell.stores[node_id].delete_group([key])


def test_lost_and_owed_fragments_are_told_apart(tmp_path: Path) -> None:
    async def main(cell: DiskCell) -> None:
        await fill(cell)
        row = await cell.row_of(LARGE[0])
        assert row is not None
        slots = await cell.slots_of(LARGE[0])
        for slot in (0, 1, 3):
            lose_fragment(cell, FragmentKey(row.volume, row.hash, slot), slots[slot])
        cell.set_state(cell.node_ids[0], NodeState.DOWN)
        await cell.clock.sleep(2)  # the client's map is a second old at most
        for seed in range(20, 24):
            await cell.put(data_of(seed))

    on_disks(tmp_path, main, nodes=4)
    report = report_on(tmp_path)
    assert report.found[Kind.UNREADABLE_BLOCK] == 1
    assert str(hash_block(LARGE[0])) in report.examples[Kind.UNREADABLE_BLOCK][0]
    assert report.found[Kind.MISSING] == 3
    assert report.found[Kind.OWED] == len(rows_of(tmp_path / "cell.db", "debts")) > 0
    assert report.indebted_blocks > 0
    assert report.losses == 1


def test_orphans_misplaced_fragments_and_stale_copies_are_told_apart(tmp_path: Path) -> None:
    async def main(cell: DiskCell) -> None:
        await fill(cell)
        for number, data in enumerate(LARGE[:3]):
            row = await cell.row_of(data)
            assert row is not None
            slots = await cell.slots_of(data)
            other = next(node_id for node_id in cell.node_ids if node_id not in slots)
            key = FragmentKey(row.volume, row.hash, 1)
            (answer,) = cell.stores[slots[1]].get_many([key])
            assert answer.record is not None
            if number == 0:  # a block that the index forgets
                cell.db.transact(
                    lambda c, key=key: c.exec_driver_sql(
                        "DELETE FROM blocks WHERE hash = ?", (bytes(key.block),)
                    )
                )
                continue
            cell.stores[other].put_group([(key, answer.record)])
            if number == 1:
                lose_fragment(cell, key, slots[1])

    on_disks(tmp_path, main)
    report = report_on(tmp_path)
    assert report.found == {
        Kind.ORPHAN: 4,
        Kind.MISPLACED: 1,
        Kind.MISSING: 1,
        Kind.STALE_COPY: 1,
        Kind.TABLE: 1,
    }
    assert report.losses == 0


def flip_byte_of(data: Path, pattern: bytes) -> Path:
    """One bit of a record inside a table file of some node."""
    for path in sorted(data.rglob("*.sst")):
        content = path.read_bytes()
        at = content.find(pattern)
        if at >= 0:
            with path.open("r+b") as file:
                file.seek(at + 40)
                file.write(bytes([content[at + 40] ^ 1]))
            return path
    raise AssertionError("no table file holds the bytes")


def test_deep_finds_a_flipped_byte(data: Path) -> None:
    path = flip_byte_of(data, LARGE[0][50_000:50_100])
    report = report_on(data, deep=True)
    corrupt = {node.node: node.corrupt for node in report.nodes if node.corrupt}
    assert set(corrupt) == {path.parents[1].name}
    # Small neighbours share RocksDB's block, and with it the checksum that fails.
    assert report.found == dict.fromkeys((Kind.CORRUPT, Kind.MISSING), sum(corrupt.values()))
    assert report.losses == 0


def test_absent_foreign_and_damaged_directories_are_named(data: Path) -> None:
    nodes = data / "nodes"
    shutil.rmtree(nodes / "node-01")
    (nodes / "node-02" / "identity").write_bytes(b"nonsense")
    shutil.copytree(nodes / "node-03", nodes / "spare")
    text = (nodes / "node-03" / "identity").read_text().replace("store-3", "store-x")
    (nodes / "spare" / "identity").write_text(text)
    (nodes / "node-04" / "store" / "CURRENT").write_text("MANIFEST-999999\n")
    report = report_on(data)
    assert report.found[Kind.ABSENT_NODE] == 2  # 01; 02, which nothing tells from a missing one
    assert report.found[Kind.UNREADABLE_NODE] == 3
    assert report.found[Kind.UNREADABLE_BLOCK] > 0
    details = {Path(node.directory).name: node.detail for node in report.nodes if node.detail}
    assert set(details) >= {"node-01", "node-02", "node-04", "spare"}


def test_damaged_cell_database_is_named_and_the_disks_are_still_read(data: Path) -> None:
    path = data / "cell.db"
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(8 * 4096))
    report = report_on(data)
    assert report.found[Kind.UNREADABLE_DATABASE] > 0
    assert sum(node.fragments for node in report.nodes) == 8 * 4 + 7 * 3


def test_missing_databases_are_named(data: Path) -> None:
    (data / "cell.db").unlink()
    (data / "metadata.db").unlink()
    report = report_on(data)
    assert report.found[Kind.UNREADABLE_DATABASE] == 2
    assert not (data / "cell.db").exists()


def test_rows_that_refer_to_nothing_are_counted(data: Path) -> None:
    with closing(sqlite3.connect(data / "cell.db")) as cell, cell:
        cell.execute("DELETE FROM volume_slots WHERE volume_id = 1")
        cell.execute("DELETE FROM volumes WHERE volume_id = 1")
        in_volume = cell.execute("SELECT count(*) FROM blocks WHERE volume_id = 1").fetchone()[0]
        cell.execute("INSERT INTO debts VALUES (2, 0, ?, 0, 'missing')", (b"x" * 32,))
    with closing(sqlite3.connect(data / "metadata.db")) as metadata, metadata:
        metadata.execute("INSERT INTO namespace_blocks VALUES (1, ?, 1)", (b"y" * 32,))
    report = report_on(data)
    assert report.found == {
        Kind.UNKNOWN_VOLUME: in_volume,
        Kind.TABLE: 1,
        Kind.DANGLING_REFERENCE: 1,
    }
    assert in_volume > 0


def test_compressed_and_encrypted_blocks_need_no_key(tmp_path: Path) -> None:
    on_disks(tmp_path, fill, keyring=Keyring([b"k" * 32]), compress=True)
    report = report_on(tmp_path, deep=True)
    assert report.clean, report.found
