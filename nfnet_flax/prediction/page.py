"""Results as one HTML page that needs no other file and no network."""

import base64
from typing import TextIO

from nfnet_flax.html_page import END, escaped, page_head
from nfnet_flax.prediction.images import Unreadable
from nfnet_flax.prediction.predictor import Prediction, Predictor
from nfnet_flax.prediction.results import Counts, TargetFile, Writer

THUMBNAIL_PX = 160
"""Longer side of the thumbnails, in pixels."""

# What is written last, the counts, is shown first: the order of the parts of the page is set by the style.
_STYLE = """
body { display: flex; flex-direction: column; }
header { order: 0; } footer { order: 1; } .choice { order: 2; } main { order: 3; }
footer p { overflow-wrap: anywhere; font-weight: 600; margin: .5rem 0 .1rem; }
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


class Page(Writer):
    """A card for each image: a thumbnail, the file's name, and a bar for each of the most probable classes."""

    def __init__(self, out: TextIO | TargetFile, top: int, predictor: Predictor) -> None:
        self._out, self._top = out, top
        self._out.write(page_head("Predictions", described(predictor), style=_STYLE) + "<main>\n")

    def write(self, result: Prediction | Unreadable) -> None:
        name = escaped(result.source)
        if isinstance(result, Unreadable):
            self._out.write(
                f'<article class="bad"><figure aria-hidden="true">!</figure><div><h2>{name}</h2>'
                f"<p>{escaped(result.reason)}</p></div></article>\n"
            )
            return
        image = ""
        if result.thumbnail is not None:
            data = base64.b64encode(result.thumbnail).decode()
            image = f'<img loading="lazy" decoding="async" alt="" src="data:image/jpeg;base64,{data}">'
        rows = "".join(
            f'<li><span title="{escaped(label)}">{escaped(label)}</span><b>{value:.2%}</b>'
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
        self._out.write(f"</main>\n{choice}<footer><p>{text}</p></footer>\n{END}")


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
