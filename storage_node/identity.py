"""Who a node directory belongs to: one small file, written once, read before anything is opened.

First step of a node's life.  `cluster.supervisor` calls `initialise` once per new disk; the actor
calls `load` at every start.  An empty or foreign directory is never adopted: an unmounted disk
looks exactly like "everything lost", and must not start a mass repair.  Imports nothing but
`protocol`.

Layout of a node directory:

    identity      this file: text, so that a person can read it
    fresh         present until the store was created: permission to create it, used once
    store/        RocksDB
    ballast       room held back for a full disk (`storage_node.ballast`)
    incoming/     extents being written, each linked into store/ when it is complete

`identity` has one field a line, in this order:

    haversack-node 1
    cluster <cluster id>
    node <node id>
    store <store id>
    checksum <XXH3-64 of the bytes above, 16 hex digits>

History: version 1, first.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path

from protocol.errors import DirectoryCorrupt, DirectoryForeign, FormatUnsupported, MalformedId
from protocol.hashing import checksum64
from protocol.ids import NodeId

IDENTITY_FILE = "identity"
FRESH_FILE = "fresh"
STORE_DIRECTORY = "store"
INCOMING_DIRECTORY = "incoming"
BALLAST_FILE = "ballast"

_MAGIC = "haversack-node"
_VERSION = 1
_IDENTITY_BYTES_MAX = 4096
_NOT_CONTENT = frozenset({"lost+found"})
"""What a fresh file system may hold in its root."""


@dataclass(frozen=True, slots=True)
class Identity:
    """The names that a directory and the process in front of it must agree on."""

    cluster_id: str
    node_id: NodeId
    store_id: str
    """Drawn anew each time a disk is formatted: a re-used node name is not the old disk."""


def initialise(directory: Path, identity: Identity) -> None:
    """Format a directory for a node; durable on return.

    Raises `DirectoryForeign` if it exists and holds anything.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if any(entry.name not in _NOT_CONTENT for entry in directory.iterdir()):
        raise DirectoryForeign(
            f"{directory} is not empty: a node is only ever formatted onto an empty directory",
            {"directory": str(directory)},
        )
    (directory / INCOMING_DIRECTORY).mkdir(mode=0o700)
    _write_synced(directory / FRESH_FILE, b"")
    partial = directory / (IDENTITY_FILE + ".new")
    _write_synced(partial, _encode(identity))
    partial.rename(directory / IDENTITY_FILE)
    sync_directory(directory)
    sync_directory(directory.parent)


def load(directory: Path) -> Identity:
    """Read whose directory this is.

    Raises `DirectoryForeign` if there is no identity or it is damaged, `DirectoryCorrupt` if the
    disk cannot read it, `FormatUnsupported` if a newer version wrote it.
    """
    path = directory / IDENTITY_FILE
    try:
        with path.open("rb") as file:
            data = file.read(_IDENTITY_BYTES_MAX)
    except OSError as error:
        if error.errno == errno.EIO:
            raise DirectoryCorrupt(
                f"{path} cannot be read ({error.strerror}): set the disk aside, the cell rebuilds "
                "what it held",
                {"directory": str(directory)},
            ) from error
        raise DirectoryForeign(
            f"{directory} has no readable identity ({error.strerror}): is the disk mounted?",
            {"directory": str(directory)},
        ) from error
    return _decode(data, directory)


def expect(directory: Path, expected: Identity) -> None:
    """Raise `DirectoryForeign` unless the directory is the one that `expected` names."""
    found = load(directory)
    if found != expected:
        raise DirectoryForeign(
            f"{directory} belongs to {found.node_id} (store {found.store_id}) of cluster "
            f"{found.cluster_id}; expected {expected.node_id} (store {expected.store_id}) of "
            f"{expected.cluster_id}",
            {"directory": str(directory), "found_store": found.store_id},
        )


def is_fresh(directory: Path) -> bool:
    """True until `mark_created`: the store has never been created, so creating it loses nothing."""
    return (directory / FRESH_FILE).exists()


def mark_created(directory: Path) -> None:
    """Withdraw the permission to create the store; durable on return."""
    (directory / FRESH_FILE).unlink(missing_ok=True)
    sync_directory(directory)


def sync_directory(directory: Path) -> None:
    """Make renames, creations and removals in `directory` durable."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _encode(identity: Identity) -> bytes:
    fields = (identity.cluster_id, identity.node_id, identity.store_id)
    assert all(field and "\n" not in field for field in fields)
    text = (
        f"{_MAGIC} {_VERSION}\ncluster {identity.cluster_id}\nnode {identity.node_id}\n"
        f"store {identity.store_id}\n"
    ).encode()
    return text + f"checksum {checksum64(text):016x}\n".encode()


def _decode(data: bytes, directory: Path) -> Identity:
    damaged = DirectoryForeign(
        f"the identity of {directory} is damaged: restore it or set the disk aside",
        {"directory": str(directory)},
    )
    body, separator, tail = data.rpartition(b"checksum ")
    if not separator or tail != f"{checksum64(body):016x}\n".encode():
        raise damaged
    lines = body.decode("utf-8", "replace").splitlines()
    if not lines or not lines[0].startswith(_MAGIC + " "):
        raise damaged
    if lines[0] != f"{_MAGIC} {_VERSION}":
        raise FormatUnsupported(
            f"{directory} was formatted by a newer version ({lines[0]!r}); this one reads "
            f"{_VERSION}",
            {"directory": str(directory)},
        )
    fields = dict(line.partition(" ")[::2] for line in lines[1:])
    try:
        return Identity(fields["cluster"], NodeId.parse(fields["node"]), fields["store"])
    except (KeyError, MalformedId) as error:
        raise damaged from error
