"""What clients put: bytes made again from a number, with lengths on the edges where bugs live.

Used by `chaos/workloads.py`.  All clients of a run draw from one pool, so that the same block is
put by several of them at the same time.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from protocol.limits import BLOCK_BYTES_MAX, SMALL_BLOCK_BYTES

EDGE_LENGTHS: tuple[int, ...] = (
    *(0, 1, 2, 5, 6, 7, 255, 256, 4_095, 4_096),
    SMALL_BLOCK_BYTES - 1,
    SMALL_BLOCK_BYTES,
    SMALL_BLOCK_BYTES + 1,
)
"""Around nothing, k, an inline file, and the border between replicas and Reed-Solomon."""

LARGE_LENGTHS: tuple[int, ...] = (256 * 1024 + 1, 1024 * 1024 - 1, BLOCK_BYTES_MAX)
"""Rarely drawn: they cost most of the time of a run."""


class Content(NamedTuple):
    """A block's bytes, made again from its number when needed."""

    number: int
    length: int
    compressible: bool

    def data(self) -> bytes:
        """The same bytes for the same value."""
        rng = random.Random(f"content-{self.number}-{self.length}")
        if self.compressible:
            seed = rng.randbytes(61)
            return (seed * (self.length // len(seed) + 1))[: self.length]
        return rng.randbytes(self.length)


def draw_content(rng: random.Random, pool: list[Content], reuse: float, large: float) -> Content:
    """Something to put: with probability `reuse` out of the pool, where recent ones are likelier;
    with probability `large` up to 4 MiB.  What is new joins the pool."""
    if pool and rng.random() < reuse:
        return rng.choice(pool[-20:] if rng.random() < 0.5 else pool)
    kind = rng.random()
    if kind < large:
        length = rng.choice(LARGE_LENGTHS)
    elif kind < 0.3:
        length = rng.choice(EDGE_LENGTHS)
    elif kind < 0.45:
        length = SMALL_BLOCK_BYTES + rng.randrange(20_000)
    else:
        length = rng.randrange(1, 8_000)
    content = Content(len(pool), length, rng.random() < 0.5)
    pool.append(content)
    return content
