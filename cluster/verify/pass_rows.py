"""SQL of passes, mostly the verifier's: what was asked for, how far one is, what the last found.

A gateway writes requests and reads results; the verifier and repair do the rest.  None needs
another to run.  Functions over a connection; no clock, no event loop, no Ray.

| kind, subject        | one row about                                   | written by   |
|----------------------|-------------------------------------------------|--------------|
| verify, cell         | the newest pass                                 | the verifier |
| verify, finished     | the last pass that ended                        | the verifier |
| verify, request      | the newest request of a pass or a removal       | a gateway    |
| removal, cell        | the newest removal of strays                    | the verifier |
| repair, cell         | how far repair is                               | repair       |
| repair failing, cell | passes of repair that failed, one after another | repair       |
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import orjson
from sqlalchemy import Connection, delete, insert, select

from cluster.schema import passes
from cluster.verify.stray_rows import stray_totals

VERIFY: Final = "verify"
REMOVAL: Final = "removal"
CELL: Final = "cell"
FINISHED: Final = "finished"
REQUEST: Final = "request"


class PassRow(NamedTuple):
    """One row; `body` is its JSON."""

    number: int
    begun: float
    ended: float | None
    body: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """As the API shows it."""
        return {"number": self.number, "begun": self.begun, "ended": self.ended, **self.body}


class Wish(NamedTuple):
    """What somebody asked the verifier for."""

    number: int
    deep: bool
    remove_strays: bool
    dry_run: bool


def read_pass(connection: Connection, kind: str, subject: str) -> PassRow | None:
    """One row, or None."""
    row = connection.execute(
        select(passes).where(passes.c.kind == kind, passes.c.subject == subject)
    ).one_or_none()
    if row is None:
        return None
    return PassRow(row.number, row.begun, row.ended, orjson.loads(row.body))


def write_pass(connection: Connection, kind: str, subject: str, row: PassRow) -> None:
    """Set one row."""
    forget_pass(connection, kind, subject)
    connection.execute(
        insert(passes).values(
            kind=kind,
            subject=subject,
            number=row.number,
            begun=row.begun,
            ended=row.ended,
            body=orjson.dumps(row.body).decode(),
        )
    )


def forget_pass(connection: Connection, kind: str, subject: str) -> None:
    """Remove one row, if it is there."""
    connection.execute(delete(passes).where(passes.c.kind == kind, passes.c.subject == subject))


def request_pass(
    connection: Connection, now: float, *, deep: bool, remove_strays: bool, dry_run: bool
) -> int:
    """Ask for a pass, or for a removal of strays; returns the request's number.

    A pass that is under way is finished first.  Only the newest request is kept.
    """
    held = read_pass(connection, VERIFY, REQUEST)
    number = 1 if held is None else held.number + 1
    body = {"deep": deep, "remove_strays": remove_strays, "dry_run": dry_run}
    write_pass(connection, VERIFY, REQUEST, PassRow(number, now, None, body))
    return number


def read_wish(connection: Connection) -> Wish | None:
    """The newest request, unless it was carried out."""
    row = read_pass(connection, VERIFY, REQUEST)
    if row is None or row.ended is not None:
        return None
    return Wish(row.number, row.body["deep"], row.body["remove_strays"], row.body["dry_run"])


def grant_wish(connection: Connection, number: int, now: float) -> None:
    """A request was carried out; a newer one stays open."""
    row = read_pass(connection, VERIFY, REQUEST)
    if row is not None and row.number == number:
        write_pass(connection, VERIFY, REQUEST, row._replace(ended=now))


def verification_of(connection: Connection) -> dict[str, Any]:
    """What an operator sees: the newest pass, the last that ended, strays, the newest removal.

    Plain data, for `GET /v1/admin/verify` and for whoever shows the state of a cell.
    """

    def shown(kind: str, subject: str) -> dict[str, Any] | None:
        row = read_pass(connection, kind, subject)
        return None if row is None else row.to_json()

    return {
        "current": shown(VERIFY, CELL),
        "finished": shown(VERIFY, FINISHED),
        "request": shown(VERIFY, REQUEST),
        "removal": shown(REMOVAL, CELL),
        "strays": {
            total.kind.value: {
                "fragments": total.fragments,
                "bytes": total.bytes,
                "oldest": total.oldest,
            }
            for total in stray_totals(connection)
        },
    }
