"""Path rules: what is refused, and which names are one name."""

from __future__ import annotations

import sys
import unicodedata

import pytest

from metadata.paths import join_path, keys_of, parse_path
from protocol.errors import InvalidPath
from protocol.limits import NAME_BYTES_MAX, PATH_BYTES_MAX, PATH_DEPTH_MAX
from protocol.names import name_key


@pytest.mark.parametrize("text", ["", "/"])
def test_empty_and_slash_are_the_root(text: str) -> None:
    assert parse_path(text) == ()
    assert join_path(()) == "/"


@pytest.mark.parametrize(
    "name",
    [
        "a",
        " ",
        "...",
        "..a",
        "a..",
        ".hidden",
        "trailing ",
        "trailing.",
        "CON",
        'what:*?"<>|\\',
        "line\nbreak",
        "\x01\x7f",
        "-rf",
        "~",
        "日本語",
        "e\u0301",
        "\u00e9",
        "😀",
        "\ufeff",
        "\u202e",
        "%2e%2e",
        "a" * NAME_BYTES_MAX,
        "é" * (NAME_BYTES_MAX // 2),
    ],
)
def test_a_name_any_system_can_make_is_kept_as_it_is(name: str) -> None:
    assert parse_path(name) == parse_path("/" + name) == (name,)
    assert parse_path(f"/x/{name}/y") == ("x", name, "y")
    assert join_path(parse_path(f"x/{name}")) == f"/x/{name}"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("//", "empty_segment"),
        ("/a/", "empty_segment"),
        ("a/", "empty_segment"),
        ("//a", "empty_segment"),
        ("/a//b", "empty_segment"),
        (".", "dot_segment"),
        ("..", "dot_segment"),
        ("/..", "dot_segment"),
        ("/a/./b", "dot_segment"),
        ("/a/../b", "dot_segment"),
        ("/a/..", "dot_segment"),
        ("\0", "nul"),
        ("/a\0b", "nul"),
        ("/a/b\0", "nul"),
        ("\ud800", "not_unicode"),
        ("/a/\udfff", "not_unicode"),
        ("/\udcff\udcfe", "not_unicode"),
        ("a" * (NAME_BYTES_MAX + 1), "name_too_long"),
        ("é" * (NAME_BYTES_MAX // 2 + 1), "name_too_long"),
        ("/x/" + "😀" * 64, "name_too_long"),
        ("/".join(["a"] * (PATH_DEPTH_MAX + 1)), "too_deep"),
        ("/" * (PATH_DEPTH_MAX + 2), "too_deep"),
        ("/a" * (PATH_BYTES_MAX // 2) + "b", "too_long"),
        ("x" * (PATH_BYTES_MAX + 1), "too_long"),
    ],
)
def test_a_path_no_entry_can_have_is_refused_with_its_reason(text: str, reason: str) -> None:
    with pytest.raises(InvalidPath) as caught:
        parse_path(text)
    assert caught.value.details["reason"] == reason
    caught.value.message.encode()  # can be sent
    str(caught.value.details["path"]).encode()
    assert len(caught.value.message) < 2_000


def test_the_longest_and_the_deepest_path_are_accepted() -> None:
    assert len(parse_path("/".join(["a"] * PATH_DEPTH_MAX))) == PATH_DEPTH_MAX
    longest = "/".join(["a" * 204] * 20)[: PATH_BYTES_MAX - 1]
    assert len(parse_path("/" + longest)) == 20


@pytest.mark.parametrize(
    "same",
    [
        ("readme", "README", "ReadMe"),
        ("é", "e\u0301", "É", "E\u0301"),
        ("ß", "SS", "ss", "ẞ"),
        ("ﬁ", "FI"),
        ("\u03a3", "\u03c3", "\u03c2"),
        ("\u212b", "\u00c5", "a\u030a"),
        ("\u1e9b\u0323", "\u1e9b\u0323".upper()),
        ("\u0390", "\u1fd3", "\u03b9\u0308\u0301"),
        ("한", "\u1112\u1161\u11ab"),
        ("\u0345\u0313", "\u0313\u0345"),
    ],
)
def test_names_that_differ_by_case_or_normal_form_are_one_name(same: tuple[str, ...]) -> None:
    assert len(set(map(name_key, same))) == 1


@pytest.mark.parametrize(
    "different",
    [("a", "b"), ("e", "é"), ("i", "ı"), ("1", "１"), ("a", "a "), ("K", "Ｋ"), ("²", "2")],  # noqa: RUF001 - look-alikes are the point
)
def test_names_that_merely_look_alike_stay_apart(different: tuple[str, ...]) -> None:
    assert len(set(map(name_key, different))) == len(different)


def test_the_key_of_every_character_is_stable_and_cannot_break_a_path() -> None:
    for point in range(sys.maxunicode + 1):
        if 0xD800 <= point < 0xE000:
            continue
        character = chr(point)
        key = name_key(character)
        if key == character:
            continue
        assert name_key(key) == key, hex(point)
        assert key not in ("", ".", ".."), hex(point)
        assert "/" not in key, hex(point)
        assert "\0" not in key, hex(point)
        for form in ("NFC", "NFD"):
            assert name_key(unicodedata.normalize(form, character)) == key, hex(point)


def test_keys_of_a_path_are_the_keys_of_its_names() -> None:
    assert keys_of(("A", "É", "c")) == ("a", "é", "c")
    assert keys_of(()) == ()
