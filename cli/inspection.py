"""`haversack status`, `ls` and `rm`: look at a cell, look at a tree, delete from it.

Called by `cli.main`.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import orjson

from cli import figures
from cli.connection import ServerOptions, run_with_client
from cli.failures import Exit, printable
from cli.upkeep_lines import upkeep_lines

if TYPE_CHECKING:
    from rich.console import Console

    from client.api import HaversackClient
    from client.entries import Entry


_PIPED_COLUMNS = 240
"""Width of the table where there is no terminal to fit it into."""


def status(options: ServerOptions, as_json: bool) -> Exit:
    """Show the cell."""

    async def work(client: HaversackClient) -> Exit:
        state = await client.status()
        if as_json:
            print(orjson.dumps(state, option=orjson.OPT_INDENT_2).decode())
        else:
            _print_status(state)
        return Exit.OK

    return run_with_client(options, work, patient=False)


def ls(options: ServerOptions, remote: str, recursive: bool, as_json: bool) -> Exit:
    """List a folder, or show one entry."""

    async def work(client: HaversackClient) -> Exit:
        from client.entries import EntryKind

        if remote.strip("/"):
            entry = await client.entry(remote)
            if entry.kind is not EntryKind.FOLDER:
                _print_entries([entry], as_json, entry.path.rsplit("/", 1)[0] + "/")
                return Exit.OK
            root = entry.path + "/"
        else:
            root = "/"
        listing = client.iter_folder(root.rstrip("/"), recursive=recursive)
        if as_json:
            first = True
            print("[", end="")
            async for entry in listing:
                print("" if first else ",")
                print(orjson.dumps(entry.raw).decode(), end="")
                first = False
            print("]")
        else:
            async for entry in listing:
                print(_line(entry, root))
        return Exit.OK

    return run_with_client(options, work, patient=False)


def rm(options: ServerOptions, remote: str) -> Exit:
    """Delete an entry, a folder with all below it."""

    async def work(client: HaversackClient) -> Exit:
        deleted = await client.delete(remote)
        entries = figures.plural(deleted, "entry", "entries")
        print(printable(f"rm {remote}: {entries} deleted"))
        return Exit.OK

    return run_with_client(options, work, patient=False)


def _print_entries(entries: list[Entry], as_json: bool, root: str) -> None:
    if as_json:
        print(orjson.dumps([entry.raw for entry in entries]).decode())
        return
    for entry in entries:
        print(_line(entry, root))


def _line(entry: Entry, root: str) -> str:
    """Kind, size, time, name: `-x     12.3 kB  2026-11-21 10:00  bin/tool`."""
    from client.entries import EntryKind

    name = printable(entry.path.removeprefix(root))
    match entry.kind:
        case EntryKind.FOLDER:
            mark, size, name = "d-", "-", name + "/"
        case EntryKind.SYMLINK:
            mark, size, name = "l-", "-", f"{name} -> {printable(entry.symlink or '')}"
        case EntryKind.FILE:
            mark, size = "-x" if entry.executable else "--", figures.size(entry.size)
    return f"{mark}  {size:>9}  {figures.moment(entry.mtime)}  {name}"


def _print_status(state: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else _PIPED_COLUMNS)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title, justify in (
        ("node", "left"),
        ("state", "left"),
        ("pid", "right"),
        ("rack/host", "left"),
        ("bytes", "right"),
        ("fragments", "right"),
        ("directory", "left"),
        ("detail", "left"),
    ):
        table.add_column(title, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for node in state.get("nodes", []):
        colour = "green" if node.get("state") == "up" else "red"
        table.add_row(
            _text(node.get("id")),
            f"[{colour}]{_text(node.get('state'))}[/]",
            _text(node.get("pid")),
            f"{_text(node.get('rack'))}/{_text(node.get('host'))}",
            figures.size(node.get("bytes") or 0),
            figures.number(node.get("fragments") or 0),
            _text(node.get("directory")),
            _text(node.get("detail"), ""),
        )
    console.print(table)
    _print_sums(console, state)
    _print_redundancy(console, state)


def _print_sums(console: Console, state: dict[str, Any]) -> None:
    volumes = state.get("volumes", {})
    spares = ", ".join(
        f"{count} with {spare} spare"
        for spare, count in sorted(volumes.get("by_spare", {}).items(), key=lambda at: int(at[0]))
    )
    console.print(
        f"\nvolumes    {volumes.get('open', 0)} open, {volumes.get('sealed', 0)} sealed"
        + (f"; {spares}" if spares else ""),
        f"blocks     {figures.number(state.get('blocks') or 0)}; "
        f"{figures.number(state.get('debts') or 0)} fragments owed",
        f"bytes      {figures.size(state.get('logical_bytes') or 0)} logical, "
        f"{figures.size(state.get('stored_bytes') or 0)} stored",
        f"scheme     {_text(state.get('scheme'))}, cell {_text(state.get('cluster_id'))}, "
        f"version {_text(state.get('version'))}",
        sep="\n",
        highlight=False,
        soft_wrap=True,
    )


def _print_redundancy(console: Console, state: dict[str, Any]) -> None:
    """What is not whole, what is done about it, and what somebody has to look at."""

    def line(title: str, text: str) -> None:
        console.print(f"{title:10} {text}", highlight=False, soft_wrap=True)

    redundancy = state.get("redundancy", {})
    by_spare = redundancy.get("blocks_by_spare", {})
    if by_spare:
        classes = sorted(by_spare, key=int)
        line("spare", ", ".join(f"{by_spare[spare]:,} blocks with {spare}" for spare in classes))
    if redundancy.get("oldest_debt") is not None:
        line("owed since", figures.moment(redundancy["oldest_debt"]))
    if redundancy.get("moves"):
        line("moving", figures.plural(redundancy["moves"], "slot"))
    if redundancy.get("unrepairable"):
        line("given up", figures.plural(redundancy["unrepairable"], "block"))
    for title, text in upkeep_lines(state):
        line(title, _text(text))
    for job in state.get("jobs", []):
        line("job", f"{job['id']}: {_text(job['kind'])} of {_text(job['subject'])}, {_job(job)}")
    for alarm in state.get("alarms", []):
        line("[red]ALARM[/]     ", _text(alarm.get("text")))


def _job(job: dict[str, Any]) -> str:
    """`running, 12 of 40 done, 5 min to go`."""
    said = f"{_text(job['state'])}, {job['done_units']:,} of {job['total_units']:,} done"
    eta_s = job.get("eta_s")
    if job.get("blockers"):
        said += f", blocked: haversack jobs show {job['id']} says by what"
    elif eta_s is not None and eta_s > 0:
        said += f", about {figures.lasting(eta_s)} to go"
    return said


def _text(value: Any, absent: str = "-") -> str:
    """A value as safe text for a table."""
    from rich.markup import escape

    return absent if value in (None, "") else escape(printable(str(value)))
