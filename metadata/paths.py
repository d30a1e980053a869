"""Paths as requests send them: parsed once, here, before anything looks at the tree.

First step of every walk through the metadata (commit, list, entry, delete).  Called by
`metadata.tree` and by the API for early answers.  Pure: imports nothing but `protocol`.

A path is segments between slashes; a leading slash is optional, "" and "/" are the root.  Names
are kept exactly as sent; which of them are one name is for `protocol.names` to say.
"""

from __future__ import annotations

from protocol.errors import InvalidPath
from protocol.limits import NAME_BYTES_MAX, PATH_BYTES_MAX, PATH_DEPTH_MAX
from protocol.names import name_key

Names = tuple[str, ...]
"""Segments of a path from the root down, as displayed."""

_SHOWN_CHARACTERS_MAX = 200
"""How much of a refused path an error repeats."""


def parse_path(text: str) -> Names:
    """Segments of `text`; `()` for the root.

    Raises `InvalidPath`; `details.reason` is one of `too_long`, `too_deep`, `not_unicode`,
    `nul`, `empty_segment`, `dot_segment`, `name_too_long`.
    """
    try:
        encoded_length = len(text.encode())
    except UnicodeEncodeError:
        raise _invalid(text, "not_unicode", "holds half of a surrogate pair") from None
    if encoded_length > PATH_BYTES_MAX:
        raise _invalid(text, "too_long", f"is over {PATH_BYTES_MAX} bytes of UTF-8")
    if "\0" in text:
        raise _invalid(text, "nul", "holds a NUL character")
    relative = text[1:] if text.startswith("/") else text
    if not relative:
        return ()
    names = tuple(relative.split("/"))
    if len(names) > PATH_DEPTH_MAX:
        raise _invalid(text, "too_deep", f"has over {PATH_DEPTH_MAX} segments")
    for name in names:
        _check_name(text, name, encoded_length)
    return names


def keys_of(names: Names) -> tuple[str, ...]:
    """`name_key` of each segment."""
    return tuple(map(name_key, names))


def join_path(names: Names) -> str:
    """The canonical text of a path: `/` for the root, else `/a/b`."""
    return "/" + "/".join(names)


def _check_name(text: str, name: str, encoded_length: int) -> None:
    if not name:
        raise _invalid(text, "empty_segment", "has an empty segment")
    if name in (".", ".."):
        raise _invalid(text, "dot_segment", f"has the segment {name!r}")
    if encoded_length > NAME_BYTES_MAX and len(name.encode()) > NAME_BYTES_MAX:
        raise _invalid(text, "name_too_long", f"has a name over {NAME_BYTES_MAX} bytes of UTF-8")


def _invalid(text: str, reason: str, why: str) -> InvalidPath:
    shown = text[:_SHOWN_CHARACTERS_MAX].encode(errors="backslashreplace").decode()
    return InvalidPath(f"path {shown!r} {why}", {"path": shown, "reason": reason})
