"""Move files and trees between a local disk and a cell: plan first, then do.

The entry points of the client for whole files; called by `cli`, `chaos` and `bench`.  May import
`protocol` and its own package.

    plan = await plan_upload(client, "photos", "/photos")     # decides; nothing is sent
    report = await carry_out_upload(client, plan)             # does
    report = await upload_tree(client, "photos", "/photos")   # both
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from client.api import HaversackClient
from client.download import Downloader
from client.download_plan import DownloadPlan, plan_download
from client.entries import EntryKind
from client.local_root import LocalRoot
from client.report import (
    Counters,
    ItemFailure,
    ItemNote,
    Ledger,
    Progress,
    TransferOptions,
    TransferReport,
)
from client.upload import Uploader
from client.upload_plan import RemoteState, UploadPlan, check_remote, walk
from protocol.errors import EntryNotFound, HaversackError
from protocol.names import name_key

__all__ = [
    "Counters",
    "DownloadPlan",
    "ItemFailure",
    "ItemNote",
    "Progress",
    "TransferOptions",
    "TransferReport",
    "UploadPlan",
    "carry_out_download",
    "carry_out_upload",
    "download_file",
    "download_tree",
    "plan_download",
    "plan_upload",
    "upload_file",
    "upload_tree",
]


async def plan_upload(
    client: HaversackClient, local: str, remote: str, exclude: Sequence[str] = ()
) -> UploadPlan:
    """Decide the upload of a folder, a file or a symlink to the path `remote`, without the names
    below it that match a pattern of `exclude` (`*`, `?`, `[...]`).

    Looks at both sides and sends nothing.  What the plan saw at a path is what it will replace:
    another client's later change there is a conflict, not overwritten.
    """
    remote = "/" + "/".join(part for part in remote.split("/") if part)
    check_remote(remote)
    standing = await _standing(client, remote)
    return await client.run(lambda: walk(local, remote, standing, exclude))


async def carry_out_upload(
    client: HaversackClient,
    plan: UploadPlan,
    options: TransferOptions | None = None,
    progress: Progress | None = None,
) -> TransferReport:
    """Do what a plan says.  Never raises for one item; see `TransferReport`."""
    started = asyncio.get_running_loop().time()
    ledger = Ledger(progress)
    ledger.counters.files_total = len(plan.files)
    ledger.counters.bytes_total = plan.bytes_total
    ledger.failures.extend(plan.refused)
    ledger.changed()
    stopped = await Uploader(client, plan, options or TransferOptions(), ledger).run()
    return _report(ledger, plan.notes, stopped, started)


async def carry_out_download(
    client: HaversackClient,
    plan: DownloadPlan,
    options: TransferOptions | None = None,
    progress: Progress | None = None,
) -> TransferReport:
    """Do what a plan says.  Never raises for one item; raises `LocalFileError` if the local folder
    itself cannot be made or opened."""
    started = asyncio.get_running_loop().time()
    ledger = Ledger(progress)
    ledger.counters.files_total = len(plan.files)
    ledger.counters.bytes_total = plan.bytes_total
    ledger.failures.extend(plan.refused)
    ledger.changed()
    root = await client.run(lambda: LocalRoot(plan.root))
    try:
        stopped = await Downloader(client, plan, root, options or TransferOptions(), ledger).run()
    finally:
        root.close()
    return _report(ledger, (), stopped, started)


async def upload_tree(
    client: HaversackClient,
    local: str,
    remote: str,
    options: TransferOptions | None = None,
    progress: Progress | None = None,
) -> TransferReport:
    """Upload a folder (or a file, or a symlink) so that it stands at `remote`."""
    return await carry_out_upload(
        client, await plan_upload(client, local, remote), options, progress
    )


async def download_tree(
    client: HaversackClient,
    remote: str,
    local: str,
    options: TransferOptions | None = None,
    progress: Progress | None = None,
) -> TransferReport:
    """Download a folder's contents into `local` (or a file, or a symlink, to `local`)."""
    return await carry_out_download(
        client, await plan_download(client, remote, local), options, progress
    )


async def upload_file(client: HaversackClient, local: str, remote: str) -> TransferReport:
    """Upload one file.  Raises its error instead of reporting it."""
    return _raised(await upload_tree(client, local, remote))


async def download_file(
    client: HaversackClient, remote: str, local: str, *, overwrite: bool = False
) -> TransferReport:
    """Download one file.  Raises its error instead of reporting it."""
    options = TransferOptions(overwrite=overwrite)
    return _raised(await download_tree(client, remote, local, options))


async def _standing(client: HaversackClient, remote: str) -> dict[str, RemoteState]:
    """What the server has at `remote` and below."""
    found: dict[str, RemoteState] = {}
    try:
        if remote != "/":
            entry = await client.entry(remote)
            found[name_key(remote)] = RemoteState.of(entry)
            if entry.kind is not EntryKind.FOLDER:
                return found
        async for entry in client.iter_folder(remote, recursive=True):
            found[name_key(entry.path)] = RemoteState.of(entry)
    except EntryNotFound:
        pass  # nothing there yet; or deleted under us, and then nothing is replaced
    return found


def _report(
    ledger: Ledger,
    notes: tuple[ItemNote, ...],
    stopped: HaversackError | None,
    started: float,
) -> TransferReport:
    ledger.changed()
    return TransferReport(
        counters=ledger.counters,
        failures=tuple(ledger.failures),
        notes=notes,
        stopped=stopped,
        seconds=asyncio.get_running_loop().time() - started,
    )


def _raised(report: TransferReport) -> TransferReport:
    if report.failures:
        raise report.failures[0].error
    if report.stopped is not None:
        raise report.stopped
    return report
