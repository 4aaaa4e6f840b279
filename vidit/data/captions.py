"""Captions as text a tokenizer can be given: one line of clean Unicode, and a list of what was changed."""

from __future__ import annotations

import unicodedata

MAX_CHARS = 2048
_SPACES = frozenset("\t\n\v\f\r\x1c\x1d\x1e\x1f\x85")
# Joiners are part of the spelling in several scripts and in emoji; the other format characters hide text.
_KEPT_FORMAT = frozenset("\u200c\u200d")


class CaptionError(ValueError):
    """A caption that is missing or empty where one is needed."""


def clean_caption(
    value: bytes | str | None, max_chars: int = MAX_CHARS, allow_empty: bool = False
) -> tuple[str, tuple[str, ...]]:
    """Return (text, changes): ``text`` is one line of NFC Unicode of at most ``max_chars`` characters.

    ``changes`` names, in this order and each at most once, what had to be done, so that callers can count:
    ``invalid_utf8`` (bytes, or lone surrogates, replaced by U+FFFD), ``control_characters`` (dropped, with
    invisible format characters such as direction marks), ``normalised`` (to NFC), ``white_space`` (runs
    folded to one space, ends trimmed), ``cut`` (at a word boundary where one lies in the second half).
    Raises CaptionError for None or for text that ends up empty, unless ``allow_empty``; ValueError for
    ``max_chars`` below 1.
    """
    if max_chars < 1:
        raise ValueError(f"max_chars={max_chars} leaves no caption; use 1 or more")
    changes: list[str] = []

    def note(name: str, before: str, after: str) -> str:
        if before != after:
            changes.append(name)
        return after

    text = "" if value is None else _decoded(value, changes)
    text = note("control_characters", text, "".join(filter(_is_kept, text)))
    text = note("normalised", text, unicodedata.normalize("NFC", text))
    text = text.removesuffix("\n").removesuffix("\r")  # as text files end: no change worth a word
    text = note("white_space", text, " ".join(text.split()))
    text = note("cut", text, _cut(text, max_chars))
    if not text and not allow_empty:
        found = "is missing" if value is None else "is empty" if not value else "holds no printable text"
        raise CaptionError(f"the caption {found}; write one, or pack with --allow-empty-captions")
    return text, tuple(changes)


def _decoded(value: bytes | str, changes: list[str]) -> str:
    """Text without lone surrogates, which no UTF-8 file can hold."""
    raw = value if isinstance(value, bytes) else value.encode("utf-8", "surrogatepass")
    text = raw.decode("utf-8", "replace")
    if text.encode("utf-8") != raw:
        changes.append("invalid_utf8")
    return text.removeprefix("\ufeff")


def _is_kept(char: str) -> bool:
    return char in _SPACES or char in _KEPT_FORMAT or unicodedata.category(char) not in ("Cc", "Cf")


def _cut(text: str, max_chars: int) -> str:
    if len(text) <= max_chars:
        return text
    # A space right after the limit counts: the word before it is whole.
    boundary = text.rfind(" ", 0, max_chars + 1)
    return text[: boundary if boundary >= max_chars / 2 else max_chars].rstrip()
