"""Numbers as people read them.  Pure."""

from __future__ import annotations

import datetime

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def size(count: float) -> str:
    """Bytes in powers of 1000: `999 B`, `1.5 MB`."""
    value = float(count)
    for unit in _UNITS:
        if abs(value) < 999.5 or unit == _UNITS[-1]:
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" or value >= 99.5 else f"{value:.1f} {unit}"


def rate(count: float, seconds: float) -> str:
    """Bytes per second."""
    return f"{size(count / seconds)}/s" if seconds > 0 else "-"


def number(value: int) -> str:
    """An integer with thousands apart."""
    return f"{value:,}"


def plural(value: int, one: str, many: str | None = None) -> str:
    """`1 file`, `2 files`."""
    return f"{value:,} {one if value == 1 else many or one + 's'}"


def moment(seconds: float) -> str:
    """An instant as local time, to the minute."""
    try:
        return datetime.datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")
    except (OverflowError, OSError, ValueError):
        return "?"


def lasting(seconds: float) -> str:
    """A length of time in one unit, rounded down: `45 s`, `3 min`, `5 h`, `12 d`."""
    whole = max(0, int(seconds))
    for limit, unit, name in ((120, 1, "s"), (7_200, 60, "min"), (172_800, 3_600, "h")):
        if whole < limit:
            return f"{whole // unit} {name}"
    return f"{whole // 86_400} d"
