"""The reference page: it names every route, its examples run, its table of kinds is the table."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from api_cell import running_cell

from api.app import create_app
from api.errors import ANSWERS

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
SECTIONS = dict(re.findall(r"^### `(.+?)`\n(.*?)(?=^#|\Z)", PAGE, re.MULTILINE | re.DOTALL))


def _example(section: str) -> str:
    """The first indented block of a section, which is shell."""
    lines = section.split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith("    "))
    end = next(i for i in range(start, len(lines)) if not lines[i].startswith("    "))
    return "\n".join(line[4:] for line in lines[start:end])


def test_page_names_every_route_and_every_example_succeeds(tmp_path: Path) -> None:
    for tool in ("curl", "bash"):
        assert shutil.which(tool), f"the examples use {tool}: install its Debian package"
    with running_cell(tmp_path, scheme="rs-2-1", nodes=3) as cell:
        routes = create_app(cell.services).api_routes
        assert {f"{route.method} {route.path}" for route in routes} == set(SECTIONS)
        script = [
            "set -euo pipefail",
            f"SERVER={cell.running.url}",
            f"AUTH='Authorization: Bearer {cell.tokens['admin']}'",
            'curl() { command curl --fail-with-body --noproxy "*" "$@"; }',
        ]
        for heading, body in SECTIONS.items():
            script += [
                f"echo; echo '== {heading}'",
                _example(body).replace("/tmp/", f"{tmp_path}/"),
            ]
        done = subprocess.run(
            ("bash", "-c", "\n".join(script)),
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert '"new":true,"length":5' in done.stdout
    assert '"results":["exists"]' in done.stdout


def test_page_gives_each_kind_its_status() -> None:
    rows = re.findall(r"^\| (\d{3}) \| (.+?) \|", PAGE, re.MULTILINE)
    named = {kind: int(status) for status, kinds in rows for kind in re.findall("`(.+?)`", kinds)}
    assert {kind: ANSWERS[kind].status for kind in named} == named
    client_side = {"server_unreachable", "corrupt_reply", "file_changed", "path_occupied"}
    for kind, answer in ANSWERS.items():
        if answer.status < 500 and kind not in client_side:
            assert kind in named, f"docs/api.md does not mention {kind}"
