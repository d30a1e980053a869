"""Whole files and trees through the client, against a cell in memory that misbehaves on request."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
import random
import resource
import socket
import stat
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from scripted_server import (
    TOKEN,
    Fault,
    ScriptedCell,
    busy,
    file_bytes,
    forbidden,
    scripted_cell,
)

from client.api import HaversackClient
from client.local_root import FileContent, LocalRoot, NewFile
from client.retry import RetryPolicy
from client.transfer import (
    TransferOptions,
    carry_out_upload,
    download_file,
    download_tree,
    plan_upload,
    upload_file,
    upload_tree,
)
from protocol.errors import (
    BlockNotFound,
    CorruptReply,
    EntryNotFound,
    FileChanged,
    Forbidden,
    InvalidPath,
    LocalFileError,
    NotEnoughNodes,
    PathOccupied,
    RevConflict,
    ServerUnreachable,
    UnknownOutcome,
)
from protocol.hashing import hash_block
from protocol.ids import BlockHash
from protocol.limits import BATCH_BLOCKS_MAX, BLOCK_BYTES_MAX, COMMIT_ENTRIES_MAX, KIB, MIB

FAST = RetryPolicy(attempts_max=4, total_s=20, first_delay_s=0.001, delay_max_s=0.002)


@pytest.fixture
async def cell() -> AsyncIterator[ScriptedCell]:
    async with scripted_cell() as running:
        yield running


@pytest.fixture
async def client(cell: ScriptedCell) -> AsyncIterator[HaversackClient]:
    async with HaversackClient(cell.url, TOKEN, policy=FAST, rng=random.Random(1)) as opened:
        yield opened


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree with one of everything."""
    root = tmp_path / "tree"
    (root / "deep" / "er").mkdir(parents=True)
    (root / "empty" / "within").mkdir(parents=True)
    (root / "nothing").write_bytes(b"")
    (root / "inline").write_bytes(b"x" * 4096)
    (root / "small").write_bytes(os.urandom(4097))
    (root / "block").write_bytes(os.urandom(BLOCK_BYTES_MAX))
    (root / "deep" / "large").write_bytes(os.urandom(3 * BLOCK_BYTES_MAX + 17))
    (root / "deep" / "er" / "twin of small").write_bytes((root / "small").read_bytes())
    (root / "deep" / "script").write_bytes(b"#!/bin/sh\n")
    (root / "deep" / "script").chmod(0o755)
    (root / "ünï cödé \n newline").write_bytes(b"odd")
    os.link(root / "small", root / "hard link")
    (root / "link").symlink_to("deep/large")
    (root / "loop").symlink_to("loop")
    (root / "up").symlink_to("..")
    (root / "dangling").symlink_to("/no/such/thing")
    os.utime(root / "inline", ns=(10**18, 1_234_567_890_123_456_789))
    return root


class About(float):
    """A time that equals another one within what a float of seconds carries."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, float) and abs(self - other) < 1e-6

    __hash__ = None  # type: ignore[assignment]


def seen(root: Path) -> dict[str, tuple[object, ...]]:
    """Everything about a tree that must survive, by relative path; never follows a symlink."""
    found: dict[str, tuple[object, ...]] = {}
    for folder, folders, files in os.walk(root):
        for name in folders + files:
            path = Path(folder) / name
            status = path.lstat()
            key = str(path.relative_to(root))
            if stat.S_ISLNK(status.st_mode):
                found[key] = ("link", os.readlink(path), About(status.st_mtime))
            elif stat.S_ISDIR(status.st_mode):
                found[key] = ("folder",)
            else:
                executable = bool(status.st_mode & 0o100)
                found[key] = ("file", path.read_bytes(), executable, About(status.st_mtime))
    return found


def temporaries(root: Path) -> list[Path]:
    return list(root.rglob(".haversack-*"))


# ---------------------------------------------------------------------- round trips


async def test_a_tree_comes_back_as_it_was(
    client: HaversackClient, tree: Path, tmp_path: Path
) -> None:
    report = await upload_tree(client, str(tree), "/backup")
    assert report.complete, report
    assert report.counters.files_done == 9
    assert report.counters.symlinks_done == 4
    back = tmp_path / "back"
    report = await download_tree(client, "/backup", str(back))
    assert report.complete, report
    assert seen(back) == seen(tree)
    assert temporaries(back) == []


async def test_identical_content_travels_once(
    cell: ScriptedCell, client: HaversackClient, tree: Path
) -> None:
    report = await upload_tree(client, str(tree), "/backup")
    # small, its twin and its hard link are one block; large is four, block is one
    assert report.counters.blocks_new == 6 == len(cell.blocks)
    assert report.counters.blocks_deduplicated == 2
    assert cell.body_bytes == sum(len(data) for data in cell.blocks.values())


async def test_a_second_upload_sends_nothing(
    cell: ScriptedCell, client: HaversackClient, tree: Path
) -> None:
    first = await upload_tree(client, str(tree), "/backup")
    cell.requests.clear()
    again = await upload_tree(client, str(tree), "/backup")
    assert again.complete
    assert again.counters.bytes_moved == 0
    assert again.counters.blocks_new == 0
    assert again.counters.blocks_deduplicated == 8
    assert again.counters.files_unchanged == first.counters.files_done
    assert not any("commit" in request or "PUT" in request for request in cell.requests)


async def test_only_what_changed_is_sent_and_replaces_what_the_plan_saw(
    cell: ScriptedCell, client: HaversackClient, tree: Path
) -> None:
    await upload_tree(client, str(tree), "/backup")
    (tree / "small").write_bytes(b"now inline")  # the hard link changes with it
    with (tree / "deep" / "large").open("ab") as file:
        file.write(b"tail")
    (tree / "new").write_bytes(b"n" * 5000)
    (tree / "deep" / "script").chmod(0o644)
    report = await upload_tree(client, str(tree), "/backup")
    assert report.complete, report
    assert report.counters.files_unchanged == report.counters.files_total - 5
    assert report.counters.blocks_new == 2
    assert file_bytes(cell, "/backup/small") == b"now inline"
    assert file_bytes(cell, "/backup/deep/large").endswith(b"tail")
    assert cell.entries["/backup/deep/script"]["executable"] is False


async def test_a_plan_sends_nothing_and_says_what_would_be_sent(
    cell: ScriptedCell, client: HaversackClient, tree: Path
) -> None:
    plan = await plan_upload(client, str(tree), "backup")
    assert len(plan.files) == 9
    assert plan.bytes_total == sum(
        len(value[1])
        for value in seen(tree).values()
        if value[0] == "file"  # type: ignore[arg-type]
    )
    assert plan.folders == ("/backup/empty/within",)
    assert cell.entries == {}
    assert cell.blocks == {}


async def test_thousands_of_small_files_travel_in_few_requests(
    cell: ScriptedCell, client: HaversackClient, tmp_path: Path
) -> None:
    root = tmp_path / "many"
    for folder in range(20):
        (root / str(folder)).mkdir(parents=True)
        for number in range(150):
            name = f"{folder}/{number}".encode()
            (root / str(folder) / str(number)).write_bytes(name * (1000 if number % 2 else 10))
    report = await upload_tree(client, str(root), "/many")
    assert report.complete
    assert report.counters.files_done == 3000
    assert sum("commit" in request for request in cell.requests) <= 3000 / COMMIT_ENTRIES_MAX + 4
    assert len(cell.requests) <= 25
    assert max(cell.batch_sizes) <= BATCH_BLOCKS_MAX
    cell.requests.clear()
    report = await download_tree(client, "/many", str(tmp_path / "back"))
    assert report.complete
    assert report.counters.files_done == 3000
    assert len(cell.requests) <= 25
    assert seen(tmp_path / "back") == seen(root)


async def test_one_file_and_one_symlink_travel_alone(
    cell: ScriptedCell, client: HaversackClient, tree: Path, tmp_path: Path
) -> None:
    await upload_file(client, str(tree / "block"), "/one/block")
    assert file_bytes(cell, "/one/block") == (tree / "block").read_bytes()
    await download_file(client, "/ONE/Block", str(tmp_path / "b"))
    assert (tmp_path / "b").read_bytes() == (tree / "block").read_bytes()
    await upload_file(client, str(tree / "up"), "/one/up")
    assert cell.entries["/one/up"]["symlink"] == ".."
    assert not any(path.startswith("/one/up/") for path in cell.entries), "never followed"
    await download_file(client, "/one/up", str(tmp_path / "up"))
    assert os.readlink(tmp_path / "up") == ".."


async def test_memory_stays_within_its_budget(
    cell: ScriptedCell, client: HaversackClient, tmp_path: Path
) -> None:
    """Requests with blocks under way never exceed what the budget and the bound allow."""
    (tmp_path / "big").write_bytes(os.urandom(20 * BLOCK_BYTES_MAX))
    options = TransferOptions(memory_bytes_max=16 * MIB, parallel=3)
    report = await upload_tree(client, str(tmp_path / "big"), "/big", options)
    assert report.complete
    assert cell.in_flight_most["blocks"] <= 4 + 1  # four windows of one block, one more check
    report = await download_tree(client, "/big", str(tmp_path / "back"), options)
    assert report.complete
    assert (tmp_path / "back").read_bytes() == (tmp_path / "big").read_bytes()


async def test_progress_grows_to_its_total(
    client: HaversackClient, tree: Path, tmp_path: Path
) -> None:
    seen_bytes: list[int] = []
    report = await upload_tree(
        client, str(tree), "/b", progress=lambda counters: seen_bytes.append(counters.bytes_done)
    )
    assert seen_bytes == sorted(seen_bytes)
    assert seen_bytes[-1] == report.counters.bytes_total
    seen_bytes.clear()
    report = await download_tree(
        client,
        "/b",
        str(tmp_path / "back"),
        progress=lambda counters: seen_bytes.append(counters.bytes_done),
    )
    assert seen_bytes == sorted(seen_bytes)
    assert seen_bytes[-1] == report.counters.bytes_total


# --------------------------------------------------------------- what stays behind


async def test_what_cannot_be_read_or_named_fails_alone(
    cell: ScriptedCell, client: HaversackClient, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "good").write_bytes(b"g" * 10_000)
    (root / "README").write_bytes(b"upper")
    (root / "readme").write_bytes(b"lower")
    os.close(os.open(os.fsencode(root) + b"/caf\xe9", os.O_CREAT))
    os.symlink(b"to-\xff", os.fsencode(root) + b"/bad-target")
    os.mkfifo(root / "fifo")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(root / "socket"))
    listener.close()
    (root / "gone").write_bytes(b"soon" * 2000)
    plan = await plan_upload(client, str(root), "/r")
    (root / "gone").unlink()
    report = await carry_out_upload(client, plan)
    failed = {Path(item.path).name: item.error for item in report.failures}
    assert set(failed) == {os.fsdecode(b"caf\xe9"), "bad-target", "readme", "gone"}
    assert isinstance(failed["readme"], InvalidPath)
    assert isinstance(failed["gone"], LocalFileError)
    assert {Path(note.path).name for note in report.notes} == {"fifo", "socket"}
    assert report.stopped is None
    assert file_bytes(cell, "/r/good") == b"g" * 10_000
    assert file_bytes(cell, "/r/readme") == b"upper"


_CAPABILITY_VERSION = 0x20080522
_READS_EVERYTHING = 1 << 1 | 1 << 2
"""CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""


@contextlib.contextmanager
def modes_of_files_count() -> Iterator[None]:
    """Root's power to read any file is put aside, by this thread and those it starts meanwhile."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    held = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice
    assert libc.capget(header, held) == 0, os.strerror(ctypes.get_errno())
    less = (ctypes.c_uint32 * 6)(*held)
    less[0] &= ~_READS_EVERYTHING
    assert libc.capset(header, less) == 0, os.strerror(ctypes.get_errno())
    try:
        yield
    finally:
        assert libc.capset(header, held) == 0, os.strerror(ctypes.get_errno())


async def test_an_unreadable_file_fails_alone(
    cell: ScriptedCell, client: HaversackClient, tree: Path
) -> None:
    (tree / "small").chmod(0)
    with modes_of_files_count():
        report = await upload_tree(client, str(tree), "/backup")
    assert {Path(item.path).name for item in report.failures} == {"small", "hard link"}


async def test_a_file_whose_reading_fails_fails_alone(
    cell: ScriptedCell, client: HaversackClient, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a file system that denies what the mode allows."""
    really_open = os.open

    def refusing(path: str, *arguments: int, **options: int) -> int:
        if str(path).endswith("small"):
            raise PermissionError(13, "Permission denied")
        return really_open(path, *arguments, **options)

    monkeypatch.setattr("client.local_read.os.open", refusing)
    report = await upload_tree(client, str(tree), "/backup")
    assert {Path(item.path).name for item in report.failures} == {"small", "twin of small"}
    assert "Permission denied" in str(report.failures[0].error)
    assert report.counters.files_done == 7


async def test_a_folder_deeper_than_the_limit_fails_alone(
    client: HaversackClient, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    deep = root / "/".join("d" * 1 for _ in range(130))
    deep.mkdir(parents=True)
    (root / "file").write_bytes(b"x")
    report = await upload_tree(client, str(root), "/r")
    assert len(report.failures) == 1
    assert isinstance(report.failures[0].error, InvalidPath)
    assert report.counters.files_done == 1


async def test_a_root_that_is_not_there_is_an_error(
    client: HaversackClient, tmp_path: Path
) -> None:
    with pytest.raises(LocalFileError, match="No such file"):
        await upload_tree(client, str(tmp_path / "absent"), "/r")
    with pytest.raises(EntryNotFound):
        await download_tree(client, "/absent", str(tmp_path / "x"))
    with pytest.raises(InvalidPath):
        await upload_tree(client, str(tmp_path), "/a/../b")


# ------------------------------------------------------------ files that change


class Meddler:
    """Changes a file from the thread that reads it, between two reads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, change: Callable[[int], None]) -> None:
        self._change = change
        self._really = os.pread
        self.calls = 0
        self._lock = threading.Lock()
        monkeypatch.setattr("client.local_read.os.pread", self)

    def __call__(self, descriptor: int, length: int, offset: int) -> bytes:
        data = self._really(descriptor, length, offset)
        with self._lock:
            self.calls += 1
            self._change(self.calls)
        return data


async def test_a_file_that_changes_while_it_is_read_is_started_over(
    cell: ScriptedCell,
    client: HaversackClient,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"a" * 6 * MIB)

    def append(call: int) -> None:
        if call == 1:
            with path.open("ab") as file:
                file.write(b"b" * MIB)

    Meddler(monkeypatch, append)
    report = await upload_tree(client, str(path), "/log")
    assert report.complete
    assert file_bytes(cell, "/log") == b"a" * 6 * MIB + b"b" * MIB


async def test_a_file_that_keeps_changing_is_reported_and_not_committed(
    cell: ScriptedCell,
    client: HaversackClient,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "log").write_bytes(b"a" * 5000)
    (root / "other").write_bytes(b"o" * 5000)

    def touch(call: int) -> None:
        os.utime(root / "log", ns=(0, call * 1000))

    meddler = Meddler(monkeypatch, touch)
    report = await upload_tree(client, str(root), "/r")
    assert [type(item.error) for item in report.failures] == [FileChanged]
    assert report.stopped is None
    assert "/r/log" not in cell.entries
    assert file_bytes(cell, "/r/other") == b"o" * 5000
    assert meddler.calls <= 1 + TransferOptions().read_attempts_max


async def test_a_file_swapped_for_a_symlink_or_a_fifo_is_not_followed(
    cell: ScriptedCell, client: HaversackClient, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret").write_bytes(b"secret" * 1000)
    for name in ("one", "two"):
        (root / name).write_bytes(b"plain" * 1200)
    plan = await plan_upload(client, str(root), "/r")
    (root / "one").unlink()
    (root / "one").symlink_to(tmp_path / "secret")
    (root / "two").unlink()
    os.mkfifo(root / "two")
    report = await carry_out_upload(client, plan)
    assert len(report.failures) == 2
    assert cell.entries == {}
    assert cell.blocks == {}


# ------------------------------------------------------------- the server's faults


async def test_an_upload_survives_a_server_that_stumbles(
    cell: ScriptedCell, client: HaversackClient, tree: Path, tmp_path: Path
) -> None:
    cell.script += [
        Fault("PUT", "reset", times=2),
        Fault("PUT", "lost"),
        Fault("check", "cut"),
        Fault("batch", "lost"),
        Fault("commit_batch", "lost"),
        Fault("commit_batch", "error", error=busy()),
        Fault("folder", "lost"),
    ]
    report = await upload_tree(client, str(tree), "/backup")
    assert report.complete, report
    cell.script += [
        Fault("GET /v1/blocks", "cut", times=2),
        Fault("GET /v1/blocks", "corrupt"),
        Fault("GET /v1/blocks", "reset"),
        Fault("fetch", "corrupt", times=2),
        Fault("fetch", "cut"),
        Fault("list", "cut"),
    ]
    report = await download_tree(client, "/backup", str(tmp_path / "back"))
    assert report.complete, report
    assert seen(tmp_path / "back") == seen(tree)


async def test_a_server_that_dies_for_good_stops_the_upload_and_a_second_run_finishes_it(
    cell: ScriptedCell, client: HaversackClient, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    for number in range(12):
        (root / str(number)).write_bytes(os.urandom(BLOCK_BYTES_MAX))
    cell.script.append(Fault("PUT", "error", times=10_000, after=5, error=busy()))
    report = await upload_tree(client, str(root), "/r")
    assert isinstance(report.stopped, NotEnoughNodes)
    assert not report.complete
    cell.script.clear()
    kept = len(cell.blocks)
    assert kept >= 5
    report = await upload_tree(client, str(root), "/r")
    assert report.complete
    assert report.counters.blocks_new == 12 - kept
    assert report.counters.bytes_moved == (12 - kept) * BLOCK_BYTES_MAX
    for number in range(12):
        assert file_bytes(cell, f"/r/{number}") == (root / str(number)).read_bytes()


async def test_no_server_stops_an_upload_without_asking_for_every_file(
    cell: ScriptedCell, client: HaversackClient, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    for number in range(500):
        (root / str(number)).write_bytes(os.urandom(5000))
    plan = await plan_upload(client, str(root), "/r")
    cell.requests.clear()
    await cell.die()
    report = await carry_out_upload(client, plan)
    assert isinstance(report.stopped, ServerUnreachable)
    assert report.counters.files_done == 0


async def test_commits_that_are_never_answered_are_reported_as_unknown(
    cell: ScriptedCell, client: HaversackClient, tmp_path: Path
) -> None:
    (tmp_path / "a").write_bytes(b"a")
    cell.script.append(Fault("commit_batch", "lost", times=99))
    report = await upload_tree(client, str(tmp_path / "a"), "/a")
    assert isinstance(report.stopped, UnknownOutcome)
    assert [type(item.error) for item in report.failures] == [UnknownOutcome]
    assert report.counters.files_done == 0


async def test_a_claim_that_ran_out_is_renewed_by_uploading_again(
    cell: ScriptedCell, client: HaversackClient, tmp_path: Path
) -> None:
    (tmp_path / "f").write_bytes(os.urandom(2 * BLOCK_BYTES_MAX))
    once = iter([True])

    def expire() -> None:
        if next(once, False):
            cell.claimed.clear()
            cell.blocks.clear()

    cell.before_commit = expire
    report = await upload_tree(client, str(tmp_path / "f"), "/f")
    assert report.complete, report
    assert file_bytes(cell, "/f") == (tmp_path / "f").read_bytes()


async def test_a_block_the_server_refuses_fails_its_files_only(
    cell: ScriptedCell, client: HaversackClient, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    for number in range(3):
        (root / str(number)).write_bytes(bytes([number]) * 9000)
    cell.refuse_blocks[hash_block(b"\1" * 9000)] = BlockNotFound("for no reason")
    report = await upload_tree(client, str(root), "/r")
    assert [Path(item.path).name for item in report.failures] == ["1"]
    assert report.counters.files_done == 2
    assert report.stopped is None


async def test_no_right_to_write_stops_at_once(
    cell: ScriptedCell, client: HaversackClient, tree: Path
) -> None:
    cell.script.append(Fault("check", "error", times=99, error=forbidden()))
    report = await upload_tree(client, str(tree), "/backup")
    assert isinstance(report.stopped, Forbidden)


async def test_what_another_client_changed_meanwhile_is_a_conflict(
    cell: ScriptedCell, client: HaversackClient, tmp_path: Path
) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"mine")
    await upload_file(client, str(path), "/f")
    path.write_bytes(b"mine, later")
    plan = await plan_upload(client, str(path), "/f")
    cell.entries["/f"]["rev"] = "another"
    cell.entries["/f"]["content"] = "b3RoZXI="
    report = await carry_out_upload(client, plan)
    assert [type(item.error) for item in report.failures] == [RevConflict]
    assert file_bytes(cell, "/f") == b"other"


# ---------------------------------------------------------------------- downloads


async def test_a_second_download_reads_and_fetches_nothing(
    cell: ScriptedCell, client: HaversackClient, tree: Path, tmp_path: Path
) -> None:
    await upload_tree(client, str(tree), "/b")
    back = tmp_path / "back"
    await download_tree(client, "/b", str(back))
    before = {path: path.lstat().st_ino for path in back.rglob("*")}
    cell.requests.clear()
    (back / "deep" / "script").chmod(0o644)
    os.utime(back / "small", (1, 1))
    report = await download_tree(client, "/b", str(back))
    assert report.complete, report
    assert report.counters.files_unchanged == 9
    assert report.counters.bytes_moved == 0
    assert not any("blocks" in request for request in cell.requests)
    assert {path: path.lstat().st_ino for path in back.rglob("*")} == before
    assert seen(back) == seen(tree), "times and executable bits are set again"


async def test_local_files_that_differ_are_kept_unless_overwriting_is_asked_for(
    client: HaversackClient, tree: Path, tmp_path: Path
) -> None:
    await upload_tree(client, str(tree), "/b")
    back = tmp_path / "back"
    await download_tree(client, "/b", str(back))
    same_size = bytes(4097)
    (back / "small").write_bytes(same_size)
    (back / "deep" / "large").write_bytes(b"short")
    (back / "link").unlink()
    (back / "link").symlink_to("elsewhere")
    report = await download_tree(client, "/b", str(back))
    assert {Path(item.path).name for item in report.failures} == {"small", "large", "link"}
    assert all(isinstance(item.error, PathOccupied) for item in report.failures)
    assert (back / "small").read_bytes() == same_size
    report = await download_tree(client, "/b", str(back), TransferOptions(overwrite=True))
    assert report.complete, report
    assert seen(back) == seen(tree)
    assert temporaries(back) == []


async def test_nothing_is_written_through_a_symlink(
    cell: ScriptedCell, client: HaversackClient, tree: Path, tmp_path: Path
) -> None:
    await upload_tree(client, str(tree), "/b")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "victim").write_bytes(b"precious")
    back = tmp_path / "back"
    back.mkdir()
    (back / "deep").symlink_to(outside)
    (back / "small").symlink_to(outside / "victim")
    report = await download_tree(client, "/b", str(back), TransferOptions(overwrite=True))
    assert {Path(item.path).name for item in report.failures} >= {"large", "script"}
    assert {path.name for path in outside.iterdir()} == {"victim"}
    assert (outside / "victim").read_bytes() == b"precious"
    assert (back / "small").read_bytes() == (tree / "small").read_bytes()
    assert not (back / "small").is_symlink()


async def test_a_folder_in_a_files_place_is_never_removed(
    client: HaversackClient, tree: Path, tmp_path: Path
) -> None:
    await upload_tree(client, str(tree), "/b")
    back = tmp_path / "back"
    (back / "small").mkdir(parents=True)
    (back / "deep").write_bytes(b"a file where a folder should be")
    report = await download_tree(client, "/b", str(back), TransferOptions(overwrite=True))
    assert {Path(item.path).name for item in report.failures} >= {"small", "large"}
    assert all(isinstance(item.error, PathOccupied) for item in report.failures)
    assert (back / "small").is_dir()
    assert (back / "block").read_bytes() == (tree / "block").read_bytes()


@pytest.mark.parametrize(
    "path",
    ["/b/../../evil", "/b/..", "/b/./x", "/b//x", "/elsewhere/x", "evil", "/b/nul\0", "/bb/x"],
)
async def test_names_that_would_leave_the_folder_are_refused(
    cell: ScriptedCell, client: HaversackClient, tmp_path: Path, path: str
) -> None:
    (tmp_path / "f").write_bytes(b"fine")
    await upload_file(client, str(tmp_path / "f"), "/b/f")
    cell.entries["/b/evil"] = {**cell.entries["/b/f"], "path": path, "name": "evil"}
    back = tmp_path / "cage" / "back"
    report = await download_tree(client, "/b", str(back))
    assert len(report.failures) == 1
    assert isinstance(report.failures[0].error, InvalidPath)
    assert [entry.name for entry in back.iterdir()] == ["f"]
    assert [entry.name for entry in (tmp_path / "cage").iterdir()] == ["back"]


async def test_an_entry_listed_twice_is_written_once(
    cell: ScriptedCell, client: HaversackClient, tmp_path: Path
) -> None:
    (tmp_path / "f").write_bytes(b"fine")
    await upload_file(client, str(tmp_path / "f"), "/b/f")
    cell.entries["/b/again"] = {**cell.entries["/b/f"], "content": "ZXZpbA=="}
    report = await download_tree(client, "/b", str(tmp_path / "back"))
    assert len(report.failures) == 1
    assert [entry.name for entry in (tmp_path / "back").iterdir()] == ["f"]


async def test_a_symlink_that_comes_with_things_below_it_is_not_written_through(
    cell: ScriptedCell, client: HaversackClient, tmp_path: Path
) -> None:
    """A server that lists `/b/link` as a symlink and `/b/link/x` as a file."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "f").write_bytes(b"fine")
    await upload_file(client, str(tmp_path / "f"), "/b/f")
    file = cell.entries["/b/f"]
    cell.entries["/b/link"] = {
        **file, "path": "/b/link", "kind": "symlink", "symlink": str(outside), "content": None,
    }  # fmt: skip
    cell.entries["/b/link/x"] = {**file, "path": "/b/link/x"}
    for _ in range(2):
        await download_tree(client, "/b", str(tmp_path / "back"), TransferOptions(overwrite=True))
        assert list(outside.iterdir()) == []


async def test_a_block_that_is_lost_fails_its_files_only(
    cell: ScriptedCell, client: HaversackClient, tree: Path, tmp_path: Path
) -> None:
    await upload_tree(client, str(tree), "/b")
    large = BlockHash.parse(cell.entries["/b/deep/large"]["block_list"][2])
    small = BlockHash.parse(cell.entries["/b/small"]["block_list"][0])
    del cell.blocks[large], cell.blocks[small]
    back = tmp_path / "back"
    report = await download_tree(client, "/b", str(back))
    assert {Path(item.path).name for item in report.failures} == {
        "large", "small", "hard link", "twin of small",
    }  # fmt: skip
    assert all(isinstance(item.error, BlockNotFound) for item in report.failures)
    assert not (back / "deep" / "large").exists(), "no partial file under its name"
    assert temporaries(back) == []
    assert (back / "block").read_bytes() == (tree / "block").read_bytes()


async def test_a_block_whose_bytes_stay_wrong_is_never_written(
    cell: ScriptedCell, client: HaversackClient, tree: Path, tmp_path: Path
) -> None:
    await upload_tree(client, str(tree), "/b")
    for path in ("/b/deep/large", "/b/small"):
        block = BlockHash.parse(cell.entries[path]["block_list"][0])
        cell.blocks[block] = bytes(len(cell.blocks[block]))
    back = tmp_path / "back"
    report = await download_tree(client, "/b", str(back))
    assert {type(item.error) for item in report.failures} == {CorruptReply}
    assert len(report.failures) == 4
    assert report.stopped is None
    assert not (back / "small").exists()
    assert temporaries(back) == []


async def test_blocks_that_do_not_add_up_to_the_file_are_not_written(
    cell: ScriptedCell, client: HaversackClient, tree: Path, tmp_path: Path
) -> None:
    await upload_tree(client, str(tree), "/b")
    cell.entries["/b/deep/large"]["size"] += 1
    cell.entries["/b/small"]["size"] -= 1
    cell.entries["/b/inline"]["size"] -= 1
    back = tmp_path / "back"
    report = await download_tree(client, "/b", str(back))
    assert {Path(item.path).name for item in report.failures} == {"large", "small", "inline"}
    assert temporaries(back) == []


@pytest.fixture
def file_size_limit() -> Iterator[None]:
    """No file of this process may grow over 1 MiB: the kernel refuses, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 * MIB, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


async def test_a_disk_that_takes_no_more_is_reported_per_file(
    cell: ScriptedCell,
    client: HaversackClient,
    tree: Path,
    tmp_path: Path,
    file_size_limit: None,
) -> None:
    await upload_tree(client, str(tree), "/b")
    back = tmp_path / "back"
    report = await download_tree(client, "/b", str(back))
    assert {Path(item.path).name for item in report.failures} == {"large", "block"}
    assert all(isinstance(item.error, LocalFileError) for item in report.failures)
    assert "File too large" in str(report.failures[0].error)
    assert temporaries(back) == []
    assert (back / "small").read_bytes() == (tree / "small").read_bytes()


async def test_a_cancelled_download_leaves_only_whole_files(
    cell: ScriptedCell, client: HaversackClient, tree: Path, tmp_path: Path
) -> None:
    await upload_tree(client, str(tree), "/b")
    cell.script.append(Fault("GET /v1/blocks", "hang", times=99, after=2))
    back = tmp_path / "back"
    task = asyncio.create_task(download_tree(client, "/b", str(back)))
    async with asyncio.timeout(20):
        while cell.script[0].times == 99:  # noqa: ASYNC110 - a server
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert temporaries(back) == []
    assert not (back / "deep" / "large").exists()
    for key, value in seen(back).items():
        assert value == seen(tree)[key]


async def test_a_cancelled_upload_ends_promptly(
    cell: ScriptedCell, client: HaversackClient, tree: Path
) -> None:
    cell.script.append(Fault("PUT", "hang", times=99))
    task = asyncio.create_task(upload_tree(client, str(tree), "/b"))
    async with asyncio.timeout(20):
        while not any("PUT" in request for request in cell.requests):  # noqa: ASYNC110 - a server
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_a_local_folder_that_cannot_be_made_is_an_error(
    client: HaversackClient, tree: Path, tmp_path: Path
) -> None:
    await upload_tree(client, str(tree), "/b")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(LocalFileError):
        await download_tree(client, "/b", str(tmp_path / "file" / "below"))


@pytest.fixture(params=["no O_TMPFILE", "no O_TMPFILE, no hard links"])
def poor_file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel refuses as a network or FAT file system does."""
    really_open, really_link = os.open, os.link

    def open_(path: str, flags: int, *arguments: int, **options: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return really_open(path, flags, *arguments, **options)

    def link(*arguments: str, **options: int) -> None:
        if "links" in request.param:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        really_link(*arguments, **options)

    monkeypatch.setattr("client.local_root.os.open", open_)
    monkeypatch.setattr("client.local_root.os.link", link)


async def test_a_file_system_without_nameless_files_or_hard_links_serves_as_well(
    client: HaversackClient, tmp_path: Path, tree: Path, poor_file_system: None
) -> None:
    (tree / "hard link").unlink()
    await upload_tree(client, str(tree), "/b")
    back = tmp_path / "back"
    report = await download_tree(client, "/b", str(back))
    assert report.complete, report
    assert seen(back) == seen(tree)
    (back / "small").write_bytes(b"edited")
    report = await download_tree(client, "/b", str(back))
    assert [type(item.error) for item in report.failures] == [PathOccupied]
    report = await download_tree(client, "/b", str(back), TransferOptions(overwrite=True))
    assert report.complete, report
    assert seen(back) == seen(tree)
    assert temporaries(back) == []


async def test_identical_files_are_fetched_once(
    cell: ScriptedCell, client: HaversackClient, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    for number in range(50):
        (root / str(number)).write_bytes(b"same" * 20 * KIB)
    await upload_tree(client, str(root), "/r")
    cell.requests.clear()
    report = await download_tree(client, "/r", str(tmp_path / "back"))
    assert report.complete
    assert seen(tmp_path / "back") == seen(root)


def test_a_root_or_a_file_that_was_closed_refuses_to_write(tmp_path: Path) -> None:
    """As happens to threads whose transfer was cancelled; never to whatever was opened since."""
    root = LocalRoot(str(tmp_path / "root"))
    new = NewFile(root, ("file",), False)
    new.write(b"some")
    root.close()
    root.close()
    new.write(b"thing")
    other = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    content = FileContent(("small",), 1, 0, False, (), b"x")
    assert [type(error) for error in root.write_files([(content, b"x")], False)] == [LocalFileError]
    new.close()
    new.close()
    victim = os.open(tmp_path / "victim", os.O_CREAT | os.O_WRONLY)
    with pytest.raises(LocalFileError):
        new.write(b"more")
    with pytest.raises(LocalFileError):
        new.finish(0, True)
    os.close(victim)
    os.close(other)
    assert (tmp_path / "victim").read_bytes() == b""
    assert list((tmp_path / "root").iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == {"root", "victim"}
