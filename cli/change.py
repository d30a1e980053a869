"""`haversack rebalance`, `transcode` and `jobs`: changes of the whole cell, and what is under way.

Registered by `cli.main`.  Names and options here; jobs are followed by `cli.job_view`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.connection import run_with_client
from cli.failures import Exit, printable
from cli.options import DryRun, Json, Server, TokenFile, server_options

if TYPE_CHECKING:
    from client.api import HaversackClient

jobs_app = typer.Typer(help="List, show, pause, resume and cancel changes.")

Detach = Annotated[bool, typer.Option("--detach", help="Do not wait for the job.")]
JobId = Annotated[int, typer.Argument(metavar="ID")]


def register(app: typer.Typer) -> None:
    """Hang these commands below `haversack`."""
    app.command()(rebalance)
    app.command()(transcode)
    app.add_typer(jobs_app, name="jobs", invoke_without_command=True)


def rebalance(
    context: typer.Context,
    tolerance: Annotated[
        float, typer.Option("--tolerance", help="Share by which a node may be off.")
    ] = 0.05,
    dry_run: DryRun = False,
    detach: Detach = False,
    json: Json = False,
    server: Server = None,
    token_file: TokenFile = None,
) -> None:
    """Even out what the nodes hold, by weight and capacity."""
    from cli import job_view

    options = server_options(context, server, token_file)
    body = {"kind": "rebalance", "tolerance": tolerance}
    raise typer.Exit(job_view.ask_for(options, body, job_view.Manner(json, dry_run, detach)))


def transcode(
    context: typer.Context,
    source: Annotated[str, typer.Option("--from", help="Scheme, as in rs-6-3.")],
    target: Annotated[str, typer.Option("--to", help="Scheme, as in rs-4-2.")],
    for_new: Annotated[
        bool, typer.Option("--for-new", help="New blocks get the new scheme, too.")
    ] = False,
    dry_run: DryRun = False,
    detach: Detach = False,
    json: Json = False,
    server: Server = None,
    token_file: TokenFile = None,
) -> None:
    """Write the blocks of one scheme anew in another; reads go on."""
    from cli import job_view

    options = server_options(context, server, token_file)
    body = {"kind": "transcode", "from": source, "to": target, "for_new": for_new}
    raise typer.Exit(job_view.ask_for(options, body, job_view.Manner(json, dry_run, detach)))


@jobs_app.callback()
def jobs(
    context: typer.Context, json: Json = False, server: Server = None, token_file: TokenFile = None
) -> None:
    """List, show, pause, resume and cancel changes."""
    if context.invoked_subcommand is None:
        list_jobs(context, json, server, token_file)


@jobs_app.command("list")
def list_jobs(
    context: typer.Context, json: Json = False, server: Server = None, token_file: TokenFile = None
) -> None:
    """List the last jobs, newest first."""

    async def work(client: HaversackClient) -> Exit:
        from cli.job_view import print_json

        found = (await client.ask_admin("GET", "jobs"))["jobs"]
        if json:
            print_json(found)
            return Exit.OK
        if not found:
            print("no jobs")
        for job in found:
            done = f"{job['done_units']}/{job['total_units']}"
            line = f"{job['id']:>5}  {job['state']:<9}  {job['kind']:<12}  {job['subject']:<20}  "
            print(printable(f"{line}{done:>13}  {job['detail']}".rstrip()))
        return Exit.OK

    options = server_options(context, server, token_file)
    raise typer.Exit(run_with_client(options, work, patient=False))


@jobs_app.command()
def show(
    context: typer.Context,
    job: JobId,
    follow: Annotated[bool, typer.Option("--follow", help="Until it ends.")] = False,
    json: Json = False,
    server: Server = None,
    token_file: TokenFile = None,
) -> None:
    """Show a job: how far it is, and what blocks it."""
    from cli import job_view

    options = server_options(context, server, token_file)
    if follow:
        raise typer.Exit(job_view.follow(options, job, json))

    async def work(client: HaversackClient) -> Exit:
        found = await client.ask_admin("GET", f"jobs/{job}")
        job_view.print_json(found) if json else job_view.print_job(found)
        return Exit.OK

    raise typer.Exit(run_with_client(options, work, patient=False))


@jobs_app.command()
def pause(
    context: typer.Context,
    job: JobId,
    json: Json = False,
    server: Server = None,
    token_file: TokenFile = None,
) -> None:
    """Stop a job within about a second; it can be resumed."""
    _act(context, job, "pause", json, server, token_file)


@jobs_app.command()
def resume(
    context: typer.Context,
    job: JobId,
    json: Json = False,
    server: Server = None,
    token_file: TokenFile = None,
) -> None:
    """Let a paused job go on."""
    _act(context, job, "resume", json, server, token_file)


@jobs_app.command()
def cancel(
    context: typer.Context,
    job: JobId,
    json: Json = False,
    server: Server = None,
    token_file: TokenFile = None,
) -> None:
    """End a job for good.  What was moved stays moved; a node that was drained is used again."""
    _act(context, job, "cancel", json, server, token_file)


def _act(
    context: typer.Context, job: int, action: str, json: bool, server: Any, token_file: Any
) -> None:
    async def work(client: HaversackClient) -> Exit:
        from cli import job_view

        found = await client.ask_admin("POST", f"jobs/{job}", {"action": action})
        job_view.print_json(found) if json else job_view.print_job(found)
        return Exit.OK

    options = server_options(context, server, token_file)
    raise typer.Exit(run_with_client(options, work, patient=False))
