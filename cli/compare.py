"""Compare two local trees byte by byte, with code that shares nothing with the client's.

Called by `cli.demo`: the demo's verdict must not rest on what it judges.
"""

from __future__ import annotations

import filecmp
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field

_DIFFERENCES_MAX = 50


@dataclass(slots=True)
class Comparison:
    """What was compared and what differs (the first few)."""

    files: int = 0
    folders: int = 0
    symlinks: int = 0
    executables: int = 0
    bytes: int = 0
    left_out: int = 0
    """Devices, FIFOs and sockets of the original: nobody stores these."""
    differences: list[str] = field(default_factory=list)

    def differs(self, path: str, how: str) -> None:
        """Note a difference, unless there are enough."""
        if len(self.differences) < _DIFFERENCES_MAX:
            self.differences.append(f"{os.fsencode(path)!r}: {how}")


def compare_trees(original: str, copy: str, exclude: frozenset[str]) -> Comparison:
    """Everything in `original`, names in `exclude` apart, must be in `copy` and nothing else."""
    result = Comparison()
    filecmp.clear_cache()
    pending = [""]
    while pending:
        folder = pending.pop()
        here = {
            name: mode
            for name, mode in _names(os.path.join(original, folder))
            if name not in exclude
        }
        there = dict(_names(os.path.join(copy, folder)))
        for name in sorted(here.keys() | there.keys(), key=os.fsencode):
            path = os.path.join(folder, name)
            if name not in here:
                result.differs(path, "was not in the original")
            elif _is_special(here[name]):
                result.left_out += 1
            elif name not in there:
                result.differs(path, "is missing")
            elif stat.S_IFMT(here[name]) != stat.S_IFMT(there[name]):
                result.differs(path, "is of another type")
            elif stat.S_ISDIR(here[name]):
                result.folders += 1
                pending.append(path)
            else:
                _compare_leaf(result, original, copy, path, here[name], there[name])
    return result


def _compare_leaf(
    result: Comparison, original: str, copy: str, path: str, here: int, there: int
) -> None:
    left, right = os.path.join(original, path), os.path.join(copy, path)
    if stat.S_ISLNK(here):
        result.symlinks += 1
        if os.readlink(left) != os.readlink(right):
            result.differs(path, "leads elsewhere")
        return
    result.files += 1
    result.executables += bool(here & stat.S_IXUSR)
    result.bytes += os.path.getsize(left)
    if bool(here & stat.S_IXUSR) != bool(there & stat.S_IXUSR):
        result.differs(path, "has another executable bit")
    if not filecmp.cmp(left, right, shallow=False):
        result.differs(path, "has other bytes")


def _names(folder: str) -> Iterator[tuple[str, int]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            yield entry.name, entry.stat(follow_symlinks=False).st_mode


def _is_special(mode: int) -> bool:
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode))
