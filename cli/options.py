"""Options that many commands of `haversack` take, spelled once.

Imported by `cli.main` and by the modules that register commands of their own.  Light.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.connection import ServerOptions

Server = Annotated[
    str | None,
    typer.Option("--server", help="Address of the cell [HAVERSACK_SERVER; http://127.0.0.1:8420]."),
]
TokenFile = Annotated[
    Path | None,
    typer.Option(
        "--token-file", help="File with the token [HAVERSACK_TOKEN_FILE; DATA/admin.token]."
    ),
]
Config = Annotated[
    Path | None,
    typer.Option("--config", help="Settings file [HAVERSACK_CONFIG; ./haversack.toml]."),
]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", "-n", help="Say what would be transferred, and stop.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]


def server_options(
    context: typer.Context, server: str | None, token_file: Path | None
) -> ServerOptions:
    """Options of the command, and where they say nothing, those before its name."""
    common_options = context.obj
    assert isinstance(common_options, ServerOptions)
    return ServerOptions(server, token_file).over(common_options)
