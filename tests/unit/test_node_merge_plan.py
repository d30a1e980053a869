"""Which extents are merged, and which never are."""

from __future__ import annotations

from protocol.limits import MIB
from storage_node.extents import Family, mark_key
from storage_node.merge_plan import (
    RUN_FILES_MIN,
    SHORT_FILE_BYTES,
    ExtentFile,
    MergePlan,
    extent_files,
    plan_merge,
)

BUDGET = 256 * MIB


def file(number: int, size: int, family: Family = Family.EXTENTS) -> ExtentFile:
    return ExtentFile(
        family,
        mark_key(family, 10 * number),
        mark_key(family, 10 * number + 9),
        size,
        f"/{number:06d}.sst",
    )


def planned(
    files: list[ExtentFile], budget: int = BUDGET, skip: set[str] | None = None
) -> list[str]:
    plan = plan_merge(files, budget, skip=skip or set())
    return [] if plan is None else [item.name for item in plan.files]


def test_few_short_files_are_left_alone() -> None:
    assert planned([file(n, 1 * MIB) for n in range(RUN_FILES_MIN - 1)]) == []


def test_many_short_neighbours_are_merged() -> None:
    files = [file(n, 1 * MIB) for n in range(RUN_FILES_MIN)]
    assert planned(files) == [item.name for item in files]


def test_a_long_file_is_never_rewritten_and_separates_runs() -> None:
    short = [file(n, 1 * MIB) for n in range(RUN_FILES_MIN - 1)]
    more = [file(1000 + n, 1 * MIB) for n in range(RUN_FILES_MIN)]
    files = [*short, file(999, SHORT_FILE_BYTES), *more]
    assert planned(files) == [item.name for item in more]


def test_a_run_stays_within_its_family() -> None:
    half = RUN_FILES_MIN - 1
    files = [file(n, 1 * MIB) for n in range(half)]
    files += [file(n, 1 * MIB, Family.SMALL) for n in range(half)]
    assert planned(files) == []


def test_a_run_stays_within_the_budget() -> None:
    files = [file(n, 10 * MIB) for n in range(100)]
    chosen = planned(files, 64 * MIB)
    assert len(chosen) == 6


def test_a_budget_too_small_for_progress_plans_nothing() -> None:
    files = [file(n, 10 * MIB) for n in range(100)]
    assert planned(files, 20 * MIB) == []


def test_a_file_that_could_not_be_read_is_gone_around() -> None:
    files = [file(n, 1 * MIB) for n in range(2 * RUN_FILES_MIN)]
    chosen = planned(files, skip={files[10].name})
    assert files[10].name not in chosen
    assert chosen[0] == files[11].name


def test_a_plan_knows_its_range_and_size() -> None:
    plan = MergePlan(Family.EXTENTS, (file(1, 5), file(2, 7)))
    assert (plan.size, plan.first_key, plan.last_key) == (
        12,
        mark_key(Family.EXTENTS, 10),
        mark_key(Family.EXTENTS, 29),
    )


def test_files_of_other_families_are_not_considered() -> None:
    live = [
        {"name": "/1.sst", "size": 5, "start_key": b"\0" * 41, "end_key": b"\0" * 41},
        {"name": "/2.sst", "size": 5, "start_key": b"totals", "end_key": b"totals"},
        {
            "name": "/3.sst",
            "size": 5,
            "start_key": mark_key(Family.SMALL, 7),
            "end_key": mark_key(Family.SMALL, 9),
        },
    ]
    assert [item.name for item in extent_files(live)] == ["/3.sst"]
