"""How jobs and plans look in a terminal, and following a job to its end.

Called by `cli.nodes` and `cli.change`.  Progress goes to standard error, results to standard
output.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from cli import figures
from cli.connection import ServerOptions, run_with_client
from cli.failures import Exit, printable, say

if TYPE_CHECKING:
    from client.api import HaversackClient

_POLL_S = 0.5
_LINE_EVERY_S = 5.0
_SHOWN_MAX = 20
"""Moves, volumes and blockers that are printed; --json has all of them."""

_ENDED = frozenset({"done", "cancelled", "failed"})


@dataclass(frozen=True, slots=True)
class Manner:
    """How a change is asked for."""

    json: bool = False
    dry_run: bool = False
    detach: bool = False


def ask_for(options: ServerOptions, body: dict[str, Any], manner: Manner) -> Exit:
    """Create a job and follow it, or print its plan."""

    async def work(client: HaversackClient) -> Exit:
        if manner.dry_run:
            preview = await client.ask_admin("POST", "jobs", {**body, "dry_run": True})
            print_json(preview) if manner.json else _print_plan(preview)
            return Exit.OK
        job = await client.ask_admin("POST", "jobs", body)
        return await _finish(client, job, manner)

    return run_with_client(options, work, patient=False)


def follow(options: ServerOptions, job_id: int, as_json: bool) -> Exit:
    """Watch a job that exists until it ends."""

    async def work(client: HaversackClient) -> Exit:
        job = await client.ask_admin("GET", f"jobs/{job_id}")
        return await _finish(client, job, Manner(json=as_json))

    return run_with_client(options, work, patient=False)


def print_json(value: Any) -> None:
    """For scripts."""
    print(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode())


def print_job(job: dict[str, Any]) -> None:
    """All that is known of a job."""
    print(printable(f"job {job['id']}: {job['kind']} of {job['subject']}, {job['state']}"))
    print(printable(f"  {_how_far(job)}"))
    if job["detail"]:
        print(printable(f"  {job['detail']}"))
    print_blockers(job["blockers"])


def print_blockers(blockers: list[dict[str, Any]]) -> None:
    """What blocks a job or a plan: volumes, and blocks where single ones are the reason."""
    _print_volumes("blocked", blockers)


def _print_volumes(title: str, blockers: list[dict[str, Any]]) -> None:
    if not blockers:
        return
    print(f"{title}: {figures.plural(len(blockers), 'volume')}")
    for blocker in blockers[:_SHOWN_MAX]:
        print(printable(f"  {blocker['volume']}: {blocker['reason']}"))
        for block in blocker.get("blocks", [])[:_SHOWN_MAX]:
            print(printable(f"    {block}"))
    _print_more(len(blockers))


def _print_more(count: int) -> None:
    if count > _SHOWN_MAX:
        print(f"  ... and {figures.number(count - _SHOWN_MAX)} more; --json lists all")


def _print_plan(preview: dict[str, Any]) -> None:
    plan = preview["plan"]
    what = f"{preview['kind']} of {preview['subject']}"
    if plan.get("moves") is not None:
        units = figures.plural(plan["units"], "slot") + " to move"
        lines = [
            f"  {move['volume']} slot {move['slot']}: {move['source'] or 'rebuilt'} -> "
            f"{move['target']}, {figures.size(move['bytes'])}"
            for move in plan["moves"][:_SHOWN_MAX]
        ]
    else:
        units = figures.plural(plan["units"], "volume") + " to write anew"
        lines = [f"  {volume}" for volume in plan["volumes"][:_SHOWN_MAX]]
    print(printable(f"{what}: {units}, {figures.size(plan['bytes'])}; nothing was done"))
    for line in lines:
        print(printable(line))
    _print_more(plan["units"])
    _print_volumes("moved later", plan.get("waiting") or [])
    print_blockers(plan["blocked"])


async def _finish(client: HaversackClient, job: dict[str, Any], manner: Manner) -> Exit:
    if not manner.detach:
        try:
            job = await _watch(client, job)
        except (KeyboardInterrupt, asyncio.CancelledError):
            number = job["id"]
            say(
                f"job {number} goes on in the background: haversack jobs show {number}, or "
                f"haversack jobs cancel {number}"
            )
            raise
    print_json(job) if manner.json else print_job(job)
    if manner.detach or job["state"] == "done":
        return Exit.OK
    return Exit.ITEMS_FAILED


async def _watch(client: HaversackClient, job: dict[str, Any]) -> dict[str, Any]:
    """Show progress until the job has ended or somebody paused it."""
    with _shown(f"{job['kind']} {job['subject']}") as show:
        while job["state"] not in _ENDED and job["state"] != "paused":
            show(job)
            await asyncio.sleep(_POLL_S)
            job = await client.ask_admin("GET", f"jobs/{job['id']}")
    return job


@contextmanager
def _shown(title: str) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A bar on a terminal, a line now and then otherwise."""
    if not sys.stderr.isatty():
        yield _lines(title)
        return
    with contextlib.ExitStack() as stack:
        yield _bar(title, stack)


def _lines(title: str) -> Callable[[dict[str, Any]], None]:
    last = time.monotonic()

    def show(job: dict[str, Any]) -> None:
        nonlocal last
        if time.monotonic() - last >= _LINE_EVERY_S:
            last = time.monotonic()
            said = f"{title}: {_how_far(job)}" + (f"; {job['detail']}" if job["detail"] else "")
            for blocker in job["blockers"][:1]:
                said += f" ({blocker['volume']}: {blocker['reason']})"
            say(said)

    return show


def _bar(title: str, stack: contextlib.ExitStack) -> Callable[[dict[str, Any]], None]:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TextColumn

    progress = stack.enter_context(
        Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[said]}"),
            console=Console(stderr=True),
            transient=True,
        )
    )
    task = progress.add_task(escape(printable(title)), said="", total=None)

    def show(job: dict[str, Any]) -> None:
        said = _how_far(job) + (f"; {job['detail']}" if job["detail"] else "")
        progress.update(
            task,
            total=job["total_bytes"] or None,
            completed=job["done_bytes"],
            said=escape(printable(said)),
        )

    return show


def _how_far(job: dict[str, Any]) -> str:
    unit = "volume" if job["kind"] == "transcode" else "slot"
    said = (
        f"{figures.number(job['done_units'])} of {figures.plural(job['total_units'], unit)}, "
        f"{figures.size(job['done_bytes'])} of {figures.size(job['total_bytes'])}"
    )
    if job["blockers"] and job["state"] == "running":
        said += ", blocked"
    if job["bytes_per_s"]:
        said += f", {figures.size(job['bytes_per_s'])}/s"
    if job["eta_s"] is not None:
        said += f", {job['eta_s']:.0f} s to go"
    return said
