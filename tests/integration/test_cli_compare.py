"""The demo's own comparison of two trees: it finds every kind of difference."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.compare import compare_trees

NOTHING: frozenset[str] = frozenset()


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    left = tmp_path / "left"
    (left / "sub" / "empty").mkdir(parents=True)
    (left / "sub" / "file").write_bytes(os.urandom(100_000))
    (left / "sub" / "tool").write_bytes(b"#!")
    (left / "sub" / "tool").chmod(0o755)
    (left / "link").symlink_to("sub/file")
    right = tmp_path / "right"
    shutil.copytree(left, right, symlinks=True)
    return left, right


def test_equal_trees_are_equal_and_counted(pair: tuple[Path, Path]) -> None:
    left, right = pair
    os.mkfifo(left / "fifo")
    (left / "__pycache__").mkdir()
    (left / "__pycache__" / "x").write_bytes(b"cache")
    result = compare_trees(str(left), str(right), frozenset({"__pycache__"}))
    assert result.differences == []
    assert (result.files, result.folders, result.symlinks, result.executables) == (2, 2, 1, 1)
    assert result.bytes == 100_002
    assert result.left_out == 1


def flip_a_byte(root: Path) -> None:
    path = root / "sub" / "file"
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[50_000] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replace_link(root: Path) -> None:
    (root / "link").unlink()
    (root / "link").symlink_to("sub/tool")


def link_to_file(root: Path) -> None:
    (root / "link").unlink()
    shutil.copy(root / "sub" / "file", root / "link")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (flip_a_byte, "other bytes"),
        (replace_link, "leads elsewhere"),
        (link_to_file, "another type"),
        (lambda root: (root / "sub" / "tool").chmod(0o644), "executable bit"),
        (lambda root: (root / "sub" / "file").unlink(), "missing"),
        (lambda root: (root / "sub" / "empty").rmdir(), "missing"),
        (lambda root: (root / "sub" / "more").write_bytes(b""), "not in the original"),
        (lambda root: os.truncate(root / "sub" / "file", 99_999), "other bytes"),
    ],
)
def test_every_difference_is_found(
    pair: tuple[Path, Path], change: Callable[[Path], object], said: str
) -> None:
    left, right = pair
    change(right)
    result = compare_trees(str(left), str(right), NOTHING)
    assert len(result.differences) == 1
    assert said in result.differences[0]
