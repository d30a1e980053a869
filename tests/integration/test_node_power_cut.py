"""Power cuts: a real ext4 that forgets everything it was not made to keep.

SIGKILL alone proves nothing about syncs: what a killed process wrote is still in the page cache.
Here the file system is shut down without flushing its journal, so that only what was synced is
there when it is mounted again.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from node_parts import fragment_key, noise, rocks

from protocol.errors import HaversackError
from protocol.limits import KIB, MIB
from storage_node import merge_plan
from storage_node.rocks_store import RocksStore

EXT4_IOC_SHUTDOWN = 0x8004587D
NO_LOG_FLUSH = 2


class Disk:
    """A file system in a file."""

    def __init__(self, image: Path, mount: Path) -> None:
        self.image = image
        self.mount = mount

    def plug_in(self) -> None:
        _run("mount", "-o", "loop", str(self.image), str(self.mount))

    def cut_power(self) -> None:
        """Forget whatever was not synced."""
        handle = os.open(self.mount, os.O_RDONLY)
        try:
            fcntl.ioctl(handle, EXT4_IOC_SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
        finally:
            os.close(handle)

    def unplug(self) -> None:
        _run("umount", str(self.mount))


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    if shutil.which("mkfs.ext4") is None:
        pytest.fail("there is no mkfs.ext4: install the Debian package e2fsprogs (packages.txt)")
    image, mount = tmp_path / "image", tmp_path / "mount"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(200 * MIB)
    made = Disk(image, mount)
    try:
        _run("mkfs.ext4", "-q", "-F", str(image))
        made.plug_in()
    except OSError as error:
        pytest.fail(f"mounting an ext4 needs root and loop devices: {error}")
    yield made
    subprocess.run(["umount", "-l", str(mount)], capture_output=True, check=False)


def write_until_dark(disk: Disk, store: RocksStore, first: int, cut_after: int) -> set[int]:
    """Puts of mixed sizes with deletes and merges between; power fails in the middle of one."""
    acknowledged: set[int] = set()
    try:
        for turn in range(1000):
            numbers = range(first + 3 * turn, first + 3 * turn + 3)
            size = (300 * KIB, 2 * KIB, 40 * KIB)[turn % 3]
            if turn == cut_after:
                disk.cut_power()
            store.put_group([(fragment_key(number), noise(number, size)) for number in numbers])
            acknowledged |= set(numbers)
            if turn % 5 == 4:
                store.delete_group([fragment_key(numbers[0])])
                acknowledged.discard(numbers[0])
            if turn % 7 == 6:
                store.tidy(64 * MIB)
    except HaversackError:
        return acknowledged
    raise AssertionError("the power never failed")


def test_nothing_acknowledged_is_lost_in_power_cuts(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge_plan, "RUN_FILES_MIN", 3)
    directory = disk.mount / "node"
    acknowledged: set[int] = set()
    sizes: dict[int, int] = {}
    indexed_again = 0
    for turn, cut_after in enumerate((0, 1, 2, 3, 8, 13, 20)):
        store = rocks(directory)
        first = 1 + 10_000 * turn
        new = write_until_dark(disk, store, first, cut_after)
        sizes.update({n: (300 * KIB, 2 * KIB, 40 * KIB)[(n - first) // 3 % 3] for n in new})
        acknowledged |= new
        store.close()
        disk.unplug()
        disk.plug_in()
        store = rocks(directory)
        for number in sorted(acknowledged):
            (answer,) = store.get_many([fragment_key(number)])
            assert answer.record == noise(number, sizes[number]), (turn, number, answer.status)
        stats = store.stats()
        assert (stats.fragments, stats.fragment_bytes) == store.recount()
        assert stats.fragments == len(acknowledged)
        indexed_again += stats.counters["rolled_forward"]
        store.close()
    assert indexed_again > 0  # index entries were lost, and came back from the extents


def test_the_cut_really_forgets(disk: Disk) -> None:
    """The test above would prove nothing on a disk that keeps unsynced bytes."""
    (disk.mount / "synced").write_bytes(b"x" * 100)
    os.sync()
    (disk.mount / "unsynced").write_bytes(b"x" * 100)
    disk.cut_power()
    disk.unplug()
    disk.plug_in()
    assert [path.name for path in disk.mount.iterdir() if path.is_file()] == ["synced"]
