"""`haversack verify`: have the verifier compare index and disks, watch it, show what it found.

Called by `cli.main`.  The verifier works in the cell; this only asks and looks, so Ctrl-C ends
the watching and not the pass.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import orjson

from cli import figures
from cli.connection import ServerOptions, run_with_client
from cli.failures import Exit, printable, say
from protocol.errors import ConfigInvalid

if TYPE_CHECKING:
    from client.api import HaversackClient

_LOOK_EVERY_S = 1.0
_PATIENCE_LOOKS = 10
"""Looks at a verifier that does nothing before this is said."""

_STRAYS = ("misplaced", "stale copy", "orphan", "too young to tell")
"""Classes that nothing is lost by: whoever scripts this need not be woken for them."""


class Wish(NamedTuple):
    """What the command line asks for."""

    deep: bool
    remove_strays: bool
    dry_run: bool


class _Show(Protocol):
    def __call__(self, text: str, done: int, total: int | None) -> None: ...


def run(options: ServerOptions, wish: Wish, as_json: bool, quiet: bool) -> Exit:
    """Ask, wait, show.  0: no difference but strays; 1: something is missing or wrong."""
    if wish.dry_run and not wish.remove_strays:
        raise ConfigInvalid("--dry-run is for --remove-strays: a pass changes nothing on disks")
    if wish.deep and wish.remove_strays:
        raise ConfigInvalid("--deep is for a pass: verify first, then remove strays")

    async def work(client: HaversackClient) -> Exit:
        number = await client.request_verification(
            deep=wish.deep, remove_strays=wish.remove_strays, dry_run=wish.dry_run
        )
        with _shown(quiet or as_json) as show:
            answer = await _wait(client, number, "removal" if wish.remove_strays else "", show)
        if as_json:
            print(orjson.dumps(answer, option=orjson.OPT_INDENT_2).decode())
        elif wish.remove_strays:
            _print_removal(answer, wish.dry_run)
        else:
            _print_pass(answer)
        if wish.remove_strays:
            return Exit.ITEMS_FAILED if answer.get("failed") or answer.get("unknown") else Exit.OK
        return Exit.ITEMS_FAILED if _is_damaged(answer) else Exit.OK

    return run_with_client(options, work, patient=True)


async def _wait(client: HaversackClient, number: int, what: str, show: _Show) -> dict[str, Any]:
    """The answer to a request."""
    idle_looks = 0
    while True:
        state = await client.verification()
        answer = state[what or "finished"]
        if answer is not None and answer["request"] >= number and answer["ended"] is not None:
            return dict(answer)
        current = state["current"]
        working = current is not None and current["ended"] is None
        idle_looks = 0 if working else idle_looks + 1
        if idle_looks == _PATIENCE_LOOKS:
            say(
                "the verifier does not begin: it runs in the repair process, whose log is "
                "logs/repair.log of the cell's directory"
            )
        if working:
            show(_activity(current, number), current["blocks"], current["blocks_total"])
        else:
            show("waiting for the verifier to begin", 0, None)
        await asyncio.sleep(_LOOK_EVERY_S)


def _activity(current: dict[str, Any], number: int) -> str:
    """What a pass that has not ended is at, and whether it is the one that was asked for."""
    match current["state"]:
        case "settling":
            doing = "waits whether fragments without a block are puts under way"
        case _:
            doing = "reads every fragment" if current["deep"] else "compares inventories"
    if current["request"] >= number:
        return doing
    return f"pass {current['number']} is finished first: it {doing}"


@contextmanager
def _shown(quiet: bool) -> Iterator[_Show]:
    """A bar on a terminal; otherwise a line when the activity changes: a pass may take days."""
    if quiet:
        yield lambda text, done, total: None
        return
    if not sys.stderr.isatty():
        yield _lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("verify", total=None)
        yield lambda text, done, total: progress.update(
            task, description=f"verify: {text}", completed=done, total=total
        )


def _lines() -> _Show:
    said = ""

    def show(text: str, done: int, total: int | None) -> None:
        nonlocal said
        if text != said:
            said = text
            say(f"verify: {text}")

    return show


def _is_damaged(answer: dict[str, Any]) -> bool:
    return any(
        entry["count"] for name, entry in answer["differences"].items() if name not in _STRAYS
    )


def _print_pass(answer: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 240)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("difference")
    table.add_column("fragments", justify="right")
    table.add_column("for example", overflow="fold")
    for name, entry in answer["differences"].items():
        table.add_row(name, figures.number(entry["count"]), _examples(entry["examples"]))
    console.print(table)
    took = figures.plural(round(answer["ended"] - answer["begun"]), "second")
    depth = "every fragment read" if answer["deep"] else "inventories compared"
    lines = ["", f"{figures.plural(answer['blocks'], 'block')}, {depth}, {took}"]
    for node, why in answer["silent_nodes"].items():
        lines.append(f"not looked at: {node} ({why})")
    if answer["unlooked_slots"]:
        lines.append(
            f"{figures.plural(answer['unlooked_slots'], 'fragment')} not looked at: nothing is "
            "known of them"
        )
    if answer["strays_left_off"]:
        lines.append(f"{figures.number(answer['strays_left_off'])} more strays than are kept")
    for line in lines:
        print(printable(line))


def _examples(examples: list[dict[str, Any]]) -> str:
    from rich.markup import escape

    shown = [
        f"{example['block'][:16]} slot {example['slot']} of {example['volume']}"
        + (f" on {example['node']}" if example["node"] else "")
        for example in examples[:3]
    ]
    return escape(printable("; ".join(shown)))


def _print_removal(answer: dict[str, Any], dry_run: bool) -> None:
    lines = []
    for kind, count in answer["planned"].items():
        lines.append(f"{'would remove' if dry_run else 'planned'}  {figures.number(count)} {kind}")
    if not answer["planned"]:
        lines.append("nothing to remove")
    lines.append(f"bytes  {figures.size(answer['planned_bytes'])}")
    for reason, count in answer["kept"].items():
        lines.append(f"kept  {figures.number(count)}: {reason}")
    if answer["more"]:
        lines.append("there are more: run it again")
    if not dry_run:
        lines.append(
            f"removed {figures.number(answer['removed'])} "
            f"({figures.size(answer['removed_bytes'])}), "
            f"{figures.number(answer['skipped'])} changed meanwhile, "
            f"{figures.number(answer['failed'])} failed, "
            f"{figures.number(answer['unknown'])} without an answer"
        )
    for line in lines:
        print(printable(line))
