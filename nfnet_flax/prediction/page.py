"""Results as one HTML page that needs no other file and no network."""

import base64
import html
from typing import TextIO

from nfnet_flax.prediction.images import Unreadable
from nfnet_flax.prediction.predictor import Prediction, Predictor
from nfnet_flax.prediction.results import Counts, TargetFile, Writer, shown

THUMBNAIL_PX = 160
"""Longer side of the thumbnails, in pixels."""

# What is written last, the counts, is shown first: the order of the parts of the page is set by the style.
_STYLE = """
:root { color-scheme: light dark; --back: #f4f5f7; --card: #fff; --text: #1c1f24; --soft: #5d6470; --line: #dde0e5;
  --bar: #4a7fd4; --track: #e8ebf0; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --back: #14161a; --card: #1e2127; --text: #e8eaed; --soft: #9aa2af;
  --line: #31363f; --bar: #6f9fe8; --track: #2c313a; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 90rem; padding: 1.2rem; display: flex; flex-direction: column;
  background: var(--back); color: var(--text); font: 15px/1.45 system-ui, sans-serif; }
header { order: 0; } footer { order: 1; } .choice { order: 2; } main { order: 3; }
h1 { font-size: 1.4rem; margin: 0 0 .4rem; }
header p, footer p { margin: .1rem 0; color: var(--soft); overflow-wrap: anywhere; }
footer p { color: var(--text); font-weight: 600; margin-top: .5rem; }
.choice { margin: .5rem 0 1rem; color: var(--soft); }
main { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); }
article { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .7rem; display: flex;
  gap: .8rem; min-width: 0; content-visibility: auto; contain-intrinsic-size: auto 11rem; }
figure { margin: 0; flex: 0 0 7.5rem; height: 7.5rem; background: var(--track); border-radius: 6px; display: flex;
  align-items: center; justify-content: center; overflow: hidden; color: var(--bad); font-size: 2rem; }
figure img { width: 100%; height: 100%; object-fit: contain; }
article > div { flex: 1; min-width: 0; }
h2 { font-size: .85rem; font-weight: 600; margin: 0 0 .35rem; overflow-wrap: anywhere; }
ol { list-style: none; margin: 0; padding: 0; font-size: .85rem; }
li { display: grid; grid-template-columns: minmax(0, 1fr) auto; column-gap: .6rem; margin-bottom: .4rem; }
li span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
li b { font-weight: 400; color: var(--soft); font-variant-numeric: tabular-nums; }
li:first-child span { font-weight: 600; }
li i { grid-column: 1 / -1; height: 5px; border-radius: 3px; background: var(--track); overflow: hidden; }
li i u { display: block; height: 100%; background: var(--bar); }
.bad { border-color: var(--bad); } .bad p { margin: 0; color: var(--bad); overflow-wrap: anywhere; font-size: .85rem; }
body:has(#only:checked) article:not(.bad) { display: none; }
"""
_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Predictions</title>
<style>{style}</style>
</head>
<body>
<header><h1>Predictions</h1>
{lines}</header>
<main>
"""


class Page(Writer):
    """A card for each image: a thumbnail, the file's name, and a bar for each of the most probable classes."""

    def __init__(self, out: TextIO | TargetFile, top: int, predictor: Predictor) -> None:
        self._out, self._top = out, top
        lines = "".join(f"<p>{_text(line)}</p>\n" for line in described(predictor))
        self._out.write(_HEAD.format(style=_STYLE, lines=lines))

    def write(self, result: Prediction | Unreadable) -> None:
        name = _text(result.source)
        if isinstance(result, Unreadable):
            self._out.write(
                f'<article class="bad"><figure aria-hidden="true">!</figure><div><h2>{name}</h2>'
                f"<p>{_text(result.reason)}</p></div></article>\n"
            )
            return
        image = ""
        if result.thumbnail is not None:
            data = base64.b64encode(result.thumbnail).decode()
            image = f'<img loading="lazy" decoding="async" alt="" src="data:image/jpeg;base64,{data}">'
        rows = "".join(
            f'<li><span title="{_text(label)}">{_text(label)}</span><b>{value:.2%}</b>'
            f'<i><u style="width:{100 * value:.2f}%"></u></i></li>'
            for label, value in result.top(self._top)
        )
        self._out.write(f"<article><figure>{image}</figure><div><h2>{name}</h2><ol>{rows}</ol></div></article>\n")

    def finish(self, counts: Counts) -> None:
        text = f"{counts.good:,} image{'' if counts.good == 1 else 's'} with a prediction"
        choice = ""
        if counts.failed:
            text += f", {counts.failed:,} without one"
            box = '<input type="checkbox" id="only">'
            choice = f'<label class="choice">{box} Show only images without a prediction</label>\n'
        self._out.write(f"</main>\n{choice}<footer><p>{text}</p></footer>\n</body>\n</html>\n")


def described(predictor: Predictor) -> tuple[str, str]:
    """Where the weights come from, and how images become probabilities, in one line each."""
    how = predictor.preprocessing
    margin = f", {how.crop_margin} px cut off after resizing" if how.crop_margin else ""
    shape = "aspect kept" if how.keeps_aspect else "resized to a square"
    mean, std = (" ".join(f"{value:g}" for value in values) for values in (how.mean, how.std))
    return (
        f"weights: {predictor.source}",
        f"{len(predictor.names):,} classes, {predictor.activation}; images of {how.image_size} px, {shape}{margin}, "
        f"{how.resampler}, mean {mean}, std {std}",
    )


def _text(text: str) -> str:
    """A text for HTML, also within an attribute."""
    return html.escape(shown(text), quote=True)
