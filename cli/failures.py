"""What a command says when it fails, and its exit code.

Called by `cli.main` and the commands.  Imports nothing heavier than the error tree.

    0    done
    1    some items failed; the others are done
    2    usage, or a setting that cannot be used
    3    the server does not answer
    4    the server refuses: no right, not found, a conflict, a request it cannot take
    5    not now, or not known whether done: busy, too few nodes, lost answers, unreadable bytes
    6    a person must act: local files, a directory in use, a broken server
    130  interrupted

History: append-only, scripts match on them.
"""

from __future__ import annotations

import enum
import sys

from protocol.errors import (
    BadRequest,
    ConfigInvalid,
    HaversackError,
    NeedsRepair,
    RetryLater,
    ServerUnreachable,
    UnknownOutcome,
)


class Exit(enum.IntEnum):
    """Exit codes; the table above."""

    OK = 0
    ITEMS_FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    REFUSED = 4
    NOT_NOW = 5
    OPERATOR = 6
    INTERRUPTED = 130


def exit_code(error: HaversackError) -> Exit:
    """The exit code of an error that ended a command."""
    match error:
        case ConfigInvalid():
            return Exit.USAGE
        case ServerUnreachable():
            return Exit.UNREACHABLE
        case BadRequest():
            return Exit.REFUSED
        case RetryLater() | UnknownOutcome() | NeedsRepair():
            return Exit.NOT_NOW
        case _:
            return Exit.OPERATOR


def report_failure(error: HaversackError) -> Exit:
    """One line on standard error: the kind, what happened, what to do.  Its exit code."""
    kind = error.details.get("kind", error.kind)
    say(f"haversack: {kind}: {error.message}")
    return exit_code(error)


def say(text: str) -> None:
    """A line on standard error, whatever characters are in it."""
    print(printable(text), file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """`text` on one line of a terminal: control characters and stray bytes are escaped."""
    if text.isprintable():
        return text
    return "".join(
        character
        if character.isprintable()
        else character.encode("unicode_escape", "surrogatepass").decode("ascii")
        for character in text
    )
