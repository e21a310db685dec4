"""What stands in the Markdown files: blocks of commands and code, tables, names of files and fields."""

import dataclasses
import re
from collections.abc import Iterator

from tests.runs import ROOT

DOCUMENTS = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
_BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)\n```$", re.DOTALL | re.MULTILINE
)
_TABLE = re.compile(r"^<!-- table: (?P<file>\S+)(?: (?P<name>\S+))? -->\n(?P<text>(?:\|[^\n]*\n)*)", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Table:
    """A table that a claim made of its evidence, after the comment `<!-- table: FILE NAME -->`."""

    file: str
    """The evidence, as a path in the repository."""
    name: str
    """Which of the claim's tables; empty: its only one."""
    text: str


@dataclasses.dataclass(frozen=True)
class Block:
    """What stands between two lines of three backticks."""

    document: str
    line: int
    """Of the first line of its text, from 1."""
    language: str
    text: str
    mark: str
    """Of the comment in the line before it; empty where there is none."""

    @property
    def place(self) -> str:
        """For messages."""
        return f"{self.document}:{self.line}"

    @property
    def why_not_run(self) -> str | None:
        """The reason that the mark gives."""
        return self.mark.removeprefix("not run: ") if self.mark.startswith("not run: ") else None


def text_of(document: str) -> str:
    """A document as it stands."""
    return (ROOT / document).read_text()


def blocks(document: str) -> list[Block]:
    """All blocks of a document, in their order."""
    text = text_of(document)
    return [
        Block(
            document=document,
            line=text.count("\n", 0, found.start("text")) + 1,
            language=found["language"],
            text=found["text"],
            mark=found["mark"] or "",
        )
        for found in _BLOCK.finditer(text)
    ]


def tables(document: str) -> list[Table]:
    """All tables of a document that are made of evidence, in their order."""
    return [Table(found["file"], found["name"] or "", found["text"]) for found in _TABLE.finditer(text_of(document))]


def commands(block: Block) -> Iterator[str]:
    """The commands of a block of shell lines; one that goes on in the next line is one."""
    for line in block.text.replace("\\\n", " ").splitlines():
        if line.strip():
            yield line


def prose(document: str) -> str:
    """A document without its blocks."""
    return _BLOCK.sub("", text_of(document))


def code_spans(document: str) -> list[str]:
    """Everything that stands between single backticks."""
    return re.findall(r"`([^`]+)`", prose(document))


def exit_codes(document: str) -> dict[int, str]:
    """The table of exit codes: the numbers, and what they mean."""
    rows = text_of(document).partition("code | meaning |")[2].partition("\n\n")[0]
    return {int(code): meaning for code, meaning in re.findall(r"^\| (\d+) \| ([^|]+) \|", rows, re.MULTILINE)}
