"""How much hedging a gateway may do: a share of its reads, so that hedges never feed overload.

Step 4 of the life of a get.  A busy cell is late everywhere; if each late slot were asked for
twice, and each lucky parity slot cost a decode and a SHA-256, the answer to load would be load.
"""

from __future__ import annotations

from typing import Final

HEDGES_PER_READ: Final = 0.05
"""Hedges earned by one read of a block."""

HEDGES_SAVED_MAX: Final = 12.0
"""Hedges that a quiet time saves up: enough for m nodes that stop at once to lose the races after
which the pool no longer trusts them."""


class HedgeBudget:
    """Tokens: earned by reads, spent by hedges.  One per gateway."""

    def __init__(self) -> None:
        self._saved = HEDGES_SAVED_MAX

    def earn(self) -> None:
        """A block is being read."""
        self._saved = min(HEDGES_SAVED_MAX, self._saved + HEDGES_PER_READ)

    def spend(self) -> bool:
        """True if a late slot may be hedged now; it then is."""
        if self._saved < 1.0:
            return False
        self._saved -= 1.0
        return True
