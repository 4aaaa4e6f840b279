"""Captions: what is changed, that it is reported, and that clean text stays as it is."""

from __future__ import annotations

import unicodedata

import pytest

from vidit.data.captions import CaptionError, clean_caption


@pytest.mark.parametrize(
    ("value", "text", "changes"),
    [
        ("A red ball.", "A red ball.", ()),
        (b"A red ball.", "A red ball.", ()),
        ("ein Bär, 一只熊, 🐻", "ein Bär, 一只熊, 🐻", ()),
        (b"a \xff b", "a \ufffd b", ("invalid_utf8",)),
        ("a \ud800 b", "a \ufffd\ufffd\ufffd b", ("invalid_utf8",)),
        ("Ba\u0308r", "Bär", ("normalised",)),
        ("a\x00b\x1b[31m\u202ec\u200bd", "ab[31mcd", ("control_characters",)),
        ("a\n", "a", ()),
        ("a\r\n", "a", ()),
        ("a\n\n", "a", ("white_space",)),
        ("  a\r\n\tb\u00a0 c \u3000", "a b c", ("white_space",)),
        ("👨\u200d👩\u200d👧", "👨\u200d👩\u200d👧", ()),
        ("\ufeffwith a mark", "with a mark", ()),
        (
            b"\xff  \x07e\xcc\x81",
            "\ufffd é",
            ("invalid_utf8", "control_characters", "normalised", "white_space"),
        ),
    ],
)
def test_changes(value: bytes | str, text: str, changes: tuple[str, ...]) -> None:
    assert clean_caption(value) == (text, changes)


@pytest.mark.parametrize(
    ("text", "max_chars", "expected"),
    [
        ("one two three", 13, "one two three"),
        ("one two three", 12, "one two"),
        ("one two three", 7, "one two"),
        ("one two three", 6, "one"),
        ("x" * 50, 10, "x" * 10),
        ("a " + "x" * 50, 10, "a " + "x" * 8),
    ],
)
def test_cut(text: str, max_chars: int, expected: str) -> None:
    found, changes = clean_caption(text, max_chars=max_chars)
    assert found == expected
    assert changes == (() if text == expected else ("cut",))


@pytest.mark.parametrize(
    ("value", "reason"),
    [(None, "is missing"), ("", "is empty"), (b"", "is empty"), (" \x00\u200b\n", "no printable")],
)
def test_empty_only_where_allowed(value: bytes | str | None, reason: str) -> None:
    with pytest.raises(CaptionError, match=reason):
        clean_caption(value)
    assert clean_caption(value, allow_empty=True)[0] == ""


def test_cleaning_twice_changes_nothing_more() -> None:
    mess = "".join(map(chr, [*range(0x2100), *range(0xD7F0, 0xE010), *range(0xFFF0, 0x10010)]))
    text, changes = clean_caption(mess, max_chars=100_000)
    assert changes
    assert clean_caption(text, max_chars=100_000) == (text, ())
    assert unicodedata.is_normalized("NFC", text)
    assert text.encode("utf-8").decode("utf-8") == text


def test_max_chars_must_leave_room() -> None:
    with pytest.raises(ValueError, match="max_chars=0"):
        clean_caption("a", max_chars=0)
