"""Identity files of node directories."""

from __future__ import annotations

from pathlib import Path

import pytest
from node_parts import IDENTITY

from protocol.errors import DirectoryForeign, FormatUnsupported
from protocol.hashing import checksum64
from storage_node import identity
from storage_node.identity import IDENTITY_FILE, expect, initialise, load


def test_a_formatted_directory_names_its_owner(tmp_path: Path) -> None:
    initialise(tmp_path / "a" / "node", IDENTITY)
    assert load(tmp_path / "a" / "node") == IDENTITY
    expect(tmp_path / "a" / "node", IDENTITY)


def test_an_empty_mount_point_may_be_formatted(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()
    initialise(tmp_path, IDENTITY)
    assert load(tmp_path) == IDENTITY


def test_a_directory_that_holds_anything_is_not_formatted(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(DirectoryForeign):
        initialise(tmp_path, IDENTITY)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_directory_is_formatted_once(tmp_path: Path) -> None:
    initialise(tmp_path / "node", IDENTITY)
    with pytest.raises(DirectoryForeign):
        initialise(tmp_path / "node", IDENTITY)


def test_any_flipped_or_missing_byte_of_an_identity_is_noticed(tmp_path: Path) -> None:
    initialise(tmp_path / "node", IDENTITY)
    path = tmp_path / "node" / IDENTITY_FILE
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(DirectoryForeign):
            load(tmp_path / "node")
        path.write_bytes(whole[:position])
        with pytest.raises(DirectoryForeign):
            load(tmp_path / "node")


def test_an_identity_of_a_newer_version_says_so(tmp_path: Path) -> None:
    initialise(tmp_path / "node", IDENTITY)
    text = b"haversack-node 2\nanything\n"
    data = text + f"checksum {checksum64(text):016x}\n".encode()
    (tmp_path / "node" / IDENTITY_FILE).write_bytes(data)
    with pytest.raises(FormatUnsupported):
        load(tmp_path / "node")


def test_the_permission_to_create_a_store_is_withdrawn_once(tmp_path: Path) -> None:
    initialise(tmp_path / "node", IDENTITY)
    assert identity.is_fresh(tmp_path / "node")
    identity.mark_created(tmp_path / "node")
    identity.mark_created(tmp_path / "node")
    assert not identity.is_fresh(tmp_path / "node")


def test_the_file_is_the_documented_text(tmp_path: Path) -> None:
    initialise(tmp_path / "node", IDENTITY)
    lines = (tmp_path / "node" / IDENTITY_FILE).read_text().splitlines()
    assert lines[:4] == [
        "haversack-node 1",
        "cluster cluster-1",
        "node node-01",
        "store store-1",
    ]
    assert lines[4].startswith("checksum ")
