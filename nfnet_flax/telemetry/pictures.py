"""Pictures for TensorBoard, drawn with Pillow: a grid of images with captions, and a confusion matrix.

Matplotlib would need half a second for the names of 100 classes; this takes a tenth of that. Characters that Pillow's
font does not have are drawn as boxes.
"""

import functools
import math
from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

MAX_MATRIX_CLASSES = 100
"""Largest number of classes in a picture of a confusion matrix; the names of more cannot be read."""
_FONT_SIZE = 12
_LINE = 15
"""Height of a line of text, in pixels."""
_GAP = 6
"""Space around and between the parts of a picture, in pixels."""
_MIN_SIDE = 96
"""Smallest side of an image in a grid, in pixels, so that there is room for its caption; smaller ones are magnified."""
_MIN_COLUMNS = 4
"""Smallest number of columns of a grid: TensorBoard magnifies narrow pictures, and letters with them."""
_MAX_NAME_WIDTH = 150
"""Largest width of the name of a class beside a matrix, in pixels."""
_NUMBERED_CLASSES = 20
"""Largest number of classes for which the numbers are written into the cells of a matrix."""
_BAR_WIDTH = 100
"""Width of the bar for an accuracy of 100%, in pixels."""
_WHITE, _BLACK, _GREY = (255, 255, 255), (0, 0, 0), (110, 110, 110)
_DARK_BLUE, _BAR, _BAR_GROUND = (8, 48, 107), (66, 146, 198), (236, 236, 236)


def grid(images: np.ndarray, captions: Sequence[Sequence[str]]) -> np.ndarray:
    """Images of the same size side by side, each with its caption below it.

    The pixels of the images are kept; small images are magnified by a whole number.

    Args:
      images: (N, H, W, 3) uint8.
      captions: the lines of each image's caption. Lines that are too long are cut.

    Returns:
      (height, width, 3) uint8.
    """
    factor = math.ceil(_MIN_SIDE / images.shape[2])
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    count, height, width, _ = images.shape
    num_columns = max(_MIN_COLUMNS, math.ceil(math.sqrt(count)))
    num_rows = math.ceil(count / num_columns)
    num_lines = max(map(len, captions))
    picture = Image.new(
        "RGB",
        (num_columns * (width + _GAP) + _GAP, num_rows * (height + _LINE * num_lines + _GAP) + _GAP),
        _WHITE,
    )
    draw = ImageDraw.Draw(picture)
    for number, (image, lines) in enumerate(zip(images, captions, strict=True)):
        row, column = divmod(number, num_columns)
        x, y = _GAP + column * (width + _GAP), _GAP + row * (height + _LINE * num_lines + _GAP)
        picture.paste(Image.fromarray(image), (x, y))
        for index, line in enumerate(lines):
            draw.text((x, y + height + _LINE * index), _cut(line, width), fill=_BLACK, font=_font())
    return np.asarray(picture)


def thumbnails(images: np.ndarray, side: int) -> np.ndarray:
    """Images whose sides are at most `side` pixels: larger ones are reduced. (N, H, W, 3) uint8."""
    if max(images.shape[1:3]) <= side:
        return images
    return np.stack([cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA) for image in images])


def confusion_matrix(counts: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """A confusion matrix with the accuracy of each class beside it.

    Args:
      counts: (C, C) or (C, C + 1): number of examples of each class (rows) for which each class was predicted
        (columns). The last of C + 1 columns stands for whatever is none of the classes.
      names: the names of the C classes, at most `MAX_MATRIX_CLASSES`.

    Returns:
      (height, width, 3) uint8.
    """
    num_rows, num_columns = counts.shape
    is_numbered = num_rows <= _NUMBERED_CLASSES
    side = 30 if is_numbered else max(_LINE - 3, 600 // num_rows)
    columns = [_cut(name, _MAX_NAME_WIDTH) for name in [*names, "(none of them)"][:num_columns]]
    totals = counts.sum(axis=1)
    shares = counts / np.maximum(totals, 1)[:, None]
    left = top = 3 * _GAP + _LINE + math.ceil(max(map(_width, columns)))
    bars = left + side * num_columns + 2 * _GAP
    size = (bars + _BAR_WIDTH + _GAP + _text_room(totals), top + side * num_rows + _GAP)
    picture = Image.new("RGB", size, _WHITE)
    draw = ImageDraw.Draw(picture)
    picture.paste(_cells(shares, side), (left, top))
    _write_up(picture, "true class", _GAP, top + side * num_rows // 2, fill=_GREY, centered=True)
    draw.text((left + side * num_columns / 2, _GAP), "predicted class", fill=_GREY, font=_font(), anchor="ma")
    draw.text((bars, top - _GAP), "accuracy (images)", fill=_GREY, font=_font(), anchor="ls")
    for column, name in enumerate(columns):
        _write_up(picture, name, left + side * column + (side - _LINE) // 2, top - _GAP)
    for row in range(num_rows):
        middle = top + side * row + side / 2
        draw.text((left - _GAP, middle), columns[row], fill=_BLACK, font=_font(), anchor="rm")
        if is_numbered:
            _number_cells(draw, counts[row], shares[row], left, middle, side)
        if totals[row]:
            bar = [bars, middle - side // 2 + 2, bars + _BAR_WIDTH, middle + side // 2 - 2]
            draw.rectangle(bar, fill=_BAR_GROUND)
            draw.rectangle([*bar[:2], bars + _BAR_WIDTH * shares[row, row], bar[3]], fill=_BAR)
            text = _accuracy_text(shares[row, row], totals[row])
            draw.text((bars + _BAR_WIDTH + _GAP, middle), text, fill=_BLACK, font=_font(), anchor="lm")
    return np.asarray(picture)


def _cells(shares: np.ndarray, side: int) -> Image.Image:
    """The cells of a matrix, white for none and dark blue for all, with lines between them."""
    # The square root makes rare confusions visible.
    depth = np.sqrt(shares)[:, :, None]
    colours = (np.array(_WHITE) * (1 - depth) + np.array(_DARK_BLUE) * depth).astype(np.uint8)
    cells = colours.repeat(side, axis=0).repeat(side, axis=1)
    cells[::side] = cells[:, ::side] = 225
    return Image.fromarray(cells)


def _number_cells(
    draw: ImageDraw.ImageDraw, counts: np.ndarray, shares: np.ndarray, left: int, middle: float, side: int
) -> None:
    for column in np.flatnonzero(counts):
        text = str(counts[column]) if counts[column] < 10_000 else f"{shares[column]:.0%}"
        fill = _WHITE if shares[column] > 0.25 else _BLACK
        draw.text((left + side * column + side / 2, middle), text, fill=fill, font=_font(), anchor="mm")


def _accuracy_text(share: float, total: int) -> str:
    return f"{share:.1%} ({total})"


def _text_room(totals: np.ndarray) -> int:
    return math.ceil(_width(_accuracy_text(1.0, totals.max(initial=0)))) + _GAP


def _write_up(
    picture: Image.Image,
    text: str,
    x: int,
    y: int,
    *,
    fill: tuple[int, int, int] = _BLACK,
    centered: bool = False,
) -> None:
    """Writes from below to above; the text begins at `y`, or has its middle there."""
    line = Image.new("RGB", (math.ceil(_width(text)) + 1, _LINE), _WHITE)
    ImageDraw.Draw(line).text((0, 0), text, fill=fill, font=_font())
    line = line.transpose(Image.Transpose.ROTATE_90)
    picture.paste(line, (x, y - (line.height // 2 if centered else line.height)))


@functools.cache
def _font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(_FONT_SIZE)


def _width(text: str) -> float:
    return _font().getlength(text)


def _cut(text: str, width: int) -> str:
    """A text that is at most `width` pixels wide: dots stand for its end if it is longer."""
    if _width(text) <= width:
        return text
    fitting = next((length for length in range(len(text), 0, -1) if _width(f"{text[:length]}..") <= width), 0)
    return f"{text[:fitting]}.."
