"""`haversack scrub`: how far each node has read its own fragments; have them do it now.

Registered by `cli.main`.  The nodes do the reading; Ctrl-C ends the watching and not the pass.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import figures
from cli.connection import ServerOptions, run_with_client
from cli.failures import Exit, printable
from cli.options import Json, Quiet, Server, TokenFile, server_options
from protocol.errors import ConfigInvalid

if TYPE_CHECKING:
    from client.api import HaversackClient

_LOOK_EVERY_S = 0.5
_PIPED_COLUMNS = 240

Show = Callable[[list[dict[str, Any]]], None]


def register(app: typer.Typer) -> None:
    """Hang this command below `haversack`."""
    app.command()(scrub)


def scrub(
    context: typer.Context,
    now: Annotated[bool, typer.Option("--now", help="Begin a pass and wait for its end.")] = False,
    pause: Annotated[bool, typer.Option("--pause", help="Read nothing until --resume.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after --pause.")] = False,
    node: Annotated[
        list[str] | None, typer.Option("--node", help="As in node-03; may be repeated [all].")
    ] = None,
    rate: Annotated[
        int,
        typer.Option("--rate", min=0, help="Bytes per second of each node [no bound]."),
    ] = 0,
    json: Json = False,
    quiet: Quiet = False,
    server: Server = None,
    token_file: TokenFile = None,
) -> None:
    """Show how far the nodes have read and checked their fragments, or have them do it now."""
    if now + pause + resume > 1:
        raise ConfigInvalid("give one of --now, --pause and --resume")
    if rate and not now:
        raise ConfigInvalid("--rate is for --now: the calendar's own pace is scrub_period_s")
    action = "start" if now else "pause" if pause else "resume" if resume else ""
    order = {"action": action, "nodes": node or [], **({"bytes_per_s": rate} if rate else {})}
    options = server_options(context, server, token_file)
    raise typer.Exit(_run(options, order, as_json=json, quiet=quiet))


def _run(options: ServerOptions, order: dict[str, Any], *, as_json: bool, quiet: bool) -> Exit:
    """0: nothing is set aside.  1: something is, or a node did not answer."""

    async def work(client: HaversackClient) -> Exit:
        wanted = set(order["nodes"])
        if order["action"]:
            answers = (await client.ask_admin("POST", "scrub", order))["nodes"]
        else:
            answers = await _look(client, wanted)
        if order["action"] == "start":
            with _shown(quiet or as_json) as show:
                answers = await _wait(client, answers, show)
        if as_json:
            from cli.job_view import print_json

            print_json(answers)
        else:
            _print(answers)
        return Exit.OK if all(_is_well(answer) for answer in answers) else Exit.ITEMS_FAILED

    return run_with_client(options, work, patient=True)


async def _look(client: HaversackClient, names: set[str]) -> list[dict[str, Any]]:
    answers = (await client.ask_admin("GET", "scrub"))["nodes"]
    unknown = names - {answer["node"] for answer in answers}
    if unknown:
        raise ConfigInvalid(f"no node {sorted(unknown)[0]!r} in this cell")
    return [answer for answer in answers if not names or answer["node"] in names]


async def _wait(
    client: HaversackClient, begun: list[dict[str, Any]], show: Show
) -> list[dict[str, Any]]:
    """Until every node that began its pass has ended it; one that falls silent is waited for."""
    passes = {a["node"]: a["scrub"]["pass_number"] for a in begun if a["scrub"] is not None}
    refused = {answer["node"]: answer for answer in begun if answer["scrub"] is None}
    while True:
        answers = await _look(client, set(passes) | set(refused))
        show(answers)
        if all(_has_ended(answer, passes) for answer in answers):
            return [refused.get(answer["node"], answer) for answer in answers]
        await asyncio.sleep(_LOOK_EVERY_S)


def _has_ended(answer: dict[str, Any], passes: dict[str, int]) -> bool:
    if answer["node"] not in passes:
        return True
    state = answer["scrub"]
    if state is None:
        return False
    return bool(state["pass_number"] > passes[answer["node"]] or not state["running"])


def _is_well(answer: dict[str, Any]) -> bool:
    state = answer["scrub"]
    return state is not None and not state["findings"] and not state["index_damaged"]


@contextmanager
def _shown(quiet: bool) -> Iterator[Show]:
    """A bar per node on a terminal; otherwise nothing."""
    if quiet or not sys.stderr.isatty():
        yield lambda answers: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        tasks: dict[str, Any] = {}

        def show(answers: list[dict[str, Any]]) -> None:
            for answer in answers:
                name, state = answer["node"], answer["scrub"]
                if name not in tasks:
                    tasks[name] = progress.add_task(name, total=None)
                if state is None:
                    progress.update(tasks[name], description=f"{name}: no answer")
                else:
                    found = figures.plural(state["findings_of_pass"], "finding")
                    progress.update(
                        tasks[name],
                        description=f"{name}: {found}",
                        completed=state["bytes_done"],
                        total=max(state["bytes_total"], state["bytes_done"], 1),
                    )

        yield show


def _print(answers: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else _PIPED_COLUMNS)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title, right in (
        ("node", False),
        ("pass", True),
        ("state", False),
        ("read", True),
        ("set aside", True),
        ("last full pass", False),
    ):
        table.add_column(title, justify="right" if right else "left")
    for answer in answers:
        state = answer["scrub"]
        if state is None:
            table.add_row(answer["node"], "", escape(printable(answer["error"])), "", "", "")
            continue
        aside = figures.number(state["findings"])
        if state["index_damaged"]:
            aside += ", index damaged"
        table.add_row(
            answer["node"],
            str(state["pass_number"]),
            _state(state),
            f"{figures.size(state['bytes_done'])} of {figures.size(state['bytes_total'])}",
            aside,
            _ago(state["ended"]),
        )
    console.print(table)


def _state(state: dict[str, Any]) -> str:
    if state["paused"]:
        return "paused"
    if not state["running"]:
        return "waiting"
    return "running, asked for" if state["asked_for"] else "running"


def _ago(at: float) -> str:
    if not at:
        return "never"
    hours = max(0.0, time.time() - at) / 3600
    return f"{hours:.1f} hours ago" if hours < 48 else f"{hours / 24:.1f} days ago"
