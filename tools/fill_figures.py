"""Fills the tables of README.md and docs/*.md below `<!-- figures: NAME -->` from docs/figures/NAME.json.

`python tools/fill_figures.py` after `python tools/bench_....py --json docs/figures/NAME.json`.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


def main() -> None:
    """Writes the pages that change, and prints their names."""
    from tools.figures import filled

    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = path.read_text()
        if (new := filled(text)) != text:
            path.write_text(new)
            print(f"written: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
