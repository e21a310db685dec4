"""The notebook of the documentation runs from its first to its last cell, and is stored without what a run added."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.runs import ROOT

NOTEBOOK = ROOT / "docs" / "notebooks" / "first_steps.ipynb"
MADE = (
    "run/metrics.jsonl",
    "run/checkpoints/120",
    "curve.png",
    "weights.safetensors",
    "photos/zero",
    "photos_run/best",
)
"""Files and folders that the notebook says it makes, in the folder `first_steps`."""


def notebook() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(NOTEBOOK.read_text())
    return found


def sources(kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in notebook()["cells"] if cell["cell_type"] == kind]


def test_it_runs_from_top_to_bottom(tmp_path: Path) -> None:
    cells = sources("code")
    assert not [line for cell in cells for line in cell.splitlines() if re.match(r"\s*[%!]", line)], "no plain Python"
    (tmp_path / "cells.py").write_text("\n\n".join(cells))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "MPLBACKEND": "agg"}
    done = subprocess.run(
        [sys.executable, "cells.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    missing = [name for name in MADE if not (tmp_path / "first_steps" / name).exists()]
    assert not missing, f"{missing}\n{done.stdout}\n{done.stderr}"
    stopped, finished = re.findall(r"^finished: (\w+), at step (\d+) of 120$", done.stdout, re.MULTILINE)
    assert stopped[0] == "False"
    assert 50 <= int(stopped[1]) < 120
    assert finished == ("True", "120")
    top1 = re.search(r"^eval_ema/top1 +([\d.]+)$", done.stdout, re.MULTILINE)
    assert top1, done.stdout
    assert float(top1[1]) > 0.5  # a tenth would be chance
    assert len(re.findall(r"^is \d, predicted \d: [\d.]+, ", done.stdout, re.MULTILINE)) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cells.py", "first_steps"]


def test_nothing_of_a_run_is_stored() -> None:
    found = notebook()
    for cell in found["cells"]:
        assert cell["metadata"] == {}
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None
    assert [cell["id"] for cell in found["cells"]] == [f"cell-{n:02d}" for n in range(1, len(found["cells"]) + 1)]
    assert found["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python", "version": "3"},
    }
    assert NOTEBOOK.read_text() == json.dumps(found, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def test_the_first_cell_says_how_to_install_it() -> None:
    first = sources("code")[0]
    assert re.search(r"^# .*pip install", first, re.MULTILINE)
    assert not re.search(r"^[^#\n]*pip install", first, re.MULTILINE)
    named = {extra for extras in re.findall(r"\.\[([\w,]+)\]", first) for extra in extras.split(",")}
    known = re.findall(r"^([\w-]+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert named <= set(known)
