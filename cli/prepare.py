"""`python -m cli.prepare`: what must be there before anything of a cell starts; safe to repeat.

Called by `haversack up` before each start of the controller, in a process of its own.  Order
matters, because it may be killed at any instant: the cell's row first, then each node's directory,
then its row; the account before its token, the token's file last.  Afterwards actors only open
what they find.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import socket
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

from cluster.cell import (
    Cell,
    NodeSpec,
    add_nodes,
    create_cell,
    mark_stopped,
    open_cell,
    prepare_schema,
)
from cluster.fsck import switch
from cluster.members import RACK, format_directory, upkeep_of, write_controller_plan
from erasure.scheme import Scheme
from metadata.accounts import Accounts
from metadata.schema import MIGRATIONS as METADATA_MIGRATIONS
from protocol.clock import SystemClock
from protocol.config import Settings, load
from protocol.errors import ConfigInvalid, HaversackError
from protocol.ids import NodeId
from sql.database import Database
from sql.engine import sqlite_url
from sql.migrations import upgrade
from storage_node import identity

SECRET_BYTES = 32
ADMIN_NAME = "admin"


def prepare(settings: Settings) -> None:
    """Bring a data directory to where a cell can start.

    Raises `ConfigInvalid` for settings that contradict the cell, `DirectoryForeign` for a node
    directory that holds something else, `FormatUnsupported` for a newer version's cell.
    """
    settings.data.mkdir(parents=True, exist_ok=True)
    switch.finish(settings.data)  # of an index that was rebuilt and not yet put in place
    _secret_file(settings.data / "cluster.secret")
    _secret_file(settings.data / "ray.token")
    database = Database(sqlite_url(settings.cell_database), inline=True)
    try:
        prepare_schema(database)
        cell = _cell(database, settings)
        _nodes(database, cell, settings)
        mark_stopped(database, SystemClock())
        write_controller_plan(
            database, settings.data, settings.node_capacity_bytes, upkeep_of(settings)
        )
    finally:
        database.close()
    asyncio.run(_admin(settings))


def _secret_file(path: Path) -> None:
    """Random hex that only the owner may read; kept if it is there."""
    if not path.exists():
        write_private(path, secrets.token_hex(SECRET_BYTES))


def write_private(path: Path, text: str) -> None:
    """Write `text` and a newline with mode 0600, complete or not at all, durably."""
    partial = path.with_name(path.name + ".new")
    partial.unlink(missing_ok=True)
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w", encoding="ascii") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    identity.sync_directory(path.parent)


def _cell(database: Database, settings: Settings) -> Cell:
    """The cell, created at the first start.  A scheme that was asked for must be the cell's."""
    asked = Scheme.parse(settings.scheme) if "scheme" in settings.model_fields_set else None
    cell = open_cell(database, asked)
    if cell is not None:
        return cell
    if any((settings.data / "nodes").glob(f"*/{identity.IDENTITY_FILE}")):
        raise ConfigInvalid(
            f"{settings.data} has nodes and no cell in cell.db: put that file back, or make it "
            f"again with `haversack fsck {settings.data} --rebuild-index`",
            {"directory": str(settings.data)},
        )
    scheme = Scheme.parse(settings.scheme)
    if settings.nodes < scheme.write_minimum:
        raise ConfigInvalid(
            f"{scheme} needs at least {scheme.write_minimum} nodes to take a write and "
            f"{scheme.n} to be whole; --nodes is {settings.nodes}",
            {"nodes": settings.nodes, "scheme": scheme.name},
        )
    return create_cell(database, SystemClock(), uuid.uuid4().hex, scheme, ())


def _nodes(database: Database, cell: Cell, settings: Settings) -> None:
    """Format directories and add rows until the cell has as many nodes as were asked for."""
    known = {node.node_id for node in cell.nodes}
    specs: list[NodeSpec] = []
    number = 0
    while len(known) + len(specs) < settings.nodes:
        number += 1
        node_id = NodeId.numbered(number)
        if node_id not in known:
            specs.append(_format(settings, cell, node_id))
    if specs:
        add_nodes(database, SystemClock(), specs)


def _format(settings: Settings, cell: Cell, node_id: NodeId) -> NodeSpec:
    directory = settings.data / "nodes" / node_id
    label = settings.node_labels.get(node_id)
    return NodeSpec(
        node_id=node_id,
        store_id=format_directory(directory, cell.cluster_id, node_id),
        directory=str(directory),
        host=(label.host if label else "") or socket.gethostname(),
        rack=(label.rack if label else "") or RACK,
        weight=label.weight if label else 1.0,
    )


async def _admin(settings: Settings) -> None:
    """Schema of the metadata; the admin account and the file with its token, once."""
    database = Database(sqlite_url(settings.metadata_database), inline=True)
    try:
        upgrade(database, METADATA_MIGRATIONS)
        token_file = settings.data / "admin.token"
        if not token_file.exists():
            accounts = Accounts(database, SystemClock(), secrets.token_bytes)
            account = await accounts.first_admin(ADMIN_NAME)
            write_private(token_file, await accounts.issue_token(account, "first start"))
    finally:
        database.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when the directory is ready; 1 with one line on standard error otherwise."""
    parser = argparse.ArgumentParser(prog="python -m cli.prepare")
    parser.add_argument("--data", type=Path, required=True)
    try:
        prepare(load(data=parser.parse_args(arguments).data))
    except HaversackError as error:
        print(error.message, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
