"""Show how far a transfer is: a bar on a terminal, a line now and then otherwise.

Called by `cli.transfers`.  Everything goes to standard error, so that output can be piped.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cli import figures
from cli.failures import say
from client.report import Counters

_LINE_EVERY_S = 5.0
_BAR_EVERY_S = 0.1


@contextmanager
def shown_progress(verb: str, quiet: bool) -> Iterator[Callable[[Counters], None] | None]:
    """A callback for `client.transfer` that shows what it is told while the context is open."""
    if quiet:
        yield None
    elif sys.stderr.isatty():
        with _bar(verb) as callback:
            yield callback
    else:
        yield _lines(verb)


@contextmanager
def shown_count(unit: str, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A callback that is told what was done, to how many `unit`s, of how many about."""
    if quiet:
        yield lambda _what, _done, _total: None
    elif sys.stderr.isatty():
        with _count_bar() as callback:
            yield callback
    else:
        yield _count_lines(unit)


def _count_lines(unit: str) -> Callable[[str, int, int], None]:
    last = time.monotonic()

    def show(what: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _LINE_EVERY_S:
            last = now
            say(f"{what}: {figures.number(done)} of {figures.plural(max(done, total), unit)}")

    return show


@contextmanager
def _count_bar() -> Iterator[Callable[[str, int, int], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as progress:
        task = progress.add_task("", total=None)

        def show(what: str, done: int, total: int) -> None:
            progress.update(task, description=what, total=max(done, total), completed=done)

        yield show


def _lines(verb: str) -> Callable[[Counters], None]:
    last = time.monotonic()

    def show(counters: Counters) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _LINE_EVERY_S:
            last = now
            say(
                f"{verb}: {figures.number(counters.files_done)} of "
                f"{figures.plural(counters.files_total, 'file')}, "
                f"{figures.size(counters.bytes_done)} of {figures.size(counters.bytes_total)}"
            )

    return show


@contextmanager
def _bar(verb: str) -> Iterator[Callable[[Counters], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    last = 0.0
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[files]}"),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as progress:
        task = progress.add_task(verb, files="", total=None)

        def show(counters: Counters) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last < _BAR_EVERY_S:
                return
            last = now
            progress.update(
                task,
                total=counters.bytes_total,
                completed=counters.bytes_done,
                files=f"{counters.files_done:,}/{counters.files_total:,} files",
            )

        yield show
