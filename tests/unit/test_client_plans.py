"""Pure planning of transfers: windows, groups, names, fingerprints, entries."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from client.batches import bodies
from client.download_plan import cut_jobs
from client.entries import EntryKind, NewEntry, parse_entry
from client.local_root import FileContent, check_parts
from client.upload_plan import RemoteState, block_count, check_remote, cut_windows, fingerprint
from protocol.block_frames import FRAME_HEADER_BYTES
from protocol.errors import CorruptReply, InvalidPath
from protocol.ids import BlockHash
from protocol.limits import (
    BATCH_BLOCKS_MAX,
    BATCH_BODY_BYTES_MAX,
    BLOCK_BYTES_MAX,
    COMMIT_BLOCKS_MAX,
    JSON_BODY_BYTES_MAX,
    MIB,
)


def name(number: int) -> BlockHash:
    return BlockHash.of_digest(hashlib.sha256(str(number).encode()).digest())


SIZES = [0, 1, 4096, BLOCK_BYTES_MAX - 1, BLOCK_BYTES_MAX, BLOCK_BYTES_MAX + 1, 50 * MIB + 3]


@pytest.mark.parametrize("window_bytes", [BLOCK_BYTES_MAX, 16 * MIB, 1 << 40])
def test_windows_cover_every_byte_of_every_file_once_and_in_order(window_bytes: int) -> None:
    pieces = [
        piece for window in cut_windows(list(enumerate(SIZES)), window_bytes) for piece in window
    ]
    assert pieces == sorted(pieces)
    for index, size in enumerate(SIZES):
        mine = [piece for piece in pieces if piece.file == index]
        assert len(mine) == block_count(size)
        assert [piece.number for piece in mine] == list(range(len(mine)))
        assert sum(piece.length for piece in mine) == size
        assert all(piece.offset == piece.number * BLOCK_BYTES_MAX for piece in mine)
        assert all(piece.length == BLOCK_BYTES_MAX for piece in mine[:-1])


def test_windows_are_bounded_in_bytes_and_in_blocks() -> None:
    windows = list(cut_windows(list(enumerate(SIZES * 5)), 16 * MIB))
    assert all(sum(piece.length for piece in window) <= 16 * MIB for window in windows)
    windows = list(cut_windows([(index, 1) for index in range(10_000)], 16 * MIB))
    assert [len(window) for window in windows] == [BATCH_BLOCKS_MAX, BATCH_BLOCKS_MAX, 1808]


def test_bodies_are_bounded_in_bytes_and_in_blocks() -> None:
    blocks = [(name(number), bytes(size)) for number, size in enumerate([3 * MIB] * 12)]
    cut = list(bodies(blocks))
    assert [item for body in cut for item in body] == blocks
    for body in cut:
        length = sum(len(data) + FRAME_HEADER_BYTES for _, data in body)
        assert length <= BATCH_BODY_BYTES_MAX
    many = [(name(number), b"") for number in range(BATCH_BLOCKS_MAX + 1)]
    assert [len(body) for body in bodies(many)] == [BATCH_BLOCKS_MAX, 1]
    assert list(bodies([])) == []


def remote_file(number: int, size: int, content: bytes | None = None) -> FileContent:
    blocks = tuple(name(number * 1000 + index) for index in range(-(-size // BLOCK_BYTES_MAX)))
    return FileContent((str(number),), size, 0, False, () if content else blocks, content)


def test_downloads_are_grouped_by_one_blocks_bytes_and_large_files_go_alone() -> None:
    files = (
        *(remote_file(number, 1 * MIB) for number in range(9)),
        remote_file(10, 9 * MIB),
        remote_file(11, 4 * MIB),
        remote_file(12, 3, b"abc"),
        *(remote_file(number, 10) for number in range(100, 1200)),
    )
    jobs = list(cut_jobs(files))
    assert sorted(file for job in jobs for file in job) == sorted(files)
    for job in jobs:
        if len(job) > 1:
            assert all(len(file.blocks) <= 1 for file in job)
            assert sum(file.size for file in job) <= BLOCK_BYTES_MAX
            assert len(job) <= 512
    assert (files[9],) in jobs


@pytest.mark.parametrize(
    "path",
    [
        "/a/../b",
        "/./a",
        "/a//b",
        "/nul\0",
        "/caf\udce9",
        "/" + "x" * 256,
        "/" + "ä" * 128,
        "/" + "/".join("d" * 129),
        "/" + "/".join(["x" * 200] * 30),
    ],
)
def test_paths_that_no_entry_can_have_are_refused_here(path: str) -> None:
    with pytest.raises(InvalidPath):
        check_remote(path)


@pytest.mark.parametrize(
    "path", ["/", "/a", "/a b/ü/\n", "/" + "x" * 255, "/" + "/".join("d" * 128)]
)
def test_paths_that_an_entry_can_have_are_taken(path: str) -> None:
    check_remote(path)


@pytest.mark.parametrize("part", ["", ".", "..", "a/b", "nul\0", "x" * 256, "ä" * 128])
def test_names_from_the_server_that_would_leave_the_folder_are_refused(part: str) -> None:
    with pytest.raises(InvalidPath):
        check_parts(("fine", part))


def test_fingerprints_tell_contents_apart() -> None:
    prints = [
        fingerprint((), b"", None),
        fingerprint((), b"a", None),
        fingerprint((), None, "a"),
        fingerprint((name(1),), None, None),
        fingerprint((name(1), name(2)), None, None),
        fingerprint((name(2), name(1)), None, None),
        fingerprint((), name(1), None),
    ]
    assert len(set(prints)) == len(prints)


JSON_ENTRY: dict[str, Any] = {
    "id": "e1",
    "path": "/a",
    "name": "a",
    "kind": "file",
    "rev": "r1",
    "size": 3,
    "mtime": 1.5,
    "executable": False,
    "block_list": None,
    "content": "YWJj",
    "symlink": None,
    "modified": 2.0,
}


def test_an_entry_is_read_as_it_is_written() -> None:
    entry = parse_entry(JSON_ENTRY)
    assert (entry.kind, entry.content, entry.blocks) == (EntryKind.FILE, b"abc", ())
    blocks = parse_entry({**JSON_ENTRY, "content": None, "block_list": [str(name(1))]})
    assert blocks.blocks == (name(1),)


def test_an_empty_file_has_one_fingerprint_however_the_server_writes_it() -> None:
    forms: list[dict[str, Any]] = [{"content": ""}, {"content": None}, {"block_list": []}]
    states = {
        RemoteState.of(parse_entry({**JSON_ENTRY, "content": None, "size": 0, **form}))
        for form in forms
    }
    assert {state.fingerprint for state in states} == {fingerprint((), b"", None)}


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "device"},
        {"kind": None},
        {"path": None},
        {"path": "\ud800"},
        {"name": 7},
        {"size": "large"},
        {"size": -1},
        {"mtime": float("inf")},
        {"mtime": float("nan")},
        {"mtime": 1e300},
        {"mtime": "yesterday"},
        {"block_list": ["zz"]},
        {"block_list": [7]},
        {"block_list": 7},
        {"content": "%%%"},
        {"content": 7},
        {"symlink": 7},
    ],
)
def test_an_entry_that_cannot_be_is_a_corrupt_reply(change: dict[str, Any]) -> None:
    with pytest.raises(CorruptReply):
        parse_entry({**JSON_ENTRY, **change})


@pytest.mark.parametrize("value", [None, 7, "text", [], {}])
def test_something_that_is_no_entry_is_a_corrupt_reply(value: object) -> None:
    with pytest.raises(CorruptReply):
        parse_entry(value)


@pytest.mark.parametrize(
    "new",
    [
        NewEntry(
            "/" + "\x01" * 255, 4096, 1e9 + 0.123456, "r" * 40, content=bytes(range(256)) * 16
        ),
        NewEntry("/ä" * 50, 10**12, -1.5, None, blocks=tuple(name(n) for n in range(500))),
        NewEntry("/x", 0, 0.0, None, symlink="\x7f\x00" * 2000),
        NewEntry("/x", 0, 0.0, None, content=b""),
    ],
)
def test_the_bound_on_a_commits_json_holds(new: NewEntry) -> None:
    import orjson

    assert len(orjson.dumps(new.to_json())) <= new.json_bytes_at_most()


def test_a_batch_of_inline_files_fits_a_request() -> None:
    entry = NewEntry("/" + "x" * 200, 4096, 1.0, "r1", content=bytes(4096))
    assert 1000 * entry.json_bytes_at_most() < JSON_BODY_BYTES_MAX


def test_the_longest_block_list_fits_a_request() -> None:
    entry = NewEntry("/" + "x" * 200, 10**12, 1.0, "r1", blocks=(name(1),) * COMMIT_BLOCKS_MAX)
    assert entry.json_bytes_at_most() < JSON_BODY_BYTES_MAX
