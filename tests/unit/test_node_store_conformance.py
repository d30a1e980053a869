"""What every `FragmentStore` does, run over the real one and its memory twin."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from node_parts import LARGE, WHOLE_DISK, fragment_key, fragment_record, noise, rocks

from protocol.errors import DirectoryInUse, NodeFull, NodeRefuses
from protocol.limits import KIB, MIB
from protocol.messages import ItemStatus
from storage_node.interface import Finding, FragmentKey, FragmentStore
from storage_node.memory_store import Disk, MemoryStore

OK, NOT_FOUND, NOT_SENT = ItemStatus.OK, ItemStatus.NOT_FOUND, ItemStatus.NOT_SENT
CORRUPT = ItemStatus.CORRUPT
FREE = 64 * MIB


class Lab:
    """One disk of a kind; opens stores on it."""

    def __init__(self, kind: str, directory: Path) -> None:
        self.kind = kind
        self.free = FREE
        self.disk = Disk(shares=WHOLE_DISK)
        self._directory = directory / "node"

    def open(self) -> FragmentStore:
        if self.kind == "memory":
            self.disk.capacity_bytes = self.disk.used_bytes + self.free
            return MemoryStore(self.disk)
        return rocks(self._directory, free_bytes=lambda _: self.free)


@pytest.fixture(params=["rocks", "memory"])
def lab(request: pytest.FixtureRequest, tmp_path: Path) -> Lab:
    return Lab(request.param, tmp_path)


@pytest.fixture
def store(lab: Lab) -> Iterator[FragmentStore]:
    opened = lab.open()
    yield opened
    opened.close()


def records(*sizes: int) -> list[tuple[FragmentKey, bytes]]:
    return [(fragment_key(number), noise(number, size)) for number, size in enumerate(sizes)]


def read(store: FragmentStore, *keys: FragmentKey) -> list[bytes | None]:
    return [
        None if answer.record is None else bytes(answer.record) for answer in store.get_many(keys)
    ]


def all_keys(store: FragmentStore, page: int = 3) -> list[tuple[FragmentKey, int]]:
    found: list[tuple[FragmentKey, int]] = []
    more = True
    while more:
        part, more = store.inventory(found[-1][0] if found else None, page)
        found += part
    return found


def test_a_put_record_is_read_back_byte_for_byte(store: FragmentStore) -> None:
    group = records(0, 1, 1 * KIB, 31 * KIB, 32 * KIB, LARGE, 700 * KIB)
    store.put_group(group)
    assert read(store, *(key for key, _ in group)) == [record for _, record in group]


def test_records_given_as_views_are_kept_as_bytes(store: FragmentStore) -> None:
    whole = bytearray(noise(1, LARGE + 10))
    store.put_group([(fragment_key(1), memoryview(whole)[5:-5])])
    expected = bytes(whole[5:-5])
    whole[:] = bytes(len(whole))
    assert read(store, fragment_key(1)) == [expected]


def test_an_unknown_key_is_not_found_and_does_not_disturb_others(store: FragmentStore) -> None:
    store.put_group(records(100))
    answers = store.get_many([fragment_key(7), fragment_key(0), fragment_key(8)])
    assert [answer.status for answer in answers] == [NOT_FOUND, OK, NOT_FOUND]


def test_asking_for_nothing_answers_nothing(store: FragmentStore) -> None:
    store.put_group([])
    assert store.get_many([]) == []
    assert store.delete_group([]) == []
    assert store.stats().fragments == 0


def test_a_key_asked_for_twice_is_answered_twice(store: FragmentStore) -> None:
    store.put_group(records(10))
    assert read(store, fragment_key(0), fragment_key(0)) == [noise(0, 10)] * 2


@pytest.mark.parametrize("size", [100, LARGE])
def test_a_second_put_of_a_key_replaces_the_first(store: FragmentStore, size: int) -> None:
    key = fragment_key(0)
    store.put_group([(key, noise(1, size))])
    store.put_group([(key, noise(2, size + 1))])
    assert read(store, key) == [noise(2, size + 1)]
    assert (store.stats().fragments, store.stats().fragment_bytes) == (1, size + 1)


def test_the_last_of_two_records_of_a_key_in_one_group_wins(store: FragmentStore) -> None:
    key = fragment_key(0)
    store.put_group([(key, noise(1, LARGE)), (key, noise(2, LARGE))])
    assert read(store, key) == [noise(2, LARGE)]
    assert store.stats().fragments == 1


def test_slots_and_volumes_of_one_block_are_kept_apart(store: FragmentStore) -> None:
    keys = [fragment_key(1, volume=volume, slot=slot) for volume in (1, 2) for slot in (0, 1)]
    store.put_group([(key, noise(number, 50)) for number, key in enumerate(keys)])
    assert read(store, *keys) == [noise(number, 50) for number in range(4)]


def test_delete_says_what_was_there_and_takes_it_away(store: FragmentStore) -> None:
    store.put_group(records(10, LARGE, 20))
    done = store.delete_group([fragment_key(1), fragment_key(9), fragment_key(0)])
    assert done == [OK, NOT_FOUND, OK]
    assert read(store, *(fragment_key(n) for n in range(3))) == [None, None, noise(2, 20)]
    assert (store.stats().fragments, store.stats().fragment_bytes) == (1, 20)


def test_a_deleted_key_can_be_put_again(store: FragmentStore) -> None:
    store.put_group(records(LARGE))
    store.delete_group([fragment_key(0)])
    store.put_group(records(LARGE))
    assert read(store, fragment_key(0)) == [noise(0, LARGE)]
    assert store.stats().fragments == 1


def test_the_inventory_lists_everything_once_in_key_order(store: FragmentStore) -> None:
    group = [
        (fragment_key(number, volume=volume), noise(number, number))
        for volume in (3, 1, 2**40)
        for number in range(5)
    ]
    store.put_group(group)
    expected = sorted((key.pack(), len(record)) for key, record in group)
    for page in (1, 3, 15, 100):
        assert [(key.pack(), length) for key, length in all_keys(store, page)] == expected


def test_an_empty_store_has_an_empty_inventory(store: FragmentStore) -> None:
    assert store.inventory(None, 10) == ([], False)
    assert store.inventory(fragment_key(1), 10) == ([], False)


def test_records_beyond_the_asked_bytes_are_not_sent(store: FragmentStore) -> None:
    store.put_group(records(100, 100, 100, 5))
    keys = [fragment_key(number) for number in range(4)]
    assert [answer.status for answer in store.get_many(keys, 210)] == [OK, OK, NOT_SENT, OK]
    assert [answer.status for answer in store.get_many(keys[:2], 10)] == [OK, NOT_SENT]


def test_node_state_is_read_back_and_unknown_names_are_none(store: FragmentStore) -> None:
    assert store.get_state("incarnation") is None
    store.put_state({"incarnation": b"\1", "epoch/v1": b""})
    store.put_state({"incarnation": b"\2"})
    assert store.get_state("incarnation") == b"\2"
    assert store.get_state("epoch/v1") == b""


def test_everything_is_there_after_the_store_is_opened_again(lab: Lab) -> None:
    store = lab.open()
    group = records(10, LARGE, 40 * KIB, 2000)
    store.put_group(group)
    store.delete_group([fragment_key(0)])
    store.put_state({"name": b"value"})
    before = store.stats()
    store.close()
    store = lab.open()
    assert read(store, *(key for key, _ in group)) == [None, *(record for _, record in group[1:])]
    assert store.get_state("name") == b"value"
    after = store.stats()
    assert (after.fragments, after.fragment_bytes) == (before.fragments, before.fragment_bytes)
    store.close()


def test_close_may_be_called_twice_and_ends_the_store(lab: Lab) -> None:
    store = lab.open()
    store.close()
    store.close()
    calls: list[Callable[[], object]] = [
        lambda: store.put_group(records(1)),
        lambda: store.get_many([fragment_key(0)]),
        lambda: store.delete_group([fragment_key(0)]),
    ]
    for call in calls:
        with pytest.raises(NodeRefuses):
            call()


def test_a_directory_has_one_opener_at_a_time(lab: Lab) -> None:
    store = lab.open()
    with pytest.raises(DirectoryInUse):
        lab.open()
    store.close()
    lab.open().close()


def test_a_full_disk_refuses_puts_and_goes_on_with_the_rest(lab: Lab) -> None:
    store = lab.open()
    store.put_group(records(LARGE, 10))
    store.close()
    lab.free = 10
    store = lab.open()
    assert store.space().client_free_bytes == 10
    with pytest.raises(NodeFull):
        store.put_group([(fragment_key(5), noise(5, 11))])
    assert read(store, fragment_key(0), fragment_key(5)) == [noise(0, LARGE), None]
    assert store.delete_group([fragment_key(0)]) == [OK]
    store.put_state({"name": b"value"})
    store.put_group([(fragment_key(6), noise(6, 10))])
    assert read(store, fragment_key(1), fragment_key(6)) == [noise(1, 10), noise(6, 10)]
    store.close()


def test_tidying_changes_nothing_that_can_be_seen(store: FragmentStore) -> None:
    group = records(*[LARGE] * 6, 10, 20)
    for item in group:
        store.put_group([item])
    store.delete_group([fragment_key(2), fragment_key(6)])
    before = (store.stats().fragments, store.stats().fragment_bytes, all_keys(store))
    while store.tidy(4 * MIB):
        pass
    assert (store.stats().fragments, store.stats().fragment_bytes, all_keys(store)) == before
    kept = [(key, record) for number, (key, record) in enumerate(group) if number not in (2, 6)]
    assert read(store, *(key for key, _ in kept)) == [record for _, record in kept]


# -- what went bad -----------------------------------------------------------------------------


def spoil(store: FragmentStore, key: FragmentKey) -> None:
    """Bytes that the store takes for its own and that are no fragment."""
    store.put_group([(key, b"not a fragment")])


def fragments(*numbers: int) -> list[tuple[FragmentKey, bytes]]:
    return [fragment_record(number) for number in numbers]


def test_pages_run_from_the_newest_volume_to_the_oldest(store: FragmentStore) -> None:
    keys = [fragment_key(number, volume=volume) for volume in (1, 2, 3) for number in range(4)]
    store.put_group([(key, noise(1, 10)) for key in keys])
    listed: list[FragmentKey] = []
    bound: bytes | None = None
    while True:
        page = store.newest(bound, 5, 30)
        assert not page.damaged
        listed += [key for key, length in page.entries if length == 10]
        bound = page.rest
        if bound is None:
            break
    assert listed == sorted(keys, key=FragmentKey.pack, reverse=True)


def test_only_what_is_bad_is_set_aside_and_survives_opening_again(lab: Lab) -> None:
    store = lab.open()
    store.put_group(fragments(1, 2, 3))
    spoil(store, fragment_key(2))
    asked = [fragment_key(number) for number in (1, 2, 3, 4)]
    assert store.set_aside(asked, 12.5) == 1
    assert store.set_aside(asked, 99.0) == 0
    store.close()
    store = lab.open()
    assert store.findings(None, 10) == ([Finding(fragment_key(2), CORRUPT, 12.5)], False)
    assert [answer.status for answer in store.get_many(asked)] == [OK, CORRUPT, OK, NOT_FOUND]
    assert store.stats().counters["findings"] == 1
    store.close()


def test_findings_are_paged_in_key_order(store: FragmentStore) -> None:
    keys = sorted((fragment_key(number) for number in range(7)), key=FragmentKey.pack)
    store.put_group([(key, b"bad") for key in keys])
    assert store.set_aside(keys, 1.0) == 7
    first, more = store.findings(None, 4)
    rest, end = store.findings(first[-1].key, 4)
    assert (more, end) == (True, False)
    assert [finding.key for finding in first + rest] == keys


def test_a_finding_ends_with_a_good_record_or_a_delete_and_not_with_a_bad_one(
    store: FragmentStore,
) -> None:
    bad = [fragment_key(number) for number in (1, 2, 3)]
    store.put_group([(key, b"bad") for key in bad])
    store.set_aside(bad, 1.0)
    store.put_group([*fragments(1), (fragment_key(3), b"bad too")])
    store.delete_group([fragment_key(2)])
    assert [finding.key for finding in store.findings(None, 9)[0]] == [fragment_key(3)]
    assert read(store, *bad) == [fragments(1)[0][1], None, None]


def test_upkeep_keeps_what_is_set_aside(store: FragmentStore) -> None:
    group = [fragment_record(number, LARGE) for number in range(6)]
    for item in group:
        store.put_group([item])
    spoil_key = group[2][0]
    store.put_group([(spoil_key, noise(1, LARGE))])
    store.set_aside([spoil_key], 1.0)
    store.delete_group([key for number, (key, _) in enumerate(group) if number != 2])
    while store.tidy(64 * MIB):
        pass
    (answer,) = store.examine([spoil_key])
    assert answer.record == noise(1, LARGE)
