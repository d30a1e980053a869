"""Texts of RocksDB and what they mean."""

from __future__ import annotations

import errno

import pytest

from protocol.errors import (
    DirectoryCorrupt,
    DirectoryForeign,
    DirectoryInUse,
    HaversackError,
    NodeFull,
)
from protocol.messages import ItemStatus
from storage_node.rocks_errors import DiskFailure, classify, open_error, read_status, write_error

SEEN = [
    ("Corruption: block checksum mismatch: stored(context removed) = 1", DiskFailure.CORRUPT),
    ("Corruption: Corrupted compressed block contents", DiskFailure.CORRUPT),
    ("IO error: No such file or directory: While open a file", DiskFailure.IO),
    ("IO error: Input/output error: While fdatasync", DiskFailure.IO),
    ("IO error: Input/output error: While reading a block of /x/000012.sst", DiskFailure.IO),
    (
        "IO error: No space left on device: While appending to file: /x/000012.sst",
        DiskFailure.NO_SPACE,
    ),
    ("IO error: Disk quota exceeded: While appending", DiskFailure.NO_SPACE),
    (
        "IO error: While lock file: /x/LOCK: Resource temporarily unavailable",
        DiskFailure.LOCKED,
    ),
    (
        "IO error: lock hold by current process, acquire time 17 acquiring thread 1: /x/LOCK",
        DiskFailure.LOCKED,
    ),
    (
        "Invalid argument: /x/CURRENT: does not exist (create_if_missing is false)",
        DiskFailure.MISSING,
    ),
    ("something nobody has seen yet", DiskFailure.CORRUPT),
]


@pytest.mark.parametrize(("text", "failure"), SEEN)
def test_texts_are_told_apart(text: str, failure: DiskFailure) -> None:
    assert classify(Exception(text)) is failure


@pytest.mark.parametrize(
    ("number", "failure"),
    [
        (errno.ENOSPC, DiskFailure.NO_SPACE),
        (errno.EDQUOT, DiskFailure.NO_SPACE),
        (errno.EIO, DiskFailure.IO),
    ],
)
def test_system_errors_are_told_apart(number: int, failure: DiskFailure) -> None:
    assert classify(OSError(number, "x")) is failure


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("IO error: While lock file: /x/LOCK: busy", DirectoryInUse),
        ("Corruption: bad MANIFEST", DirectoryCorrupt),
        ("IO error: Input/output error", DirectoryCorrupt),
        ("IO error: No space left on device", NodeFull),
        ("Invalid argument: /x/CURRENT does not exist", DirectoryForeign),
    ],
)
def test_a_failed_open_says_what_to_do(text: str, expected: type[HaversackError]) -> None:
    assert type(open_error(Exception(text), "/x")) is expected


def test_a_failed_write_is_full_or_corrupt() -> None:
    assert type(write_error(Exception("IO error: No space left on device"), "/x")) is NodeFull
    assert type(write_error(Exception("IO error: Input/output error"), "/x")) is DirectoryCorrupt


def test_an_error_never_says_that_a_record_is_absent() -> None:
    statuses = {read_status(Exception(text)) for text, _ in SEEN}
    assert statuses == {ItemStatus.CORRUPT, ItemStatus.IO_ERROR}
