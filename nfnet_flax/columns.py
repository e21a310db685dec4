"""Aligned columns of text that users choose: names of files and classes may have characters of any width."""

import unicodedata


def width_of(text: str) -> int:
    """Number of columns that a text takes on a terminal: 2 for wide characters such as CJK and emoji, none for marks
    that are combined with the character before them."""
    return sum(map(_width, text))


def one_line(text: str) -> str:
    """A text for people, in one line: line feeds, control characters and other invisible ones become escapes."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode() for char in text
    )


def left(text: str, width: int) -> str:
    """A text with spaces behind it, to a width in columns."""
    return text + " " * (width - width_of(text))


def right(text: str, width: int) -> str:
    """A text with spaces before it, to a width in columns."""
    return " " * (width - width_of(text)) + text


def without_end(text: str, width: int) -> str:
    """A text of at most some width: if it is longer, dots stand for its end."""
    if width_of(text) <= width:
        return text
    return text[: _num_fitting(text, width - 2)] + ".."


def without_start(text: str, width: int) -> str:
    """A text of at most some width: if it is longer, dots stand for its start."""
    if width_of(text) <= width:
        return text
    end = text[len(text) - _num_fitting(text[::-1], width - 3) :]
    first = next((index for index, char in enumerate(end) if _width(char)), len(end))  # marks of what is cut off
    return "..." + end[first:]


def _num_fitting(text: str, width: int) -> int:
    """How many of the first characters fit into a width."""
    for index, char in enumerate(text):
        width -= _width(char)
        if width < 0:
            return index
    return len(text)


def _width(char: str) -> int:
    # Vowels and final consonants of Hangul join the consonant before them, as in names of files that macOS wrote.
    if unicodedata.category(char) in ("Mn", "Me", "Cf") or "\u1160" <= char <= "\u11ff" or "\ud7b0" <= char <= "\ud7ff":
        return 0
    return 2 if unicodedata.east_asian_width(char) in ("W", "F") else 1
