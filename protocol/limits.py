"""Every limit of the system, named once, with its unit and its reason.

Raw values first, relations between them asserted at the end, at import.  Values that an operator
may change live in `protocol.config`; these may not change without a format or protocol version.
"""

from __future__ import annotations

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB

BLOCK_BYTES_MAX: Final = 4 * MIB
"""A block's plain bytes: Dropbox's unit, small enough to retry, large enough to stream."""

ENVELOPE_BYTES: Final = 64
"""Fixed header in front of a stored block's payload (see `erasure/envelope.py`)."""

STORED_BLOCK_BYTES_MAX: Final = BLOCK_BYTES_MAX + ENVELOPE_BYTES + 4 * KIB
"""A stored block: envelope, payload that may grow a little when it is encrypted."""

SMALL_BLOCK_BYTES: Final = 128 * KIB
"""Blocks below this go to replica volumes: one read instead of k, n writes instead of k+m."""

INLINE_FILE_BYTES_MAX: Final = 4 * KIB
"""Files up to this are kept in their metadata row and never become blocks."""

VOLUME_BYTES_TARGET: Final = 1 * GIB
"""Stored bytes (before coding) at which a volume is sealed: big enough that the volume table fits
in memory, small enough that a volume is a unit of repair and of moving."""

VOLUME_BLOCKS_MAX: Final = 1_000_000
"""Blocks at which a volume is sealed however small they are: bounds one volume's repair."""

FRAGMENTS_PER_STRIPE_MAX: Final = 22
"""k <= 16 and m <= 6."""

FRAME_META_BYTES_MAX: Final = 4 * MIB
"""The typed part of a data-port frame: a get of 65,536 keys fits."""

FRAME_BODY_BYTES_MAX: Final = 32 * MIB
"""The raw part of a data-port frame: bounds what one connection can make a node allocate."""

FRAME_ITEMS_MAX: Final = 65_536
"""Fragments named by one frame."""

BATCH_BODY_BYTES_MAX: Final = 16 * MIB
"""Framed body of `POST /v1/blocks/batch` and of the answer of `/v1/blocks/fetch`."""

BATCH_BLOCKS_MAX: Final = 4_096
"""Blocks in one batch, fetch or check."""

COMMIT_ENTRIES_MAX: Final = 1_000
"""Entries in one batch of commits."""

COMMIT_BLOCKS_MAX: Final = 65_536
"""Blocks one version may list: 256 GiB at 4 MiB each, and the list fits one JSON request."""

NAME_BYTES_MAX: Final = 255
"""One path segment in UTF-8: what ext4, XFS, APFS and NTFS can hold."""

PATH_BYTES_MAX: Final = 4_096
"""A whole path in UTF-8: Linux's PATH_MAX."""

PATH_DEPTH_MAX: Final = 128
"""Segments of a path: bounds recursion over trees."""

JSON_BODY_BYTES_MAX: Final = 8 * MIB
"""A JSON request: 1,000 commit entries with inline content fit."""

HEADER_BYTES_MAX: Final = 32 * KIB
"""Request line and header of an HTTP request."""

CLAIM_SECONDS: Final = 6 * 3600
"""How long a put or a check lets its caller reference the block."""

NODE_INFLIGHT_REQUESTS_MAX: Final = 1_024
"""Requests one node works on per connection before it stops reading from the socket."""

NODE_QUEUE_BYTES_MAX: Final = 64 * MIB
"""Fragment bytes waiting for a group commit on one node."""

PLACEMENT_SPACE_SHARE: Final = 0.85
"""Of a node's capacity, above which no new volume is placed on it if others can be had: what its
open volumes still take, and what repair brings, must fit above."""

CLIENT_SPACE_SHARE: Final = 0.90
"""Above which puts of clients are refused; repair goes on, or a full cell could not heal."""

REPAIR_SPACE_SHARE: Final = 0.95
"""Above which puts of repair are refused too.  The rest is for deletes, node state and merges,
which write before they free."""

GATEWAY_PUT_BYTES_MAX: Final = 96 * MIB
"""Buffers of all puts that one gateway works on: six large blocks with their fragments."""

GATEWAY_GET_BYTES_MAX: Final = 96 * MIB
"""Buffers of all gets that one gateway works on, until their bytes are handed over."""

BLOCK_ROWS_CACHED_MAX: Final = 32_768
"""Rows of the block index that a gateway keeps: some 10 MB."""

LISTING_PAGE_MAX: Final = 2_000
"""Entries on one page of a listing."""

LISTING_PAGE_BYTES_MAX: Final = 8 * MIB
"""Block lists and inline contents on one page of a listing: bounds the answer however large the
files are (one file's list alone may reach it)."""

assert BLOCK_BYTES_MAX <= BATCH_BODY_BYTES_MAX < FRAME_BODY_BYTES_MAX
assert STORED_BLOCK_BYTES_MAX < FRAME_BODY_BYTES_MAX
assert SMALL_BLOCK_BYTES < BLOCK_BYTES_MAX < VOLUME_BYTES_TARGET
assert INLINE_FILE_BYTES_MAX < SMALL_BLOCK_BYTES
assert 0 < PLACEMENT_SPACE_SHARE < CLIENT_SPACE_SHARE < REPAIR_SPACE_SHARE < 1
assert NODE_QUEUE_BYTES_MAX > FRAME_BODY_BYTES_MAX
assert BATCH_BLOCKS_MAX <= FRAME_ITEMS_MAX
assert COMMIT_BLOCKS_MAX * len('"' + "0" * 64 + '", ') < JSON_BODY_BYTES_MAX
assert GATEWAY_PUT_BYTES_MAX > 4 * BATCH_BODY_BYTES_MAX
