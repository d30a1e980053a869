"""What happened in a run: a hash over all of it, and the last lines for a person.

Written by every part of `chaos/sim`.  Two runs of one seed must give the same hash, on any machine
and with any PYTHONHASHSEED: a line may hold times, names and counts, never an address.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable

LINES_KEPT = 4_000
"""Lines kept for the report of a failure; the hash covers all lines."""


class Trace:
    """Append-only; `now` gives virtual seconds."""

    def __init__(self, now: Callable[[], float], keep: int = LINES_KEPT) -> None:
        self._now = now
        self._digest = hashlib.blake2b(digest_size=16)
        self._lines: deque[str] = deque(maxlen=keep)
        self.count = 0

    def record(self, actor: str, event: str, detail: object = "") -> None:
        """Add one line: who, what, and details whose text is the same in every run."""
        line = f"{self._now():.6f} {actor} {event} {detail}"
        self._digest.update(line.encode())
        self._digest.update(b"\n")
        self._lines.append(line)
        self.count += 1

    def hash(self) -> str:
        """32 hex digits over every line so far."""
        return self._digest.hexdigest()

    def tail(self, lines: int = LINES_KEPT) -> list[str]:
        """The last lines, oldest first."""
        return list(self._lines)[-lines:]
