"""Tables of figures: what stands in the pages is what stands in docs/figures/."""

import json
import re
from pathlib import Path

import pytest

from tests import documents
from tests.documents import DOCUMENTS
from tests.runs import ROOT
from tools import figures


@pytest.mark.parametrize("document", DOCUMENTS)
def test_tables_are_those_of_the_files(document: str) -> None:
    text = documents.text_of(document)
    assert figures.filled(text) == text, f"{document}: run python tools/fill_figures.py"


def test_every_file_is_shown_once_and_says_how_it_was_made() -> None:
    shown = [found["name"] for document in DOCUMENTS for found in figures.MARKED.finditer(documents.text_of(document))]
    assert sorted(shown) == sorted(path.stem for path in figures.FOLDER.glob("*.json"))
    for name in shown:
        found = figures.read_figures(name)
        quoted = any("{" in str(cell) for row in found["rows"] for cell in row.values())
        assert quoted or re.match(r"python tools/\w+\.py|nfnet claim \w+", found["command"]), (
            f"{name}.json: which command wrote it?"
        )
        is_tool = not quoted and found["command"].startswith("python ")
        assert not is_tool or (ROOT / found["command"].split()[1]).exists()


def test_a_tool_writes_what_a_page_shows(tmp_path: Path) -> None:
    argv = ["/a/folder/tools/bench_step.py", "--json", str(tmp_path / "step.json"), "--model", "nfnet_f0+"]
    figures.write_figures(tmp_path / "step.json", [{"what": "ours", "ms": 2.5}, {"what": "timm", "ms": 5}], argv)
    found = figures.read_figures("step", tmp_path)
    assert found["command"] == "python tools/bench_step.py --model nfnet_f0+"
    assert found["versions"]["jax"]
    (tmp_path / "sum.json").write_text(json.dumps({"rows": [{"who": "both", "x": "{step|ours|ms}, {step|timm|ms}"}]}))
    page = "# Page\n\n<!-- figures: step -->\n| old |\n|---|\n\nText\n\n<!-- figures: sum -->\n"
    assert figures.filled(page, tmp_path) == (
        "# Page\n\n<!-- figures: step -->\n| what | ms |\n|---|---|\n| ours | 2.5 |\n| timm | 5 |\n\nText\n\n"
        "<!-- figures: sum -->\n| who | x |\n|---|---|\n| both | 2.5, 5 |\n"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"command": "x"}, "has the fields"),
        ({"rows": [{"a": 1}], "day": "today"}, "has the fields"),
        ({"rows": [{"a": 1}, {"b": 1}]}, "same headings"),
        ({"rows": [{"a": 1}], "date": "yesterday"}, "isoformat"),
        ({"rows": [{"a": "{wrong|1|b}"}]}, "no such row or heading"),
    ],
)
def test_wrong_files_are_refused(content: dict[str, object], message: str, tmp_path: Path) -> None:
    (tmp_path / "wrong.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        figures.table("wrong", tmp_path)
