"""Which extents to merge because they are short and many: the planning half of `merge`.

Pure; the other reason to rewrite extents, dead records, is planned in `reclaim`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from protocol.limits import MIB
from storage_node.extents import Family, family_of

SHORT_FILE_BYTES = 32 * MIB
"""Files from this size on are not merged again, so a record is rewritten once."""

RUN_BYTES_MIN = 128 * MIB
RUN_FILES_MIN = 128
"""A run is merged when it reaches either: many tiny files cost as much as few longer ones."""


class ExtentFile(NamedTuple):
    """One SST file of `extents` or `small`."""

    family: Family
    first_key: bytes
    last_key: bytes
    size: int
    name: str


@dataclass(frozen=True, slots=True)
class MergePlan:
    """Neighbours to be rewritten as one."""

    family: Family
    files: tuple[ExtentFile, ...]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def first_key(self) -> bytes:
        return self.files[0].first_key

    @property
    def last_key(self) -> bytes:
        return max(file.last_key for file in self.files)


def extent_files(live_files: Sequence[Mapping[str, Any]]) -> list[ExtentFile]:
    """The files of `extents` and `small` among RocksDB's live files, in key order."""
    found = []
    for file in live_files:
        family = family_of(file["start_key"])
        if family is not None:
            found.append(
                ExtentFile(family, file["start_key"], file["end_key"], file["size"], file["name"])
            )
    return sorted(found, key=lambda file: file.first_key)


def plan_merge(
    files: Sequence[ExtentFile], budget_bytes: int, *, skip: frozenset[str] | set[str]
) -> MergePlan | None:
    """The first run of short neighbours worth merging within the budget; None if there is none.

    `files` are in key order.  A run never crosses a long file, another family, or one in `skip`.
    """
    run: list[ExtentFile] = []
    for file in [*files, None]:
        ends = (
            file is None
            or file.size >= SHORT_FILE_BYTES
            or file.name in skip
            or (run and run[-1].family is not file.family)
        )
        full = (
            file is not None and run and sum(item.size for item in run) + file.size > budget_bytes
        )
        if (ends or full) and _worth(run, full=bool(full)):
            return MergePlan(run[0].family, tuple(run))
        if ends or full:
            run = []
        if file is not None and file.size < SHORT_FILE_BYTES and file.name not in skip:
            run.append(file)
    return None


def _worth(run: Sequence[ExtentFile], *, full: bool) -> bool:
    if len(run) < 2:
        return False
    size = sum(file.size for file in run)
    if full and size >= SHORT_FILE_BYTES:
        return True  # as much as the budget allows, and what comes out is not short any more
    return len(run) >= RUN_FILES_MIN or size >= RUN_BYTES_MIN
