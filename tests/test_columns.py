"""Aligned columns: how wide a text is on a terminal, and where it is cut."""

import pytest

from nfnet_flax import columns

DOG = "\U0001f436"
DECOMPOSED = "\u1112\u1161\u11ab"  # one syllable of Hangul, as macOS writes it in names of files


@pytest.mark.parametrize(
    ("text", "width"),
    [
        ("", 0),
        ("cat", 3),
        ("é", 1),
        ("e\u0301", 1),
        ("猫", 2),
        ("\uff76", 1),  # a kana of half width
        ("\uff21", 2),  # an A of full width
        (DOG, 2),
        ("ก้", 1),  # a tone mark above a consonant of Thai
        ("한", 2),
        (DECOMPOSED, 2),
        ("a\u20dd", 1),  # a circle around a letter
    ],
)
def test_width(text: str, width: int) -> None:
    assert columns.width_of(text) == width
    assert columns.left(text, 4) == text + " " * (4 - width)
    assert columns.right(text, 4) == " " * (4 - width) + text
    assert columns.left(text, width - 1) == columns.right(text, width - 1) == text


@pytest.mark.parametrize(
    ("text", "end", "start"),
    [
        ("12345", "12345", "12345"),
        ("123456", "123..", "...56"),
        ("猫猫猫", "猫..", "...猫"),
        ("1猫23猫", "1猫..", "...猫"),
        ("e\u0301" * 5, "e\u0301" * 5, "e\u0301" * 5),
        ("e\u0301" * 6, "e\u0301" * 3 + "..", "..." + "e\u0301" * 2),
        (DECOMPOSED * 3, DECOMPOSED + "..", "..." + DECOMPOSED),
        ("1234猫5", "123..", "...5"),
    ],
)
def test_a_long_text_is_cut_between_characters(text: str, end: str, start: str) -> None:
    assert columns.without_end(text, 5) == end
    assert columns.without_start(text, 5) == start
