"""Which extents to rewrite so that the space of deleted records comes back: by live share.

Called by `merge.Merger`; pure.  `merge` joins short neighbours because of their number; this finds
files, long or short, of which much is dead, by the `dead/` marks in the default family.  A plan
goes through the same steps as a merge, so the old file goes only after the new one is durable.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Final, NamedTuple

from protocol.limits import KIB
from storage_node.extents import family_of
from storage_node.merge_plan import ExtentFile, MergePlan

DEAD_SHARE_MIN: Final = 0.25
"""Dead part of a file from which on it is rewritten: on average, a byte written once is written
less than four times over before all of a full disk's garbage is gone."""

DEAD_SHARE_MIN_SHORT: Final = 0.02
"""The same while space is short: then every byte is wanted."""

DEAD_BYTES_MIN: Final = 256 * KIB
"""A rewrite costs a file operation or five, whatever it brings."""


class DeadRecords(NamedTuple):
    """Where the marked records are."""

    bytes_by_file: dict[str, int]
    homeless: list[bytes]
    """Keys in no file's range: gone already, or not yet in a file."""


def dead_records(files: Sequence[ExtentFile], marks: Iterable[tuple[bytes, int]]) -> DeadRecords:
    """Bytes of dead records in each file, by name.

    `files` are in key order, `marks` are record keys and lengths in key order.  Files of one
    family do not overlap, but for those that hold nothing but tombstones.
    """
    found: dict[str, int] = {}
    homeless: list[bytes] = []
    number = 0
    for key, length in marks:
        family = family_of(key)
        while number < len(files) and (
            (files[number].family.name, files[number].last_key) < (family and family.name, key)
        ):
            number += 1
        if number < len(files) and files[number].first_key <= key:
            name = files[number].name
            found[name] = found.get(name, 0) + length
        else:
            homeless.append(key)
    return DeadRecords(found, homeless)


def plan_reclaim(
    files: Sequence[ExtentFile],
    dead: Mapping[str, int],
    budget_bytes: int,
    *,
    room_bytes: int,
    share_min: float,
    skip: AbstractSet[str],
) -> MergePlan | None:
    """The run of neighbours that brings most for what it costs; None if none is worth it.

    `room_bytes` bounds what the rewritten files may take beside the old ones; `budget_bytes` the
    length of a run, except of a single file.
    """
    best: MergePlan | None = None
    best_gain = 0.0
    for run in _runs(files, dead, budget_bytes, share_min, skip):
        plan = MergePlan(run[0].family, tuple(run))
        gone = sum(dead[file.name] for file in run)
        live = max(0, plan.size - gone)
        gain = gone / (live + DEAD_BYTES_MIN)
        if gone >= DEAD_BYTES_MIN and live <= room_bytes and gain > best_gain:
            best, best_gain = plan, gain
    return best


def _runs(
    files: Sequence[ExtentFile],
    dead: Mapping[str, int],
    budget_bytes: int,
    share_min: float,
    skip: AbstractSet[str],
) -> Iterable[list[ExtentFile]]:
    """Neighbours that are each dead enough, as long as the budget allows."""
    run: list[ExtentFile] = []
    for file in files:
        wanted = file.name not in skip and dead.get(file.name, 0) >= share_min * file.size
        fits = not run or (
            run[0].family is file.family
            and sum(item.size for item in run) + file.size <= budget_bytes
        )
        if run and not (wanted and fits):
            yield run
            run = []
        if wanted:
            run.append(file)
    if run:
        yield run
