"""Find and open the node directories of a stopped cell, whatever state they are in.

First step of a report and of a rebuild.  Nothing is decided here about what to do with a directory
that cannot be read; it is only named, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from protocol.errors import HaversackError
from storage_node import identity
from storage_node.identity import Identity
from storage_node.offline import OfflineStore

NODES_DIRECTORY: Final = "nodes"


@dataclass(frozen=True, slots=True)
class Disk:
    """One directory that is, was, or should be a node's."""

    directory: Path
    identity: Identity | None
    """None if the directory does not say whose it is."""
    store: OfflineStore | None
    """None if it cannot be opened."""
    fresh: bool
    """Formatted, and never used by a node yet: it has no store, and nothing is wrong with that."""
    problem: str
    """Why it cannot be used; empty if it can."""


def node_directories(data: Path, others: Iterable[Path] = ()) -> list[Path]:
    """The directories below `data`, then those of `others` that are not among them, each once."""
    nodes = data / NODES_DIRECTORY
    found = sorted(path for path in nodes.iterdir() if path.is_dir()) if nodes.is_dir() else []
    seen = {path.resolve() for path in found}
    for path in others:
        if path.resolve() not in seen:
            seen.add(path.resolve())
            found.append(path)
    return found


@contextmanager
def opened(directories: Iterable[Path]) -> Iterator[list[Disk]]:
    """Every directory with what could be read of it; stores are closed at the end."""
    disks: list[Disk] = []
    try:
        for directory in directories:
            disks.append(_open(directory))
        yield disks
    finally:
        for disk in disks:
            if disk.store is not None:
                disk.store.close()


def _open(directory: Path) -> Disk:
    try:
        owner = identity.load(directory)
    except HaversackError as error:
        return Disk(directory, None, None, False, error.message)
    store: OfflineStore | None = None
    try:
        store = OfflineStore(directory)
        state = store.node_state()
    except HaversackError as error:
        if store is not None:
            store.close()
        fresh = identity.is_fresh(directory)
        return Disk(directory, owner, None, fresh, "" if fresh else error.message)
    if state.store_id != owner.store_id:
        store.close()
        problem = f"{directory} holds the store {state.store_id!r}, not {owner.store_id!r}"
        return Disk(directory, owner, None, False, problem)
    return Disk(directory, owner, store, False, "")
