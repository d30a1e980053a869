"""`haversack fsck`: check a stopped cell's disks against its databases, or make the index again.

Called by `cli.main`; the work is in `cluster.fsck`.  Speaks to no server.  Exit codes of its own:

    0    nothing differs
    1    something differs, and every block can be read
    2    something cannot be read
    6    it could not be checked: the cell runs, there is no such directory
"""

from __future__ import annotations

import enum
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, TextIO

import orjson

from cli import figures
from cli.failures import printable, report_failure
from cli.foreground import keep_stopped, lock_directory
from cli.progress import shown_count
from protocol.errors import ConfigInvalid, LocalFileError

if TYPE_CHECKING:
    from cluster.fsck.rebuild import Rebuilt
    from cluster.fsck.report import Report

_PIPED_COLUMNS: Final = 240


class Verdict(enum.IntEnum):
    """Exit codes; the table above."""

    CLEAN = 0
    DIFFERS = 1
    UNREADABLE = 2
    NOT_DONE = 6


class Manner(NamedTuple):
    """How a person or a script wants it."""

    deep: bool
    json: bool
    quiet: bool


def report(data: Path, others: Sequence[Path], manner: Manner) -> Verdict:
    """Check the cell in `data` and print what was found."""
    from cluster.fsck import switch
    from cluster.fsck.check import check

    with _stopped(data), shown_count("fragment", manner.quiet) as progress:
        rebuilt = data / switch.REBUILT
        found = check(
            rebuilt if rebuilt.exists() else data / switch.DATABASE,
            data / "metadata.db",
            data,
            deep=manner.deep,
            others=others,
            progress=progress,
        )
    if manner.json:
        print(orjson.dumps(found.as_json(), option=orjson.OPT_INDENT_2).decode())
    else:
        _print_report(found)
    if found.losses:
        return Verdict.UNREADABLE
    return Verdict.CLEAN if found.clean else Verdict.DIFFERS


def rebuild_index(
    data: Path, others: Sequence[Path], scheme: str | None, manner: Manner
) -> Verdict:
    """Make `cell.db` again from the node directories and print what was made."""
    from cluster.fsck.rebuild import Place, RebuildRequest, rebuild
    from cluster.members import RACK
    from erasure.scheme import Scheme
    from protocol.config import load

    labels = load(data=data).node_labels
    host = socket.gethostname()
    request = RebuildRequest(
        data=data,
        now=time.time(),
        place_of={
            name: Place(label.host or host, label.rack or RACK, label.weight)
            for name, label in labels.items()
        },
        default_place=Place(host, RACK, 1.0),
        scheme=None if scheme is None else Scheme.parse(scheme),
        deep=manner.deep,
        others=others,
    )
    with _stopped(data, lock_directory), shown_count("fragment", manner.quiet) as progress:
        try:
            made = rebuild(request, progress)
        except ConfigInvalid as error:  # elsewhere that is 2, which means another thing here
            report_failure(error)
            return Verdict.NOT_DONE
    if manner.json:
        print(orjson.dumps(made.as_json(), option=orjson.OPT_INDENT_2).decode())
    else:
        _print_rebuilt(made)
    if made.unreadable:
        return Verdict.UNREADABLE
    return Verdict.DIFFERS if made.notes else Verdict.CLEAN


@contextmanager
def _stopped(data: Path, take: Callable[[Path], TextIO | None] = keep_stopped) -> Iterator[None]:
    """While the cell cannot be started.  Raises `DirectoryInUse` if it runs."""
    if not data.is_dir():
        raise LocalFileError(f"{data} is no directory", {"path": str(data)})
    lock = take(data)
    try:
        yield
    finally:
        if lock is not None:
            lock.close()


def _print_report(found: Report) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else _PIPED_COLUMNS, highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("node", "fragments", "bytes", "bad records", "directory", "detail"):
        numeric = title in ("fragments", "bytes", "bad records")
        table.add_column(title, justify="right" if numeric else "left", overflow="fold")
    for node in found.nodes:
        table.add_row(
            escape(printable(node.node)),
            figures.number(node.fragments),
            figures.size(node.bytes),
            figures.number(node.corrupt + node.no_record + node.io_errors),
            escape(printable(node.directory)),
            escape(printable(node.detail)),
        )
    console.print(table)
    whole = ", ".join(f"{count:,} with {have}" for have, count in found.by_present.items())
    read = "every record" if found.deep else "one record of each block"
    console.print(
        f"\ncell       {found.cluster_id or '?'}",
        f"volumes    {figures.number(found.volumes)}",
        f"blocks     {figures.number(found.blocks)}"
        + (f"; fragments present: {whole}" if whole else ""),
        f"debts      {figures.plural(found.indebted_blocks, 'block')}",
        f"read       {read}",
        sep="\n",
        soft_wrap=True,
    )
    if found.clean:
        console.print("\nnothing differs")
        return
    console.print()
    for kind, count in sorted(found.found.items()):
        console.print(f"{count:,} x {kind}", markup=False, soft_wrap=True)
        for example in found.examples[kind]:
            console.print(f"    {printable(example)}", markup=False, soft_wrap=True)


def _print_rebuilt(made: Rebuilt) -> None:
    print(f"cell       {made.cluster_id}, {made.scheme}")
    print(f"nodes      {made.nodes}")
    print(f"volumes    {made.volumes:,}; {figures.plural(made.vacant_slots, 'vacant slot')}")
    print(f"blocks     {made.blocks:,}; {made.unreadable:,} of them not readable now")
    print(f"debts      {figures.plural(made.debts, 'fragment')}")
    print(f"old index  {printable(made.kept) or 'there was none'}")
    for kind, count in sorted(made.notes.items()):
        print(f"\n{count:,} x {kind}")
        for example in made.examples[kind]:
            print(f"    {printable(example)}")
