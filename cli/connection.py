"""Which server, which token; and one asyncio program around a client.

Called by the commands that speak to a cell.  Reads settings through `protocol.config` only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cli.failures import Exit, report_failure
from protocol.allocator import reuse_large_buffers
from protocol.errors import ConfigInvalid, HaversackError
from protocol.limits import MIB

if TYPE_CHECKING:
    from client.api import HaversackClient

_KEEP_BYTES = 128 * MIB
"""Freed memory kept for the next block: what a transfer holds, with the copies under way."""


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """What the command line said; None leaves it to the file, the environment, the default."""

    server: str | None = None
    token_file: Path | None = None
    config: Path | None = None

    def over(self, other: ServerOptions) -> ServerOptions:
        """These, and where they say nothing, `other`."""
        return ServerOptions(
            self.server or other.server,
            self.token_file or other.token_file,
            self.config or other.config,
        )


@dataclass(frozen=True, slots=True)
class Target:
    """A server's address and the token to speak to it."""

    url: str
    token: str


def find_target(options: ServerOptions) -> Target:
    """Read settings and the token.  Raises `ConfigInvalid`, which says what to give."""
    from protocol.config import load

    settings = load(config=options.config, server=options.server, token_file=options.token_file)
    path = settings.token_file or settings.data / "admin.token"
    try:
        token = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigInvalid(
            f"no token in {path}: give --token-file or HAVERSACK_TOKEN_FILE (`haversack up` "
            "writes DIR/admin.token)",
            {"file": str(path)},
        ) from error
    if not token or len(token.split()) != 1:
        raise ConfigInvalid(f"{path} does not hold one token", {"file": str(path)})
    return Target(settings.server, token)


def run_with_client(
    options: ServerOptions,
    work: Callable[[HaversackClient], Awaitable[Exit]],
    *,
    patient: bool,
) -> Exit:
    """Run `work` with an open client; its exit code, or that of the error that ended it.

    `patient`: wait for a server that restarts, as transfers do; else answer within seconds.
    """
    from client.api import HaversackClient
    from client.retry import IMPATIENT, RetryPolicy

    async def main() -> Exit:
        policy = RetryPolicy() if patient else IMPATIENT
        async with HaversackClient(target.url, target.token, policy=policy) as client:
            return await work(client)

    try:
        target = find_target(options)
        reuse_large_buffers(_KEEP_BYTES)
        return asyncio.run(main())
    except HaversackError as error:
        return report_failure(error)
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
