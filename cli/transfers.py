"""`haversack put` and `haversack get`: plan, do, and say what became of it.

Called by `cli.main`; the work is `client.transfer`'s.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import orjson

from cli import figures
from cli.connection import ServerOptions, run_with_client
from cli.failures import Exit, exit_code, printable, report_failure, say
from cli.progress import shown_progress

if TYPE_CHECKING:
    from client.api import HaversackClient
    from client.transfer import DownloadPlan, TransferReport, UploadPlan

_FAILURES_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Manner:
    """How a transfer is done and told."""

    json: bool = False
    dry_run: bool = False
    quiet: bool = False


def put(
    options: ServerOptions,
    local: str,
    remote: str | None,
    exclude: tuple[str, ...],
    manner: Manner,
) -> Exit:
    """Upload a file or a tree."""

    async def work(client: HaversackClient) -> Exit:
        from client.transfer import carry_out_upload, plan_upload

        target = await _upload_end(client, local, remote)
        plan = await plan_upload(client, local, target, exclude)
        if manner.dry_run:
            return _show_plan(plan, len(plan.folders), manner)
        with shown_progress("put", manner.quiet or manner.json) as progress:
            report = await carry_out_upload(client, plan, progress=progress)
        return _tell("put", target, report, manner)

    return run_with_client(options, work, patient=True)


def get(options: ServerOptions, remote: str, local: str, overwrite: bool, manner: Manner) -> Exit:
    """Download a file or a tree."""

    async def work(client: HaversackClient) -> Exit:
        from client.transfer import TransferOptions, carry_out_download, plan_download

        plan = await plan_download(client, remote, await _download_end(client, remote, local))
        if manner.dry_run:
            return _show_plan(plan, len(plan.folders), manner)
        with shown_progress("get", manner.quiet or manner.json) as progress:
            report = await carry_out_download(
                client, plan, TransferOptions(overwrite=overwrite), progress
            )
        return _tell("get", local, report, manner)

    return run_with_client(options, work, patient=True)


async def _upload_end(client: HaversackClient, local: str, remote: str | None) -> str:
    """Where an upload goes.  A trailing slash on the remote path, or a file onto a remote folder,
    means into it; a tree without a slash becomes the remote path."""
    from client.entries import EntryKind
    from protocol.errors import EntryNotFound

    name, is_tree = _describe(local)
    if remote is None:
        return f"/{name}"
    is_root = not remote.strip("/")
    if is_tree and (is_root or not remote.endswith("/")):
        return remote
    into = is_root or remote.endswith("/")
    if not into:
        try:
            into = (await client.entry(remote)).kind is EntryKind.FOLDER
        except EntryNotFound:
            into = False
    return f"{remote.rstrip('/')}/{name}" if into else remote


async def _download_end(client: HaversackClient, remote: str, local: str) -> str:
    """Where a download goes: a file onto a local folder means into it."""
    from client.entries import EntryKind

    _, is_folder = _describe(local)
    if not remote.strip("/") or not (is_folder or local.endswith("/")):
        return local
    entry = await client.entry(remote)
    return local if entry.kind is EntryKind.FOLDER else os.path.join(local, entry.name)


def _describe(local: str) -> tuple[str, bool]:
    """Name of a local path, and whether a folder stands there.  A symlink is a symlink, unless a
    trailing slash asks for what it leads to."""
    name = os.path.basename(os.path.abspath(local))
    return name, os.path.isdir(local) and not os.path.islink(local)


def _show_plan(plan: UploadPlan | DownloadPlan, folders: int, manner: Manner) -> Exit:
    """What would be done, to standard output."""
    for item in plan.refused:
        say(f"haversack: {item.path}: {item.error.kind}: {item.error.message}")
    summary = {
        "files": len(plan.files),
        "bytes": plan.bytes_total,
        "symlinks": len(plan.links),
        "folders": folders,
        "refused": len(plan.refused),
    }
    if manner.json:
        print(orjson.dumps(summary).decode())
    else:
        print(
            f"would transfer {figures.plural(summary['files'], 'file')} "
            f"({figures.size(summary['bytes'])}), {figures.plural(summary['symlinks'], 'symlink')}"
            f", {figures.plural(summary['folders'], 'folder')}; "
            f"{figures.plural(summary['refused'], 'path')} refused"
        )
    return Exit.ITEMS_FAILED if plan.refused else Exit.OK


def _tell(verb: str, where: str, report: TransferReport, manner: Manner) -> Exit:
    """The last lines of a transfer, and its exit code."""
    for note in report.notes:
        say(f"haversack: {note.path}: {note.reason}")
    for item in report.failures[:_FAILURES_SHOWN]:
        say(f"haversack: {item.path}: {item.error.kind}: {item.error.message}")
    if len(report.failures) > _FAILURES_SHOWN:
        say(f"haversack: and {len(report.failures) - _FAILURES_SHOWN:,} more failures")
    if manner.json:
        print(orjson.dumps(_as_json(report)).decode())
    else:
        print(printable(f"{verb} {where}: {_summary(verb, report)}"))
    if report.stopped is not None:
        report_failure(report.stopped)
        return exit_code(report.stopped)
    return Exit.ITEMS_FAILED if report.failures else Exit.OK


def _summary(verb: str, report: TransferReport) -> str:
    counters = report.counters
    parts = [
        f"{figures.plural(counters.files_done, 'file')} "
        f"({figures.number(counters.files_unchanged)} unchanged)"
    ]
    if counters.symlinks_done:
        parts.append(figures.plural(counters.symlinks_done, "symlink"))
    if verb == "put":
        parts.append(
            f"blocks: {figures.number(counters.blocks_new)} new, "
            f"{figures.number(counters.blocks_deduplicated)} deduplicated"
        )
    moved = "sent" if verb == "put" else "received"
    parts.append(
        f"{figures.size(counters.bytes_moved)} of {figures.size(counters.bytes_done)} {moved}"
    )
    parts.append(f"{report.seconds:.1f} s, {figures.rate(counters.bytes_done, report.seconds)}")
    if report.failures:
        parts.append(f"{figures.number(len(report.failures))} failed")
    return "; ".join(parts)


def _as_json(report: TransferReport) -> dict[str, Any]:
    stopped = report.stopped
    return {
        **asdict(report.counters),
        "seconds": report.seconds,
        "cpu_seconds": time.process_time(),
        "failures": [
            {
                "path": printable(item.path),
                "kind": item.error.kind,
                "message": printable(item.error.message),
            }
            for item in report.failures
        ],
        "left_out": [
            {"path": printable(note.path), "reason": note.reason} for note in report.notes
        ],
        "stopped": None
        if stopped is None
        else {"kind": stopped.kind, "message": printable(stopped.message)},
    }
