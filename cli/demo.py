"""`haversack demo`: a real tree in, nodes destroyed, the same tree out, compared byte by byte.

Walk: start a cell of its own (`chaos.live.cell`), put the tree with the installed command, put it
again (nothing may travel), destroy nodes (their processes and their directories), get the tree
into a fresh folder, compare with `cli.compare`, print what happened.  Exit code 0 only if every
byte, type and executable bit is the same.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import orjson

from chaos.live.cell import CellFailed, LiveCell
from cli import figures
from cli.compare import Comparison, compare_trees
from cli.failures import Exit, printable, say

_LIBRARY_EXCLUDES = frozenset({"site-packages", "__pycache__"})
_REMOTE = "/demo"


@dataclass(slots=True)
class _Step:
    """One line of the report."""

    name: str
    seconds: float
    bytes: int = 0
    detail: str = ""


@dataclass(slots=True)
class _Story:
    """What happened so far."""

    steps: list[_Step] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, step: _Step) -> None:
        """Take a step, and tell it."""
        self.steps.append(step)
        say(f"demo: {step.name}: {step.detail} ({step.seconds:.1f} s)")


def run(tree: Path | None, nodes: int, scheme: str, lose: int) -> int:
    """Run the demo; 0 if the tree came back as it was."""
    exclude = frozenset[str]() if tree else _LIBRARY_EXCLUDES
    source = (tree or Path(os.__file__).parent).resolve()
    if not source.is_dir():
        say(f"haversack: usage: {source} is not a folder")
        return Exit.USAGE
    story = _Story()
    signal.signal(signal.SIGTERM, _interrupt)
    back = Path(tempfile.mkdtemp(prefix="haversack-demo-"))
    try:
        with LiveCell(nodes=nodes, scheme=scheme) as cell:
            _tell_story(cell, source, exclude, back / "tree", lose, story)
    except (CellFailed, _CommandFailed) as error:
        story.problems.append(str(error))
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    finally:
        shutil.rmtree(back, ignore_errors=True)
    _print_report(source, nodes, scheme, lose, story)
    return Exit.ITEMS_FAILED if story.problems else Exit.OK


def _interrupt(number: int, frame: FrameType | None) -> None:
    """SIGTERM ends the demo as Ctrl-C does: the cell is stopped, its directory removed."""
    raise KeyboardInterrupt


def _tell_story(
    cell: LiveCell, source: Path, exclude: frozenset[str], back: Path, lose: int, story: _Story
) -> None:
    seconds = cell.start()
    story.add(_Step("start a cell", seconds, detail=cell.url))
    cell.wait_for_nodes(len(cell.status()["nodes"]))

    options = [f"--exclude={name}" for name in sorted(exclude)]
    first = _command(cell, "put", str(source), _REMOTE, *options)
    story.add(_transferred("put the tree", first))
    again = _command(cell, "put", str(source), _REMOTE, *options)
    story.add(_transferred("put it again", again))
    if again["bytes_moved"] or again["blocks_new"]:
        story.problems.append(f"the second put sent {again['bytes_moved']} bytes, not 0")

    started = time.monotonic()
    victims = cell.destroy_nodes(lose)
    detail = f"{', '.join(victims)}: SIGKILL, directories removed"
    story.add(_Step(f"destroy {lose} of {len(cell.status()['nodes'])} nodes",
                    time.monotonic() - started, detail=detail))  # fmt: skip
    if len(victims) != lose:
        story.problems.append(f"only {len(victims)} nodes could be destroyed")

    story.add(_transferred("get the tree", _command(cell, "get", _REMOTE, str(back))))
    started = time.monotonic()
    comparison = compare_trees(str(source), str(back), exclude)
    story.add(_compared(comparison, time.monotonic() - started))
    story.problems += comparison.differences


class _CommandFailed(Exception):
    """A `haversack` command ended with an error."""


def _command(cell: LiveCell, *arguments: str) -> dict[str, Any]:
    """Run the installed command as a user does; its JSON report.  Raises `_CommandFailed`."""
    done = subprocess.run(
        (
            str(Path(sys.executable).with_name("haversack")),
            *("--server", cell.url, "--token-file", str(cell.token_file)),
            *(arguments[0], "--json", *arguments[1:]),
        ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        check=False,
    )
    if done.returncode != 0:
        raise _CommandFailed(f"haversack {arguments[0]} ended with exit code {done.returncode}")
    report: dict[str, Any] = orjson.loads(done.stdout)
    return report


def _transferred(name: str, report: dict[str, Any]) -> _Step:
    detail = f"{figures.plural(report['files_done'], 'file')}, "
    if name.startswith("put"):
        detail += (
            f"{figures.number(report['blocks_new'])} blocks new, "
            f"{figures.number(report['blocks_deduplicated'])} deduplicated, "
        )
    detail += f"{figures.size(report['bytes_moved'])} moved; {report['cpu_seconds']:.1f} s of CPU"
    return _Step(name, report["seconds"], report["bytes_done"], detail)


def _compared(comparison: Comparison, seconds: float) -> _Step:
    verdict = "no difference" if not comparison.differences else "DIFFERENT"
    detail = (
        f"{figures.plural(comparison.files, 'file')}, "
        f"{figures.plural(comparison.folders, 'folder')}, "
        f"{figures.plural(comparison.symlinks, 'symlink')}: {verdict}"
    )
    return _Step("compare every byte", seconds, comparison.bytes, detail)


def _print_report(source: Path, nodes: int, scheme: str, lose: int, story: _Story) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120)
    title = f"{source} on {nodes} nodes, {scheme}, {lose} destroyed"
    table = Table(title=escape(printable(title)), title_justify="left")
    table.add_column("step")
    table.add_column("seconds", justify="right")
    table.add_column("MB/s", justify="right")
    table.add_column("what", overflow="fold")
    for step in story.steps:
        speed = f"{step.bytes / step.seconds / 1e6:.0f}" if step.bytes and step.seconds else ""
        table.add_row(step.name, f"{step.seconds:.1f}", speed, escape(printable(step.detail)))
    console.print(table)
    for problem in story.problems:
        console.print(printable(problem), style="red", markup=False, highlight=False)
    if not story.problems:
        console.print("The tree came back byte for byte.", style="green")
