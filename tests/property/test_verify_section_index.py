"""`SectionIndex` against a model of sets: whatever index, holders and inventories there are."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.topology import VolumeState, VolumeView
from cluster.verify.section_index import IndexRow, SectionIndex
from erasure.fragment import FRAGMENT_HEADER_BYTES
from erasure.scheme import Scheme
from protocol.ids import BlockHash, NodeId, VolumeId
from storage_node.interface import FragmentKey

NODES = [NodeId.numbered(number) for number in range(1, 6)]
SCHEMES = [Scheme.rs(2, 1), Scheme.replica(3), Scheme.replica(2)]
STORED = st.integers(min_value=0, max_value=9)

# Few names, many of them with zeroes at the end: numpy takes those off.
blocks = st.sampled_from(
    [bytes([first, *([0] * middle), last]).ljust(32, b"\0")[:32] for first in (0, 7, 255)
     for middle in (0, 29) for last in (0, 1)] + [b"\xff" * 32, b"\0" * 32]
)  # fmt: skip


@st.composite
def cells(draw: st.DrawFn) -> tuple[list[VolumeView], list[IndexRow]]:
    volumes = []
    for number in draw(st.sets(st.sampled_from([0, 1, 2, 255, 256, 2**40]), max_size=4)):
        scheme = draw(st.sampled_from(SCHEMES))
        slots = draw(st.permutations([*NODES, None, None]))[: scheme.n]
        volumes.append(
            VolumeView(VolumeId(number), scheme, VolumeState.SEALED, 1, tuple(slots), 0, 0)
        )
    volumes.sort(key=lambda volume: volume.volume_id)
    rows = []
    if volumes:
        for block in draw(st.sets(blocks, max_size=8)):
            volume = draw(st.sampled_from(volumes))
            rows.append(IndexRow(volume.volume_id, block, draw(STORED), draw(st.booleans())))
    return volumes, rows


keys = st.builds(
    FragmentKey,
    st.sampled_from([VolumeId(number) for number in (0, 1, 2, 255, 256, 2**40)]),
    st.builds(BlockHash, blocks),
    st.sampled_from([0, 1, 2, 3, 22, 255]),
)


@settings(max_examples=300, deadline=None)
@given(
    cell=cells(),
    held=st.dictionaries(
        st.sampled_from(NODES),
        st.dictionaries(keys, st.sampled_from([96, 98, 100, 105]), max_size=20),
    ),
    owed=st.sets(keys, max_size=5),
    page=st.integers(min_value=1, max_value=7),
    faithful=st.booleans(),
)
def test_every_difference_is_found_and_no_other(
    cell: tuple[list[VolumeView], list[IndexRow]],
    held: dict[NodeId, dict[FragmentKey, int]],
    owed: set[FragmentKey],
    page: int,
    faithful: bool,
) -> None:
    volumes, rows = cell
    views = {volume.volume_id: volume for volume in volumes}
    by_block = {(row.volume, row.block): row for row in rows}

    def expected(key: FragmentKey) -> int:
        row = by_block[key.volume, bytes(key.block)]
        return FRAGMENT_HEADER_BYTES + views[key.volume].scheme.chunk_bytes(row.stored_bytes)

    held = {node: dict(held.get(node, {})) for node in NODES}
    if faithful:  # most fragments where they belong
        for row in rows:
            for slot, node in enumerate(views[VolumeId(row.volume)].slots):
                if node is not None:
                    key = FragmentKey(VolumeId(row.volume), BlockHash(row.block), slot)
                    held[node].setdefault(key, expected(key))

    def holder(key: FragmentKey) -> NodeId | str | None:
        if (key.volume, bytes(key.block)) not in by_block:
            return "no row"
        slots = views[key.volume].slots
        return slots[key.slot] if key.slot < len(slots) else "no slot"

    index = SectionIndex(volumes, NODES, rows)
    index.excuse([(key.volume, key.slot, bytes(key.block)) for key in owed])
    looked = NODES[:4]
    strays, wrong = [], set()
    for node in looked:
        listed = sorted(held[node].items(), key=lambda item: item[0].pack())
        for start in range(0, len(listed), page):
            part = listed[start : start + page]
            match = index.match(node, [key.pack() for key, _ in part], [size for _, size in part])
            strays += match.strays
            wrong |= {(node, key) for key in match.wrong_lengths}

    mine = {(n, key) for n in looked for key in held[n] if holder(key) == n}
    outside = {(n, key) for n in looked for key in held[n] if holder(key) != n}
    assert {(stray.node, stray.key) for stray in strays} == outside
    assert wrong == {(n, key) for n, key in mine if held[n][key] != expected(key)}
    for stray in strays:
        assert (stray.row < 0) == (holder(stray.key) in ("no row", "no slot"))
        if stray.row >= 0:
            assert index.has(stray) == ((holder(stray.key), stray.key) in mine)
    slots = [
        (FragmentKey(VolumeId(row.volume), BlockHash(row.block), slot), node)
        for row in rows
        if row.live
        for slot, node in enumerate(views[VolumeId(row.volume)].slots)
    ]
    assert set(index.missing(looked)) == {
        (key, node)
        for key, node in slots
        if node in looked and (node, key) not in mine and key not in owed
    }
    assert index.unlooked(looked) == sum(1 for _, node in slots if node == NODES[4])
    assert set(index.blocks(0, len(index))) == {(key.volume, key.block) for key, _ in slots}
