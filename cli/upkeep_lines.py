"""Lines of `haversack status` about what keeps a cell whole: repair, scrubs, the verifier.

Pure: from the answer of the server to text.  Called by `cli.inspection`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cli import figures


def upkeep_lines(state: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(title, text) of each; repair is told of only while it works, canaries only by their alarms,
    which the status has elsewhere."""
    repair = state.get("repair")
    if repair is not None and repair["ended"] is None:
        yield "repair", _repair(repair)
    disks = [
        node["disk"]
        for node in state.get("nodes", [])
        if node.get("disk") is not None and node["state"] != "gone"
    ]
    if disks:
        yield "scrub", _scrub([disk["scrub"] for disk in disks])
    damaged = sum(disk["scrub"]["index_damaged"] for disk in disks)
    if damaged:
        yield "damaged", f"a part of the index of {figures.plural(damaged, 'node')} is unreadable"
    verification = state.get("verification")
    if verification is not None:
        yield from _verification(verification)


def _repair(repair: dict[str, Any]) -> str:
    """`2 volumes to go, about 1.2 GB, at 91.0 MB/s, about 5 min to go`."""
    said = f"works on {figures.plural(repair['left_volumes'], 'volume')}"
    if repair["left_bytes"]:
        said += f", about {figures.size(repair['left_bytes'])} to make"
    if repair["bytes_per_s"]:
        said += f", {figures.size(repair['bytes_per_s'])}/s"
    if repair["eta_s"]:
        said += f", about {figures.lasting(repair['eta_s'])} to go"
    if repair["blocked_slots"]:
        said += f"; {figures.plural(repair['blocked_slots'], 'slot')} cannot be made now"
    return said


def _scrub(scrubs: list[dict[str, Any]]) -> str:
    """`2 of 9 nodes read their fragments, 41 % (1.2 GB) of theirs; 1 fragment set aside`."""
    running = [scrub for scrub in scrubs if scrub["running"]]
    if running:
        done = sum(scrub["bytes_done"] for scrub in running)
        total = sum(scrub["bytes_total"] for scrub in running)
        said = f"{len(running)} of {figures.plural(len(scrubs), 'node')} in a pass"
        said += f", {percent(done, total)} of {figures.size(total)} read"
        paused = sum(scrub["paused"] for scrub in running)
        said += f", {paused} paused" if paused else ""
    else:
        ended = [scrub["ended"] for scrub in scrubs if scrub["ended"]]
        said = "no pass under way, "
        said += f"the oldest ended {figures.moment(min(ended))}" if ended else "none has ended"
        if ended and len(ended) < len(scrubs):
            said += f", {figures.plural(len(scrubs) - len(ended), 'node')} had none"
    findings = sum(scrub["findings"] for scrub in scrubs)
    return said + f"; {figures.plural(findings, 'fragment')} set aside" * bool(findings)


def _verification(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The pass under way, what the last one found, and strays."""
    current, finished = found["current"], found["finished"]
    if current is not None and current["ended"] is None:
        yield (
            "verifying",
            f"pass {current['number']} since {figures.moment(current['begun'])}, "
            f"{percent(current['blocks'], current['blocks_total'])} of "
            f"{figures.plural(current['blocks_total'], 'block')}",
        )
    if finished is not None:
        yield "verified", _finished(finished)
    if found["strays"]:
        said = ", ".join(
            f"{total['fragments']:,} {kind} ({figures.size(total['bytes'])})"
            for kind, total in found["strays"].items()
        )
        yield "strays", said
    removal = found["removal"]
    if removal is not None and removal["ended"] is None:
        yield "removing", f"strays, since {figures.moment(removal['begun'])}"


def _finished(finished: dict[str, Any]) -> str:
    """`2026-11-21 10:00, every fragment read: 1,204 blocks, no difference`."""
    differences = finished["differences"]
    depth = "every fragment read" if finished["deep"] else "inventories compared"
    said = f"{figures.moment(finished['ended'])}, {depth}: "
    said += f"{figures.plural(finished['blocks'], 'block')}, "
    said += (
        ", ".join(
            f"{entry['count']:,} {kind}" for kind, entry in differences.items() if entry["count"]
        )
        or "no difference"
    )
    if finished["unlooked_slots"]:
        said += f"; {figures.plural(finished['unlooked_slots'], 'fragment')} not looked at"
    return said


def percent(done: int, total: int) -> str:
    """`41 %`; nothing of nothing is all of it."""
    return f"{100 * min(done, total) // total if total else 100} %"
