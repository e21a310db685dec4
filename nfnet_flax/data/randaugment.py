"""RandAugment's 16 operations on uint8 images, with the magnitudes of the NFNet code.

Each operation does what Pillow's does (`ImageOps`, `ImageEnhance`). Geometric operations follow the published
TensorFlow code: pixels have whole coordinates, the nearest pixel is taken, and pixels from outside the image are grey
(128). Two errors of that code are not repeated: in `contrast` it takes the number of pixels for their mean, and in
`solarize` its comparison wraps thresholds of 256 and more around to 0 and more. OpenCV and NumPy release the
interpreter lock.
"""

import math
from collections.abc import Callable, Mapping

import cv2
import numpy as np

from nfnet_flax.data.mixing_config import RandAugmentConfig

FILL = 128
"""Grey level of pixels from outside the image."""
_LEVELS = np.arange(256)
# Pillow's weights of red, green and blue and its rounding: multiples of 2^-16, so that float32 sums are exact.
_LUMA = np.array([[19595, 38470, 7471, 32768]]) / 65536
_NO_MAP = np.empty(0, np.uint16)
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13


def auto_contrast(image: np.ndarray) -> np.ndarray:
    """Stretches each channel so that its darkest level becomes 0 and its brightest 255."""
    tables = np.empty((1, 256, 3), np.uint8)
    for channel, counts in enumerate(_histograms(image)):
        used = np.flatnonzero(counts)
        low, high = int(used[0]), int(used[-1])
        scale = 255.0 / (high - low) if high > low else 1.0
        offset = -low * scale if high > low else 0.0
        tables[0, :, channel] = _to_uint8(_LEVELS * scale + offset)
    return _look_up(image, tables)


def equalize(image: np.ndarray) -> np.ndarray:
    """Spreads the levels of each channel evenly; a channel with too few pixels or a single level does not change."""
    tables = np.empty((1, 256, 3), np.uint8)
    for channel, counts in enumerate(_histograms(image)):
        brightest = counts[np.flatnonzero(counts)[-1]]
        step = int(counts.sum() - brightest) // 255
        darker = np.cumsum(counts) - counts
        tables[0, :, channel] = np.clip((darker + step // 2) // step, 0, 255) if step else _LEVELS
    return _look_up(image, tables)


def invert(image: np.ndarray) -> np.ndarray:
    """The negative image."""
    return 255 - image


def posterize(image: np.ndarray, num_bits: int) -> np.ndarray:
    """Keeps the `num_bits` highest bits of each level; 8 and more change nothing."""
    return image & np.uint8(256 - (1 << (8 - min(num_bits, 8))))


def solarize(image: np.ndarray, threshold: int) -> np.ndarray:
    """Inverts the levels from `threshold` on; 256 and more change nothing."""
    levels = np.arange(256)
    return _look_up(image, np.where(levels < threshold, levels, 255 - levels).astype(np.uint8))


def solarize_add(image: np.ndarray, addition: int) -> np.ndarray:
    """Adds to the levels below 128."""
    levels = np.arange(256)
    return _look_up(image, np.where(levels < 128, np.clip(levels + addition, 0, 255), levels).astype(np.uint8))


def color(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends with the grey image: factor 0 gives the grey image, 1 the image itself, more than 1 stronger colours."""
    return _blend(cv2.cvtColor(_grey(image), cv2.COLOR_GRAY2RGB), image, factor)


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends with the mean grey level of the image, which Pillow rounds."""
    mean = math.floor(float(np.mean(_grey(image))) + 0.5)
    return _look_up(image, _blend(np.full(256, mean, np.uint8), _LEVELS.astype(np.uint8), factor))


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends with black."""
    return _look_up(image, _blend(np.zeros(256, np.uint8), _LEVELS.astype(np.uint8), factor))


def sharpness(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends with the image smoothed over 3x3 pixels; the outermost pixels are not smoothed."""
    smooth = image.copy()
    smooth[1:-1, 1:-1] = cv2.filter2D(image, -1, _SMOOTH, borderType=cv2.BORDER_REPLICATE)[1:-1, 1:-1]
    return _blend(smooth, image, factor)


def rotate(image: np.ndarray, degrees: float) -> np.ndarray:
    """Rotates about the centre, counter-clockwise."""
    height, width = image.shape[:2]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = (width - 1) / 2, (height - 1) / 2
    return _affine(image, (cos, -sin, x - cos * x + sin * y), (sin, cos, y - sin * x - cos * y))


def shear_x(image: np.ndarray, slope: float) -> np.ndarray:
    """Moves row y to the left by `slope * y` pixels."""
    return _affine(image, (1.0, slope, 0.0), (0.0, 1.0, 0.0))


def shear_y(image: np.ndarray, slope: float) -> np.ndarray:
    """Moves column x upwards by `slope * x` pixels."""
    return _affine(image, (1.0, 0.0, 0.0), (slope, 1.0, 0.0))


def translate_x(image: np.ndarray, pixels: float) -> np.ndarray:
    """Moves the image to the left."""
    return translate_y(image.swapaxes(0, 1), pixels).swapaxes(0, 1)


def translate_y(image: np.ndarray, pixels: float) -> np.ndarray:
    """Moves the image upwards, by the nearest whole number of pixels."""
    shift = math.floor(pixels + 0.5)
    size = max(0, len(image) - abs(shift))
    moved = np.full_like(image, FILL)
    moved[max(0, -shift) :][:size] = image[max(0, shift) :][:size]
    return moved


def cutout(image: np.ndarray, half_size: int, center: tuple[int, int]) -> np.ndarray:
    """Makes a square grey: its side is `2 * half_size` pixels, its centre the pixel `center` (row, column); the image's
    edges cut it off."""
    top, left = (max(0, position - half_size) for position in center)
    cut = image.copy()
    cut[top : center[0] + half_size, left : center[1] + half_size] = FILL
    return cut


def _signed(value: float, rng: np.random.Generator) -> float:
    return value if rng.integers(2) else -value


def _random_cutout(image: np.ndarray, half_size: int, rng: np.random.Generator) -> np.ndarray:
    return cutout(image, half_size, (int(rng.integers(image.shape[0])), int(rng.integers(image.shape[1]))))


OPERATIONS: Mapping[str, Callable[[np.ndarray, float, np.random.Generator], np.ndarray]] = {
    "AutoContrast": lambda image, m, rng: auto_contrast(image),
    "Equalize": lambda image, m, rng: equalize(image),
    "Invert": lambda image, m, rng: invert(image),
    "Rotate": lambda image, m, rng: rotate(image, _signed(30 * m, rng)),
    "Posterize": lambda image, m, rng: posterize(image, int(4 * m)),
    "Solarize": lambda image, m, rng: solarize(image, int(256 * m)),
    "Color": lambda image, m, rng: color(image, 1.8 * m + 0.1),
    "Contrast": lambda image, m, rng: contrast(image, 1.8 * m + 0.1),
    "Brightness": lambda image, m, rng: brightness(image, 1.8 * m + 0.1),
    "Sharpness": lambda image, m, rng: sharpness(image, 1.8 * m + 0.1),
    "ShearX": lambda image, m, rng: shear_x(image, _signed(0.3 * m, rng)),
    "ShearY": lambda image, m, rng: shear_y(image, _signed(0.3 * m, rng)),
    "TranslateX": lambda image, m, rng: translate_x(image, _signed(100 * m, rng)),
    "TranslateY": lambda image, m, rng: translate_y(image, _signed(100 * m, rng)),
    "Cutout": lambda image, m, rng: _random_cutout(image, int(40 * m), rng),
    "SolarizeAdd": lambda image, m, rng: solarize_add(image, int(110 * m)),
}
"""Name -> function of an image, of m = magnitude / 10, and of the random generator for signs and places."""
_DRAWN = tuple(OPERATIONS.values())


def rand_augment(image: np.ndarray, rng: np.random.Generator, config: RandAugmentConfig) -> np.ndarray:
    """Applies `config.num_layers` operations, each drawn uniformly from the 16 (arXiv 1909.13719).

    Args:
      image: (H, W, 3) uint8; it is not changed.
      rng: random generator of this example.
      config: number of operations and their strength.

    Returns:
      (H, W, 3) uint8.
    """
    for _ in range(config.num_layers):
        image = _DRAWN[rng.integers(len(_DRAWN))](image, config.magnitude / 10, rng)
    return np.ascontiguousarray(image)


def _to_uint8(levels: np.ndarray) -> np.ndarray:
    # Drops the fraction, as Pillow and the published code do; works in place.
    return np.clip(levels, 0, 255, out=levels).astype(np.uint8)


def _look_up(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    return cv2.LUT(image, table)


def _histograms(image: np.ndarray) -> np.ndarray:
    """(3, 256) int64 counts of levels; OpenCV counts in float32, which is exact below 2^24 pixels."""
    counts = [cv2.calcHist([image], [channel], None, [256], [0, 256]).ravel() for channel in range(3)]
    return np.stack(counts).astype(np.int64)


def _grey(image: np.ndarray) -> np.ndarray:
    """(H, W) uint8, the same as Pillow's mode L."""
    return cv2.transform(image.astype(np.float32), _LUMA).astype(np.uint8).reshape(image.shape[:2])


def _blend(start: np.ndarray, end: np.ndarray, factor: float) -> np.ndarray:
    """`start + factor * (end - start)` in float32."""
    base = start.astype(np.float32)
    blended = end.astype(np.float32)  # not `end - base`: mixed types and copies take most of the time
    blended -= base
    blended *= np.float32(factor)
    blended += base
    return _to_uint8(blended)


def _affine(image: np.ndarray, x_from: tuple[float, float, float], y_from: tuple[float, float, float]) -> np.ndarray:
    """Pixel (x, y) of the result is the one nearest to `x_from` and `y_from`, each given as (a, b, c) of
    `a * x + b * y + c`."""
    height, width = image.shape[:2]
    # Neither OpenCV's own affine map nor maps in floating point are used, as OpenCV rounds their positions coarsely.
    positions = [
        np.floor(np.add.outer(b * np.arange(height), a * np.arange(width) + (c + 0.5))).astype(np.int16)
        for a, b, c in (x_from, y_from)
    ]
    return cv2.remap(
        image, cv2.merge(positions), _NO_MAP, cv2.INTER_NEAREST, borderMode=cv2.BORDER_CONSTANT, borderValue=(FILL,) * 3
    )
