"""What the command line prints and returns, without running it."""

from __future__ import annotations

import pytest

from cli import figures
from cli.failures import Exit, exit_code, printable
from protocol.errors import (
    BlockUnreadable,
    ConfigInvalid,
    CorruptReply,
    DirectoryInUse,
    EntryNotFound,
    HaversackError,
    LocalFileError,
    NotEnoughNodes,
    Overloaded,
    PathOccupied,
    RevConflict,
    ServerUnreachable,
    Unauthenticated,
    UnknownOutcome,
)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigInvalid("x"), 2),
        (ServerUnreachable("x"), 3),
        (Unauthenticated("x"), 4),
        (EntryNotFound("x"), 4),
        (RevConflict("x"), 4),
        (PathOccupied("x"), 4),
        (Overloaded("x"), 5),
        (NotEnoughNodes("x"), 5),
        (UnknownOutcome("x"), 5),
        (BlockUnreadable("x"), 5),
        (CorruptReply("x"), 5),
        (LocalFileError("x"), 6),
        (DirectoryInUse("x"), 6),
        (HaversackError("x"), 6),
    ],
)
def test_exit_codes_are_as_documented(error: HaversackError, code: int) -> None:
    assert exit_code(error) == code


def test_exit_codes_do_not_change() -> None:
    assert {code.name: code.value for code in Exit} == {
        "OK": 0,
        "ITEMS_FAILED": 1,
        "USAGE": 2,
        "UNREACHABLE": 3,
        "REFUSED": 4,
        "NOT_NOW": 5,
        "OPERATOR": 6,
        "INTERRUPTED": 130,
    }


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (99_499, "99.5 kB"),
        (99_500, "100 kB"),
        (999_499, "999 kB"),
        (999_500, "1.0 MB"),
        (4 * 1024 * 1024, "4.2 MB"),
        (10**18, "1000 PB"),
    ],
)
def test_sizes_have_three_digits_at_most(count: int, text: str) -> None:
    assert figures.size(count) == text


def test_rates_and_moments_never_fail() -> None:
    assert figures.rate(10, 0) == "-"
    assert figures.rate(10**6, 0.5) == "2.0 MB/s"
    assert figures.moment(1e18) == "?"
    assert figures.moment(-1e18) == "?"
    assert figures.plural(1, "entry", "entries") == "1 entry"
    assert figures.plural(1200, "file") == "1,200 files"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ünïcödé 文", "plain ünïcödé 文"),
        ("a\nb", "a\\nb"),
        ("\x1b[2J", "\\x1b[2J"),
        ("caf\udce9", "caf\\udce9"),
        ("right\u202eleft", "right\\u202eleft"),
    ],
)
def test_what_is_printed_stays_on_its_line(text: str, shown: str) -> None:
    assert printable(text) == shown
    printable(text).encode()
