"""Fragments written by earlier releases are read for ever, and written the same way again."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from erasure.codec import Codec
from erasure.envelope import seal, unseal
from erasure.fragment import Fragment, parse, parse_expected, peek_key
from erasure.keyring import Keyring
from erasure.scheme import Scheme
from erasure.stripe import make_stripe, recover
from protocol.errors import ConfigInvalid
from protocol.hashing import hash_block
from protocol.ids import BlockHash, VolumeId

GOLDEN = Path(__file__).parents[1] / "data" / "golden-v1"
MANIFEST: dict[str, Any] = json.loads((GOLDEN / "manifest.json").read_text())
FILES = sorted(MANIFEST["files"])
VOLUME = VolumeId(MANIFEST["volume"])
EPOCH: int = MANIFEST["epoch"]


def keyring() -> Keyring:
    return Keyring([bytes.fromhex(MANIFEST["key"])])


def plain_of(name: str) -> bytes:
    return (GOLDEN / "plain.bin").read_bytes()[: MANIFEST["files"][name]["plain_length"]]


def records_of(name: str) -> list[bytes]:
    data = (GOLDEN / name).read_bytes()
    slots = Scheme.parse(MANIFEST["files"][name]["scheme"]).n
    length, rest = divmod(len(data), slots)
    assert rest == 0
    return [data[slot * length : (slot + 1) * length] for slot in range(slots)]


def fragments_of(name: str) -> dict[int, Fragment]:
    block = BlockHash.parse(MANIFEST["files"][name]["hash"])
    return {
        slot: parse_expected(record, VOLUME, block, slot)
        for slot, record in enumerate(records_of(name))
    }


def test_golden_vectors_cover_every_form_of_the_payload() -> None:
    forms = {entry["form"] for entry in MANIFEST["files"].values()}
    schemes = {entry["scheme"] for entry in MANIFEST["files"].values()}
    assert forms == {"raw", "zstd", "aes", "zstd-aes", "raw-empty"}
    assert schemes == {"rs-6-3", "replica-4"}


@pytest.mark.parametrize("name", FILES)
def test_golden_headers_say_what_the_manifest_says(name: str) -> None:
    entry = MANIFEST["files"][name]
    block = BlockHash.parse(entry["hash"])
    for slot, record in enumerate(records_of(name)):
        fragment = parse(record)
        assert fragment.scheme.name == entry["scheme"]
        assert fragment.stored_length == entry["stored_length"]
        assert fragment.plain_length == entry["plain_length"]
        assert peek_key(record) == (VOLUME, block, slot, EPOCH)


@pytest.mark.parametrize("name", FILES)
def test_golden_fragments_give_the_block_back_from_every_subset(name: str) -> None:
    plain, codec, fragments = plain_of(name), Codec(), fragments_of(name)
    assert hash_block(plain) == fragments[0].block
    for slots in itertools.combinations(fragments, fragments[0].scheme.k):
        chosen = {slot: fragments[slot] for slot in slots}
        assert recover(codec, keyring(), hash_block(plain), chosen).plain == plain


@pytest.mark.parametrize("name", [name for name in FILES if "zstd" not in name])
def test_sealing_and_encoding_give_the_golden_bytes_again(name: str) -> None:
    """Not asked of zstd, whose releases may compress differently."""
    plain = plain_of(name)
    ring = keyring() if "aes" in MANIFEST["files"][name]["form"] else None
    stored = seal([plain], len(plain), keyring=ring, compress=False)
    scheme = Scheme.parse(MANIFEST["files"][name]["scheme"])
    stripe = make_stripe(Codec(), scheme, hash_block(plain), VOLUME, EPOCH, stored)
    assert [header + bytes(payload) for header, payload in stripe] == records_of(name)


@pytest.mark.parametrize("name", FILES)
def test_parity_of_golden_stripes_never_changes(name: str) -> None:
    """Whatever the payload is: an encode of the stored bytes gives the fragments on the disks."""
    codec, fragments = Codec(), fragments_of(name)
    scheme, stored_length = fragments[0].scheme, fragments[0].stored_length
    payloads = {slot: fragment.payload for slot, fragment in fragments.items()}
    stored = bytes(codec.decode(scheme, payloads, stored_length))
    assert [bytes(p) for p in codec.encode(scheme, stored)] == [bytes(p) for p in payloads.values()]


@pytest.mark.parametrize("name", [name for name in FILES if "aes" in name])
def test_encrypted_golden_blocks_need_their_key(name: str) -> None:
    codec, fragments = Codec(), fragments_of(name)
    payloads = {slot: fragment.payload for slot, fragment in fragments.items()}
    stored = codec.decode(fragments[0].scheme, payloads, fragments[0].stored_length)
    with pytest.raises(ConfigInvalid, match="no key file"):
        unseal(stored, None)
    stranger = Keyring([b"\1" * 32])
    with pytest.raises(ConfigInvalid, match="put that key back"):
        unseal(stored, stranger)
