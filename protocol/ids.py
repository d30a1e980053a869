"""Ids: frozen types that print and parse back.

`BlockHash` is `bytes`, `NodeId` is `str` and `VolumeId` is `int` underneath, so that they are
stored, compared and hashed at the speed of the built-in type; the subclass only adds the parsing,
the printing and a type that mypy can tell apart.
"""

from __future__ import annotations

import re
from typing import Self

from protocol.errors import MalformedHash, MalformedId

_HEX64 = re.compile(r"[0-9a-f]{64}")
_NODE = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_VOLUME = re.compile(r"v([0-9]{1,18})")

BLOCK_HASH_BYTES = 32
"""Length of a SHA-256, in bytes."""


class BlockHash(bytes):
    """Name of a block: the SHA-256 of its plain bytes (32 bytes; prints as 64 hex digits)."""

    __slots__ = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read 64 lower-case hex digits.  Raises `MalformedHash` for anything else."""
        if _HEX64.fullmatch(text) is None:
            raise MalformedHash(text)
        return cls(bytes.fromhex(text))

    @classmethod
    def of_digest(cls, digest: bytes) -> Self:
        """Wrap a raw 32-byte digest."""
        assert len(digest) == BLOCK_HASH_BYTES
        return cls(digest)

    def __str__(self) -> str:
        return self.hex()

    def __repr__(self) -> str:
        return f"BlockHash({self.hex()[:12]}…)"


class NodeId(str):
    """Name of a storage node, which is one disk: lower-case letters, digits and dashes."""

    __slots__ = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises `MalformedId` if `text` is not a node name."""
        if _NODE.fullmatch(text) is None:
            raise MalformedId("node", text)
        return cls(text)

    @classmethod
    def numbered(cls, number: int) -> Self:
        """The name that `haversack up` gives to the node of this number (1-based)."""
        return cls(f"node-{number:02d}")


class VolumeId(int):
    """Number of a volume; prints as `v17`."""

    __slots__ = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `v17`.  Raises `MalformedId` for anything else."""
        match = _VOLUME.fullmatch(text)
        if match is None:
            raise MalformedId("volume", text)
        return cls(int(match.group(1)))

    def __str__(self) -> str:
        return f"v{int(self)}"

    def __repr__(self) -> str:
        return f"VolumeId({int(self)})"
