"""What the names of shards say: their split, and their number in a series of which none may be missing."""

import re
from collections.abc import Sequence
from pathlib import Path

from nfnet_flax.config import ConfigError
from nfnet_flax.units import shown

_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
    "eval": "eval",
}
"""Words in the names of files that say the split -> the split."""
_WORDS = re.compile(r"[a-z]+")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MAX_FILES = 1_000_000
_NUMBER_OF = re.compile(r"(?P<head>.*)-(?P<number>\d+)-of-(?P<count>\d+)(?P<tail>\D.*|)")
_NUMBER = re.compile(r"(?P<head>.*?)(?P<number>\d+)(?P<tail>\D*)")


def split_word(name: str, wanted: str = "") -> str | None:
    """The word in the name of a file that says its split, in lower case: the last one of those that usually do and of
    `wanted`; None if there is none."""
    wanted, stem = wanted.lower(), Path(name).name.lower()
    stem = stem[: stem.rindex(".")] if "." in stem else stem
    found = [(match.start(), match[0]) for match in _WORDS.finditer(stem) if match[0] in _SPLITS]
    if wanted:
        alone = rf"(?<![a-z]){re.escape(wanted)}(?![a-z])"
        found += [(match.start(), wanted) for match in re.finditer(alone, stem)]
    return max(found)[1] if found else None


def check_one_split(said: str, shards: Sequence[str]) -> None:
    """Raises ConfigError if the names of shards that one entry finds say that they are of several splits."""
    words = {shard: split_word(shard) for shard in shards}
    examples: dict[str, str] = {}
    for shard, word in words.items():
        if word is not None:
            examples.setdefault(_SPLITS[word], Path(shard).name)
    if len(examples) > 1:
        raise ConfigError(
            f"{said}: finds files of several splits, such as {', '.join(map(repr, examples.values()))}: give a pattern "
            "that finds those of one split"
        )


def expand_braces(said: str, pattern: str) -> list[str]:
    """The patterns that one with braces stands for: `{0000..1023}` are numbers of that width, `{a,b}` alternatives.

    Raises:
      ConfigError: the braces have another form, or stand for more than a million files.
    """
    found = _BRACES.search(pattern)
    if found is None:
        return [pattern]
    if numbers := _RANGE.fullmatch(found[1]):
        first, last = int(numbers[1]), int(numbers[2])
        width = len(numbers[1])
        if not 0 <= last - first < _MAX_FILES:
            raise ConfigError(f"{said}: {found[0]} must count upwards, and to at most {_MAX_FILES:,} files")
        parts = [f"{number:0{width}d}" for number in range(first, last + 1)]
    elif "," in found[1]:
        parts = found[1].split(",")
    else:
        raise ConfigError(f"{said}: {found[0]} must be numbers such as {{0000..1023}}, or alternatives such as {{a,b}}")
    before, after = pattern[: found.start()], pattern[found.end() :]
    rest = expand_braces(said, after)
    return [f"{before}{part}{end}" for part in parts for end in rest]


def check_series(said: str, shards: Sequence[str]) -> None:
    """Raises ConfigError if a number is missing in a series of shards, or is there twice.

    Series are `NAME-00003-of-00010`, and names that differ only in their last number and begin with 0 or 1 or have
    leading zeros.
    """
    counted: dict[tuple[str, str], list[tuple[str, str]]] = {}
    numbered: dict[tuple[str, str, str], list[tuple[str, str]]] = {}
    for shard in shards:
        folder, stem = str(Path(shard).parent), Path(shard).stem
        if found := _NUMBER_OF.fullmatch(stem):
            text = f"{found['number']}-of-{found['count']}"
            counted.setdefault((folder, found["head"]), []).append((text, shard))
        elif found := _NUMBER.fullmatch(stem):
            numbered.setdefault((folder, found["head"], found["tail"]), []).append((found["number"], shard))
    for members in counted.values():
        _check_counted(said, members)
    for members in numbered.values():
        _check_numbered(said, members)


def _check_counted(said: str, members: Sequence[tuple[str, str]]) -> None:
    """Checks shards that are named `...-00003-of-00010`."""
    counts = {number.partition("-of-")[2] for number, _ in members}
    if len(counts) > 1:
        names = [Path(next(shard for number, shard in members if number.endswith(f"-of-{c}"))).name for c in counts]
        raise ConfigError(
            f"{said}: finds files of several versions of a set, {shown(sorted(names))}: remove those of one of them"
        )
    numbers: dict[int, str] = {}
    for text, shard in members:
        number = int(text.partition("-of-")[0])
        if number in numbers:
            raise ConfigError(
                f"{said}: {numbers[number]!r} and {shard!r} have the same number: remove the one that is of another "
                "version of the set"
            )
        numbers[number] = shard
    wanted = int(counts.pop())
    _refuse_missing(said, sorted(set(range(wanted)) - numbers.keys()), members, wanted)


def _check_numbered(said: str, members: Sequence[tuple[str, str]]) -> None:
    """Checks shards whose names differ only in a number."""
    numbers = {int(text) for text, _ in members}
    has_zeros = any(len(text) > 1 and text[0] == "0" for text, _ in members)
    if not has_zeros and (len(members) == 1 or min(numbers) > 1):
        return  # a year or a number of classes rather than that of a shard
    first = min(1, min(numbers))
    missing = sorted(set(range(first, max(numbers))) - numbers)
    _refuse_missing(said, missing, members, max(numbers) + 1 - first)


def _refuse_missing(said: str, missing: Sequence[int], members: Sequence[tuple[str, str]], wanted: int) -> None:
    if missing:
        name = Path(members[0][1]).name
        raise ConfigError(
            f"{said}: {len(missing)} of the {wanted} files of the series of {name!r} are missing, such as number "
            f"{missing[0]}: copy them, or name the files of a part one by one, or by {{0000..1023}}"
        )
