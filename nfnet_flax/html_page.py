"""What the HTML pages of the package have in common: one file that needs no other file, no network and no script."""

import html
from collections.abc import Iterable

from nfnet_flax import columns

_STYLE = """
:root { color-scheme: light dark; --back: #f4f5f7; --card: #fff; --text: #1c1f24; --soft: #5d6470; --line: #dde0e5;
  --bar: #4a7fd4; --track: #e8ebf0; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --back: #14161a; --card: #1e2127; --text: #e8eaed; --soft: #9aa2af;
  --line: #31363f; --bar: #6f9fe8; --track: #2c313a; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 90rem; padding: 1.2rem; background: var(--back); color: var(--text);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 .4rem; }
header p { margin: .1rem 0; color: var(--soft); overflow-wrap: anywhere; }
"""
# A name that a user chose is shown as text by escaping; this makes sure that the browser would run or load nothing.
_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{title}</h1>
{lines}</header>
"""
END = "</body>\n</html>\n"
"""End of a page."""


def page_head(title: str, lines: Iterable[str], *, style: str) -> str:
    """The beginning of a page, up to its heading.

    Args:
      title: the heading, as plain text.
      lines: plain text below it, a paragraph each.
      style: CSS, after what all pages have.
    """
    paragraphs = "".join(f"<p>{escaped(line)}</p>\n" for line in lines)
    return _HEAD.format(title=escaped(title), style=_STYLE + style, lines=paragraphs)


def escaped(text: str) -> str:
    """A text for HTML, also within an attribute."""
    return html.escape(columns.one_line(text), quote=True)
