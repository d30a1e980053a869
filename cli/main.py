"""The `haversack` command: names and options; the work is in the modules it calls.

Nothing heavy is imported before a command needs it: `haversack status` loads neither Ray, SQL nor
FastAPI.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from cli import change, nodes, scrub
from cli.connection import ServerOptions
from cli.failures import Exit, report_failure
from cli.options import Config, DryRun, Json, Quiet, Server, TokenFile
from cli.options import server_options as _server
from protocol.errors import ConfigInvalid, HaversackError

app = typer.Typer(
    name="haversack",
    help="A self-hosted, erasure-coded, content-addressed block store.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def common(
    context: typer.Context,
    server: Server = None,
    token_file: TokenFile = None,
    config: Config = None,
) -> None:
    """Options for the commands that speak to a cell; each of them takes them as well."""
    context.obj = ServerOptions(server, token_file, config)


@app.command()
def up(
    context: typer.Context,
    data: Annotated[
        Path | None, typer.Option("--data", help="Directory of the cell [HAVERSACK_DATA; ./data].")
    ] = None,
    nodes: Annotated[int | None, typer.Option("--nodes", help="Storage nodes [9].")] = None,
    scheme: Annotated[
        str | None, typer.Option("--scheme", help="Redundancy of a new cell [rs-6-3].")
    ] = None,
    host: Annotated[str | None, typer.Option("--host", help="Address [127.0.0.1].")] = None,
    port: Annotated[
        int | None, typer.Option("--port", help="Port [8420]; 0 takes a free one.")
    ] = None,
    config: Config = None,
    label: Annotated[
        list[str] | None,
        typer.Option("--label", help="NODE:rack=R,host=H,weight=W; may be repeated."),
    ] = None,
) -> None:
    """Run a cell on this machine, in the foreground, until Ctrl-C."""
    from cli import up as cell
    from protocol.config import load

    common_options = context.obj
    assert isinstance(common_options, ServerOptions)
    config = config or common_options.config
    settings = load(
        config=config,
        data=data,
        nodes=nodes,
        scheme=scheme,
        host=host,
        port=port,
        node_labels=label or None,
    )
    cell.become(
        cell.UpOptions(
            data=settings.data,
            nodes=nodes,
            scheme=scheme,
            host=host,
            port=port,
            config=config,
            labels=tuple(label or ()),
        )
    )


@app.command()
def status(
    context: typer.Context, json: Json = False, server: Server = None, token_file: TokenFile = None
) -> None:
    """Show nodes, volumes, blocks and bytes of the cell."""
    from cli import inspection

    raise typer.Exit(inspection.status(_server(context, server, token_file), json))


@app.command()
def verify(
    context: typer.Context,
    deep: Annotated[bool, typer.Option("--deep", help="Read every fragment.")] = False,
    remove_strays: Annotated[
        bool,
        typer.Option("--remove-strays", help="Delete old fragments that are in no block's slot."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", "-n", help="Say what would be deleted, and stop.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    server: Server = None,
    token_file: TokenFile = None,
) -> None:
    """Compare the block index with what all nodes hold, in both directions."""
    from cli import verify as verification

    options = _server(context, server, token_file)
    wish = verification.Wish(deep, remove_strays, dry_run)
    raise typer.Exit(verification.run(options, wish, json, quiet))


@app.command()
def why(
    context: typer.Context,
    subject: Annotated[str, typer.Argument(help="A block's hash, a volume (v12) or a node.")],
    json: Json = False,
    server: Server = None,
    token_file: TokenFile = None,
) -> None:
    """Show where a block, a volume or a node stands: slots, history, risk, what comes next."""
    from cli import explain

    raise typer.Exit(explain.why(_server(context, server, token_file), subject, json))


@app.command("what-if")
def what_if(
    context: typer.Context,
    action: Annotated[str, typer.Argument(help="lose", metavar="lose")],
    names: Annotated[
        list[str] | None, typer.Argument(help="Nodes, hosts (RACK/HOST) or racks.", metavar="NAME")
    ] = None,
    any_one: Annotated[
        str | None, typer.Option("--any-one", help="The worst single node, host or rack.")
    ] = None,
    json: Json = False,
    server: Server = None,
    token_file: TokenFile = None,
) -> None:
    """Show what the loss of nodes, hosts or racks would leave; nothing is changed."""
    from cli import explain

    if action != "lose":
        raise ConfigInvalid(f"what-if {action}: only `what-if lose NAME...` is known")
    options = _server(context, server, token_file)
    raise typer.Exit(explain.what_if(options, tuple(names or ()), any_one, json))


@app.command()
def events(
    context: typer.Context,
    subject: Annotated[
        str | None, typer.Argument(help="A node, a volume, a block, a job; all if not given.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", help="At most so many.")] = 50,
    json: Json = False,
    server: Server = None,
    token_file: TokenFile = None,
) -> None:
    """Show what happened, newest last."""
    from cli import explain

    raise typer.Exit(explain.events(_server(context, server, token_file), subject, limit, json))


@app.command()
def put(
    context: typer.Context,
    path: Annotated[str, typer.Argument(help="File, folder or symlink.")],
    remote: Annotated[str | None, typer.Argument(help="Where it goes; /NAME if not given.")] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option("--exclude", help="Leave out names like this (* ? []); may be repeated."),
    ] = None,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
    server: Server = None,
    token_file: TokenFile = None,
) -> None:
    """Upload a file or a folder; only what the cell does not have is sent."""
    from cli import transfers

    manner = transfers.Manner(json=json, dry_run=dry_run, quiet=quiet)
    options = _server(context, server, token_file)
    raise typer.Exit(transfers.put(options, path, remote, tuple(exclude or ()), manner))


@app.command()
def get(
    context: typer.Context,
    remote: Annotated[str, typer.Argument()],
    path: Annotated[str, typer.Argument(help="Where it goes.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace local files that differ.")
    ] = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
    server: Server = None,
    token_file: TokenFile = None,
) -> None:
    """Download a file, or the contents of a folder; files that are there already are kept."""
    from cli import transfers

    manner = transfers.Manner(json=json, dry_run=dry_run, quiet=quiet)
    options = _server(context, server, token_file)
    raise typer.Exit(transfers.get(options, remote, path, overwrite, manner))


@app.command()
def ls(
    context: typer.Context,
    remote: Annotated[str, typer.Argument()] = "/",
    recursive: Annotated[
        bool, typer.Option("--recursive", "-R", help="Everything below, too.")
    ] = False,
    json: Json = False,
    server: Server = None,
    token_file: TokenFile = None,
) -> None:
    """List a folder of the cell, or show one entry."""
    from cli import inspection

    options = _server(context, server, token_file)
    raise typer.Exit(inspection.ls(options, remote, recursive, json))


@app.command()
def rm(
    context: typer.Context,
    remote: Annotated[str, typer.Argument()],
    server: Server = None,
    token_file: TokenFile = None,
) -> None:
    """Delete a file, or a folder with all below it; versions are kept."""
    from cli import inspection

    raise typer.Exit(inspection.rm(_server(context, server, token_file), remote))


@app.command()
def fsck(
    data: Annotated[Path, typer.Argument(metavar="DIR", help="Directory of a stopped cell.")],
    deep: Annotated[
        bool, typer.Option("--deep", help="Read every record, not one of each block.")
    ] = False,
    rebuild_index: Annotated[
        bool, typer.Option("--rebuild-index", help="Make cell.db again from the disks alone.")
    ] = False,
    scheme: Annotated[
        str | None,
        typer.Option("--scheme", help="The cell's, if its disks do not say (--rebuild-index)."),
    ] = None,
    node_directory: Annotated[
        list[Path] | None,
        typer.Option("--node-directory", help="A node's directory elsewhere; may be repeated."),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare the disks of a stopped cell with its databases; writes nothing, unless asked to make
    the block index again."""
    from cli import fsck as check

    others = tuple(node_directory or ())
    manner = check.Manner(deep, json, quiet)
    if rebuild_index:
        raise typer.Exit(check.rebuild_index(data, others, scheme, manner))
    if scheme is not None:
        raise ConfigInvalid("--scheme is for --rebuild-index")
    raise typer.Exit(check.report(data, others, manner))


@app.command()
def demo(
    tree: Annotated[
        Path | None,
        typer.Option("--tree", help="What to store [this Python's standard library]."),
    ] = None,
    nodes: Annotated[int, typer.Option("--nodes", help="Storage nodes.")] = 9,
    scheme: Annotated[str, typer.Option("--scheme", help="Redundancy.")] = "rs-6-3",
    lose: Annotated[int, typer.Option("--lose", help="Nodes to destroy.")] = 3,
) -> None:
    """Start a cell, store a tree, destroy nodes, get the tree back, compare every byte."""
    from cli import demo as demonstration

    raise typer.Exit(demonstration.run(tree, nodes, scheme, lose))


nodes.register(app)
scrub.register(app)
change.register(app)


def main() -> None:
    """Entry point of the installed command."""
    try:
        app()
    except HaversackError as error:
        code = report_failure(error)
        if isinstance(error, ConfigInvalid):
            code = Exit.USAGE
        sys.exit(code)


if __name__ == "__main__":
    main()
