"""`haversack why`, `what-if` and `events`: questions to a cell about its redundancy.

Called by `cli.main`.  The answers are made by the server; this only shows them.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import orjson

from cli import figures
from cli.connection import ServerOptions, run_with_client
from cli.failures import Exit, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from client.api import HaversackClient

_PIPED_COLUMNS = 200


def why(options: ServerOptions, subject: str, as_json: bool) -> Exit:
    """Explain a block, a volume or a node."""

    async def work(client: HaversackClient) -> Exit:
        answer = await client.why(subject)
        if as_json:
            print_json(answer)
        else:
            _Why(console(), answer, time.time()).print()
        return Exit.OK

    return run_with_client(options, work, patient=False)


def what_if(
    options: ServerOptions, names: tuple[str, ...], any_one: str | None, as_json: bool
) -> Exit:
    """Say what a loss would leave."""

    async def work(client: HaversackClient) -> Exit:
        answer = await client.what_if(names, any_one=any_one)
        if as_json:
            print_json(answer)
        else:
            _print_loss(console(), answer)
        return Exit.OK

    return run_with_client(options, work, patient=False)


def events(options: ServerOptions, subject: str | None, limit: int, as_json: bool) -> Exit:
    """List what happened."""

    async def work(client: HaversackClient) -> Exit:
        answer = await client.events(subject, limit)
        if as_json:
            print_json(answer)
        else:
            print_events(console(), answer["events"])
        return Exit.OK

    return run_with_client(options, work, patient=False)


def print_json(value: Any) -> None:
    """For scripts."""
    print(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode())


def console() -> Console:
    """Standard output, wide where there is no terminal to fit into."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else _PIPED_COLUMNS
    return Console(width=width, highlight=False, soft_wrap=not sys.stdout.isatty())


def table(*titles: str) -> Table:
    """Columns without lines; a title that ends in `>` is right-aligned."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        right = title.endswith(">")
        made.add_column(title.rstrip(">"), justify="right" if right else "left", overflow="fold")
    return made


def safe(value: Any, absent: str = "-") -> str:
    """A value as text that neither the terminal nor Rich takes for a command."""
    from rich.markup import escape

    return absent if value in (None, "") else escape(printable(str(value)))


def print_events(shown: Console, found: list[dict[str, Any]]) -> None:
    """Oldest first, as a log is read."""
    rows = table("when", "what", "to", "detail")
    for event in reversed(found):
        rows.add_row(
            figures.moment(event["at"]),
            safe(event["kind"]),
            safe(event["subject"]),
            safe(event["detail"], ""),
        )
    shown.print(rows)


def print_histogram(
    shown: Console, after: dict[str, dict[str, int]], before: dict[str, dict[str, int]]
) -> None:
    """Classes of spare fragments from the worst to the best, and how they were."""
    rows = table("spare>", "volumes>", "blocks>", "bytes>", "blocks now>")
    for spare in sorted({*after, *before}, key=int):
        amount, held = after.get(spare, {}), before.get(spare, {})
        colour = "red" if int(spare) < 0 else "yellow" if int(spare) == 0 else "green"
        rows.add_row(
            f"[{colour}]{safe(spare)}[/]",
            figures.number(amount.get("volumes", 0)),
            figures.number(amount.get("blocks", 0)),
            figures.size(amount.get("stored_bytes", 0)),
            figures.number(held.get("blocks", 0)),
        )
    shown.print(rows)


def _print_loss(shown: Console, answer: dict[str, Any]) -> None:
    lost = ", ".join(safe(name) for name in answer["lost"]) or "nothing"
    shown.print(f"[bold]without {lost}[/] ({figures.plural(len(answer['nodes']), 'node')})\n")
    print_histogram(shown, answer["after"], answer["before"])
    unreadable, rebuilding = answer["unreadable"], answer["rebuilding"]
    shown.print()
    if unreadable["blocks"]:
        examples = ", ".join(safe(name) for name in unreadable["examples"])
        shown.print(
            f"[red]unreadable[/]  {figures.plural(unreadable['blocks'], 'block')} in "
            f"{figures.plural(unreadable['volumes'], 'volume')} ({examples})"
        )
    else:
        shown.print("[green]readable[/]    every block")
    worst = answer["fragments_of_one_block_max"]
    shown.print(f"at most     {figures.plural(worst, 'fragment')} of one block are in it")
    shown.print(
        f"to rebuild  {figures.plural(rebuilding['slots'], 'slot')}, about "
        f"{figures.size(rebuilding['fragment_bytes'])}; {rebuilding['nodes']} nodes have room for "
        f"{figures.size(rebuilding['room_bytes'])}"
    )
    if rebuilding["slots_without_target"]:
        shown.print(
            f"[red]but[/]         for {figures.plural(rebuilding['slots_without_target'], 'slot')} "
            "no node is left that holds no other of their volume"
        )
    if rebuilding["slots_beyond_spread"]:
        shown.print(
            f"[yellow]but[/]         {figures.plural(rebuilding['slots_beyond_spread'], 'slot')} "
            "would have to share a rack or host with more others than any does now"
        )
    if answer.get("worst"):
        shown.print("\nthe worst of each kind, blocks by spare fragments:")
        for risk in answer["worst"]:
            classes = ", ".join(
                f"{amount['blocks']:,} with {spare}" for spare, amount in risk["after"].items()
            )
            shown.print(f"  {safe(risk['domain'])}: {safe(classes)}")


class _Why:
    """Shows one answer of `why`; `now` is the wall clock."""

    def __init__(self, shown: Console, answer: dict[str, Any], now: float) -> None:
        self._shown = shown
        self._answer = answer
        self._now = now

    def print(self) -> None:
        """Headline, what comes next, and all that is known."""
        answer = self._answer
        self._shown.print(f"[bold]{safe(answer['kind'])} {safe(answer['subject'])}[/]")
        self._line("is", answer["summary"])
        for said in answer["next"]:
            self._line("next", said)
        match answer["kind"]:
            case "block":
                self._block()
            case "node":
                self._node()
        if "volume" in answer:
            self._volume()
            self._slots()
            self._risk()
        if answer["events"]:
            self._shown.print()
            print_events(self._shown, answer["events"])

    def _line(self, title: str, text: str) -> None:
        self._shown.print(f"{title:11} {safe(text)}")

    def _block(self) -> None:
        answer = self._answer
        self._line(
            "bytes",
            f"{figures.size(answer['plain_bytes'])}, stored as "
            f"{figures.size(answer['stored_bytes'])}, since {figures.moment(answer['created'])}",
        )
        references = answer["references"]
        named = ", ".join(
            f"{row['account'] or row['namespace']} ({row['count']})"
            for row in references["namespaces"]
        )
        self._line(
            "referenced",
            f"{figures.plural(references['total'], 'time')} in "
            f"{figures.plural(references['namespaces_total'], 'namespace')}"
            + (f": {named}" if named else ""),
        )
        for claim in answer["claims"]:
            name = claim["name"] or claim["owner"]
            self._line("claimed", f"by {name} until {figures.moment(claim['expires'])}")
        if answer["unrepairable"]:
            self._line("unrepairable", answer["unrepairable"]["reason"])
        for found in answer["strays"]:
            self._line("stray", f"slot {found['slot']} on {found['node']}: {found['kind']}")

    def _volume(self) -> None:
        volume = self._answer["volume"]
        self._line(
            "volume",
            f"{volume['id']}, {volume['scheme']}, {volume['state']}, epoch {volume['epoch']}, "
            f"{figures.plural(volume['blocks'], 'block')}, "
            f"{figures.size(volume['stored_bytes'])}",
        )
        if self._answer.get("owing_blocks"):
            self._line("owing", ", ".join(self._answer["owing_blocks"]))

    def _slots(self) -> None:
        checked = self._answer["kind"] == "block"
        last = "fragment" if checked else "blocks owed"
        rows = table("slot>", "node", "state", "rack/host", last, "moves to")
        for slot in self._answer["slots"]:
            good = slot["check"] == "intact" if checked else not slot["owed_blocks"]
            text = slot["check"] if checked else slot["owed_blocks"]
            colour = "green" if good else "red"
            place = f"{slot['rack']}/{slot['host']}" if slot["node"] else None
            rows.add_row(
                str(slot["slot"]),
                safe(slot["node"], "vacant"),
                safe(slot["node_state"]),
                safe(place),
                f"[{colour}]{safe(text)}[/]",
                safe(slot["move"] and slot["move"]["target"], ""),
            )
        self._shown.print()
        self._shown.print(rows)

    def _risk(self) -> None:
        risk = self._answer["risk"]
        if not risk["fatal"] or risk["spare"] < 0:
            return
        named = ", ".join(
            f"{row['level']} {row['name']} ({row['fragments']})" for row in risk["fatal"]
        )
        self._shown.print()
        self._line("one of", f"{named} lost now would make it unreadable")

    def _node(self) -> None:
        answer = self._answer
        node, live = answer["node"], answer["live"]
        self._line(
            "node",
            f"{node['rack']}/{node['host']}, {node['directory']}, process {node['pid']} at "
            f"{node['endpoint'] or '-'}, incarnation {node['incarnation']}",
        )
        if live["answers"]:
            said = f"it answers: {live['state']}" + (
                f", {live['detail']}" if live["detail"] else ""
            )
            said += (
                f", {figures.plural(live['fragments'], 'fragment')}, "
                f"{figures.size(live['fragment_bytes'])}, {figures.size(live['disk_free_bytes'])}"
                " free"
            )
            self._line("says", said)
        else:
            self._line("says", f"nothing: {live['error']}")
        slots = answer["slots"]
        self._line("holds", f"{figures.plural(slots['all'], 'slot')}, {slots['sealed']} of sealed")
        for risk in answer["at_risk"]:
            self._line(
                "at risk",
                f"{figures.plural(risk['volumes'], 'volume')} of {risk['scheme']} with "
                f"{risk['spare']} spare: {', '.join(risk['examples'])}",
            )
        for job in answer["jobs"]:
            self._line(
                "job",
                f"{job['id']}: {job['kind']}, {job['state']}, {job['done_units']:,} of "
                f"{job['total_units']:,} done",
            )
        for kind, count in answer["strays"].items():
            self._line("strays", f"{count} {kind}")
