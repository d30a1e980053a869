"""`haversack up`: turn options into an environment, then become the cell's foreground process.

Every process of the cell reads its settings from that environment (`protocol.config`); Ray reads
how it must behave (`cluster.ray_environment`).
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from cluster.ray_environment import ray_environment
from protocol.config import DEFAULT_FILE, ENV_CONFIG_FILE


@dataclass(frozen=True, slots=True)
class UpOptions:
    """What the command line said; None leaves it to the file, the environment, the default."""

    data: Path
    nodes: int | None = None
    scheme: str | None = None
    host: str | None = None
    port: int | None = None
    config: Path | None = None
    labels: tuple[str, ...] = ()


def become(options: UpOptions) -> NoReturn:
    """Replace this process by the foreground process; the pid stays."""
    data = options.data.resolve()
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(
        sys.executable,
        (sys.executable, "-m", "cli.foreground", str(data)),
        _environment(options, data),
    )


def _environment(options: UpOptions, data: Path) -> dict[str, str]:
    given = {
        "HAVERSACK_DATA": data,
        "HAVERSACK_NODES": options.nodes,
        "HAVERSACK_SCHEME": options.scheme,
        "HAVERSACK_HOST": options.host,
        "HAVERSACK_PORT": options.port,
        "HAVERSACK_CONFIG": _settings_file(options),
        "HAVERSACK_NODE_LABELS": json.dumps(options.labels) if options.labels else None,
    }
    chosen = {name: str(value) for name, value in given.items() if value is not None}
    return {**os.environ, **chosen, **ray_environment(data / "ray.token")}


def _settings_file(options: UpOptions) -> Path | None:
    """The file that this command reads, by its full name: Ray may start processes elsewhere."""
    named = options.config or os.environ.get(ENV_CONFIG_FILE)
    if named:
        return Path(named).resolve()
    default = Path(DEFAULT_FILE)
    return default.resolve() if default.is_file() else None
