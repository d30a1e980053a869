"""`haversack node ...`: list, add and weigh nodes; drain, decommission and replace them.

Registered by `cli.main`.  Names and options here; jobs are followed by `cli.job_view`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import figures
from cli.connection import ServerOptions, run_with_client
from cli.failures import Exit, printable
from cli.options import DryRun, Json, Server, TokenFile, server_options

if TYPE_CHECKING:
    from client.api import HaversackClient

node_app = typer.Typer(help="List, add, drain and replace storage nodes.", no_args_is_help=True)

Node = Annotated[str, typer.Argument(help="As in node-03.", metavar="NODE")]
Detach = Annotated[bool, typer.Option("--detach", help="Do not wait for the job.")]

_PIPED_COLUMNS = 240


def register(app: typer.Typer) -> None:
    """Hang these commands below `haversack`."""
    app.add_typer(node_app, name="node")


@node_app.command("list")
def list_nodes(
    context: typer.Context, json: Json = False, server: Server = None, token_file: TokenFile = None
) -> None:
    """List all nodes with their slots; those that left the cell, too."""

    async def work(client: HaversackClient) -> Exit:
        from cli.job_view import print_json

        found = (await client.ask_admin("GET", "nodes"))["nodes"]
        print_json(found) if json else _print_nodes(found)
        return Exit.OK

    _run(server_options(context, server, token_file), work)


@node_app.command()
def add(
    context: typer.Context,
    directory: Annotated[
        Path, typer.Option("--directory", help="Empty or absent; on the cell's machine.")
    ],
    host: Annotated[str, typer.Option("--host", help="Failure domain [the host's name].")] = "",
    rack: Annotated[str, typer.Option("--rack", help="Failure domain [rack-1].")] = "",
    weight: Annotated[float, typer.Option("--weight", help="Share of new volumes.")] = 1.0,
    json: Json = False,
    server: Server = None,
    token_file: TokenFile = None,
) -> None:
    """Make an empty directory a new node.  New volumes use it; `rebalance` moves old ones."""
    body = {
        "directory": str(directory.absolute()),
        "host": host,
        "rack": rack,
        "weight": weight,
    }
    _change(server_options(context, server, token_file), "nodes", body, json)


@node_app.command()
def weight(
    context: typer.Context,
    node: Node,
    value: Annotated[float, typer.Argument(help="1 is ordinary, 0 takes no new volumes.")],
    json: Json = False,
    server: Server = None,
    token_file: TokenFile = None,
) -> None:
    """Give a node another share of new volumes; `rebalance` brings old ones in line."""
    _change(server_options(context, server, token_file), f"nodes/{node}", {"weight": value}, json)


@node_app.command()
def undrain(
    context: typer.Context,
    node: Node,
    json: Json = False,
    server: Server = None,
    token_file: TokenFile = None,
) -> None:
    """Let a node that drains or is drained take new volumes again; ends its job."""
    _change(server_options(context, server, token_file), f"nodes/{node}", {"drain": False}, json)


@node_app.command()
def drain(
    context: typer.Context,
    node: Node,
    dry_run: DryRun = False,
    detach: Detach = False,
    json: Json = False,
    server: Server = None,
    token_file: TokenFile = None,
) -> None:
    """Move everything off a node; it stays a member of the cell."""
    options = server_options(context, server, token_file)
    _job(options, {"kind": "drain", "node": node}, dry_run, detach, json)


@node_app.command()
def decommission(
    context: typer.Context,
    node: Node,
    dry_run: DryRun = False,
    detach: Detach = False,
    json: Json = False,
    server: Server = None,
    token_file: TokenFile = None,
) -> None:
    """Drain a node, then remove it from the cell.  Its directory is left as it is."""
    options = server_options(context, server, token_file)
    _job(options, {"kind": "decommission", "node": node}, dry_run, detach, json)


@node_app.command()
def replace(
    context: typer.Context,
    node: Node,
    target: Annotated[str, typer.Option("--with", help="Node that takes its slots.")],
    dry_run: DryRun = False,
    detach: Detach = False,
    json: Json = False,
    server: Server = None,
    token_file: TokenFile = None,
) -> None:
    """Move all slots of a node, which may be dead, to another one; then remove it."""
    options = server_options(context, server, token_file)
    body = {"kind": "replace", "node": node, "target": target}
    _job(options, body, dry_run, detach, json)


def _run(options: ServerOptions, work: Any) -> None:
    raise typer.Exit(run_with_client(options, work, patient=False))


def _job(
    options: ServerOptions, body: dict[str, Any], dry_run: bool, detach: bool, json: bool
) -> None:
    from cli import job_view

    raise typer.Exit(job_view.ask_for(options, body, job_view.Manner(json, dry_run, detach)))


def _change(options: ServerOptions, path: str, body: dict[str, Any], json: bool) -> None:
    async def work(client: HaversackClient) -> Exit:
        from cli.job_view import print_json

        node = await client.ask_admin("POST", path, body)
        print_json(node) if json else _print_nodes([node])
        return Exit.OK

    _run(options, work)


def _print_nodes(found: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("node", "state", "rack/host", "weight", "slots", "bytes", "free", "directory"):
        right = title in ("weight", "slots", "bytes", "free")
        table.add_column(title, justify="right" if right else "left", overflow="fold")
    table.add_column("detail", overflow="fold")
    for node in found:
        table.add_row(
            *(escape(printable(str(node[name]))) for name in ("id", "state")),
            escape(printable(f"{node['rack']}/{node['host']}")),
            f"{node['weight']:g}",
            figures.number(node["slots"]),
            figures.size(node["bytes"]),
            figures.size(node["free_bytes"]),
            escape(printable(node["directory"])),
            escape(printable(node["detail"])),
        )
    Console(width=None if sys.stdout.isatty() else _PIPED_COLUMNS).print(table)
