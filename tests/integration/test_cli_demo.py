"""`haversack demo` as `make demo` runs it: its verdict is true, and it leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

HAVERSACK = Path(sys.executable).with_name("haversack")

pytestmark = pytest.mark.slow


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A TMPDIR of the test's own; short, because Ray puts sockets below it."""
    with tempfile.TemporaryDirectory(prefix="hv-", dir="/tmp") as path:
        yield Path(path)


def run_demo(tmp_path: Path, temporary: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    assert HAVERSACK.exists(), f"there is no {HAVERSACK}: make install"
    tree = tmp_path / "tree"
    (tree / "sub" / "empty").mkdir(parents=True)
    for size in (0, 100, 5000, 200_000, 5_000_000):
        (tree / "sub" / str(size)).write_bytes(os.urandom(size))
    (tree / "tool").write_bytes(b"#!/bin/sh\n")
    (tree / "tool").chmod(0o755)
    (tree / "link").symlink_to("sub/5000")
    done = subprocess.run(
        (str(HAVERSACK), "demo", "--tree", str(tree), *arguments),
        env={**os.environ, "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert list(temporary.iterdir()) == [], "data directory and copy are removed"
    left = [
        process.info["cmdline"]
        for process in psutil.process_iter(["cmdline"])
        if any(str(temporary) in word for word in process.info["cmdline"] or ())
    ]
    assert left == [], "every process of the cell has ended"
    return done


def test_a_tree_survives_the_loss_of_m_nodes(tmp_path: Path, temporary: Path) -> None:
    done = run_demo(tmp_path, temporary)
    assert done.returncode == 0, done
    assert "The tree came back byte for byte." in done.stdout
    assert "no difference" in done.stdout


def test_the_loss_of_more_than_m_nodes_is_a_failure_and_is_told(
    tmp_path: Path, temporary: Path
) -> None:
    done = run_demo(tmp_path, temporary, "--nodes", "3", "--scheme", "rs-2-1", "--lose", "2")
    assert done.returncode == 1, done
    assert "haversack get ended with exit code 1" in done.stdout
    assert "block_unreadable" in done.stderr
    assert "byte for byte" not in done.stdout
