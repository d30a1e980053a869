"""The two hashes: SHA-256 names a block and proves a decode; XXH3-64 guards bytes at each hop.

XXH3 is not a defence against a forger (the cluster secret and SHA-256 are); it is there because
it reads memory at memory speed, so that every hop can afford to check.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import xxhash

from protocol.ids import BlockHash

Buffer = bytes | bytearray | memoryview


def hash_block(data: Buffer) -> BlockHash:
    """Name of a block from its plain bytes.  Releases the GIL for more than 2 KiB."""
    return BlockHash.of_digest(hashlib.sha256(data).digest())


def hash_parts(parts: Iterable[Buffer]) -> BlockHash:
    """Name of a block that is held in pieces."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return BlockHash.of_digest(digest.digest())


def checksum64(data: Buffer) -> int:
    """XXH3-64 of `data`, as an unsigned integer."""
    return xxhash.xxh3_64_intdigest(data)
