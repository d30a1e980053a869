"""Lists of block hashes from JSON, parsed together: a check brings four thousand at a time.

Used by `block_routes`, `batch_routes` and `metadata_routes`.  Pure.
"""

from __future__ import annotations

from collections.abc import Sequence

from protocol.ids import BLOCK_HASH_BYTES, BlockHash


def parse_hashes(texts: Sequence[str]) -> list[BlockHash]:
    """Each text as a hash, in order.  Raises `MalformedHash` for the first that is none."""
    joined = "".join(texts)
    # `fromhex` takes upper case and skips white space: lengths and case are checked apart.
    if all(len(text) == 2 * BLOCK_HASH_BYTES for text in texts) and joined == joined.lower():
        try:
            raw = bytes.fromhex(joined)
        except ValueError:
            raw = b""
        if len(raw) == BLOCK_HASH_BYTES * len(texts):
            starts = range(0, len(raw), BLOCK_HASH_BYTES)
            return [BlockHash(raw[start : start + BLOCK_HASH_BYTES]) for start in starts]
    return [BlockHash.parse(text) for text in texts]
