"""`haversack fsck` as a person or a script sees it: output, exit codes, refusals."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from block_cell import data_of
from disk_cell import DiskCell, on_disks, tree_digest
from node_parts import noise

from cli.foreground import lock_directory
from cli.prepare import prepare
from cluster.fsck import switch
from protocol.config import load
from protocol.errors import ConfigInvalid

HAVERSACK = str(Path(sys.executable).with_name("haversack"))


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    async def fill(cell: DiskCell) -> None:
        for seed in range(4):
            await cell.put(data_of(seed))
            await cell.put(noise(seed, 3_000))

    data = tmp_path_factory.mktemp("filled")
    on_disks(data, fill)
    return data


@pytest.fixture
def data(filled: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "data"
    shutil.copytree(filled, copy)
    lock_directory(copy).close()  # as a cell leaves it
    return copy


def fsck(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        (HAVERSACK, "fsck", *map(str, arguments)), capture_output=True, text=True, check=False
    )


def test_clean_cell_exits_zero_and_keeps_every_byte(data: Path) -> None:
    before = tree_digest(data)
    done = fsck(data)
    assert (done.returncode, done.stderr) == (0, "")
    assert "nothing differs" in done.stdout
    assert "node-05" in done.stdout
    assert tree_digest(data) == before


def test_json_has_the_counts(data: Path) -> None:
    done = fsck(data, "--json", "--deep")
    found = json.loads(done.stdout)
    assert done.returncode == 0
    assert found["clean"] is True
    assert found["deep"] is True
    assert found["blocks"] == 8
    assert found["by_present"] == {"4/4": 4, "3/3": 4}


def test_lost_node_exits_one_and_lost_blocks_exit_two(data: Path) -> None:
    shutil.rmtree(data / "nodes" / "node-01")
    done = fsck(data)
    assert done.returncode == 1
    assert "node without a directory" in done.stdout
    for number in (2, 3, 4):
        shutil.rmtree(data / "nodes" / f"node-0{number}")
    done = fsck(data)
    assert done.returncode == 2
    assert "unreadable block" in done.stdout


def test_running_cell_is_refused_with_its_pid(data: Path) -> None:
    holder = (
        "import sys; from pathlib import Path; from cli.foreground import lock_directory; "
        "lock = lock_directory(Path(sys.argv[1])); print('locked', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        (sys.executable, "-c", holder, str(data)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        done = fsck(data)
        process.communicate("")
    assert done.returncode == 6
    assert "directory_in_use" in done.stderr
    assert f"pid {process.pid}" in done.stderr


def test_directory_that_is_not_there_is_refused_and_not_made(tmp_path: Path) -> None:
    done = fsck(tmp_path / "nothing")
    assert done.returncode == 6
    assert not (tmp_path / "nothing").exists()


def test_rebuild_makes_the_index_and_says_what_it_made(data: Path) -> None:
    (data / "cell.db").unlink()
    done = fsck(data, "--rebuild-index", "--json")
    made = json.loads(done.stdout)
    assert (done.returncode, made["blocks"], made["scheme"]) == (0, 8, "rs-2-2")
    done = fsck(data, "--rebuild-index")
    assert done.returncode == 0
    assert "blocks     8" in done.stdout
    assert "cell.db.before-" in done.stdout
    assert fsck(data).returncode == 0


def test_rebuild_that_needs_a_decision_exits_six_and_changes_nothing(data: Path) -> None:
    shutil.copytree(data / "nodes" / "node-01", data / "nodes" / "copy")
    before = tree_digest(data / "nodes"), (data / "cell.db").read_bytes()
    done = fsck(data, "--rebuild-index")
    assert done.returncode == 6
    assert "node-01" in done.stderr
    assert (tree_digest(data / "nodes"), (data / "cell.db").read_bytes()) == before


def test_a_start_without_the_index_makes_no_new_cell_beside_the_old_disks(data: Path) -> None:
    (data / "cell.db").unlink()
    with pytest.raises(ConfigInvalid, match="--rebuild-index"):
        prepare(load(data=data))
    fsck(data, "--rebuild-index")
    prepare(load(data=data, nodes=5))


def test_a_start_finishes_an_index_that_was_rebuilt_and_not_yet_put_in_place(data: Path) -> None:
    shutil.copyfile(data / "cell.db", data / switch.REBUILT)
    (data / "cell.db").write_bytes(b"damaged")
    prepare(load(data=data, nodes=5))
    assert not (data / switch.REBUILT).exists()
    assert fsck(data).returncode == 0
