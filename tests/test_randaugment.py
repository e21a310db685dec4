"""RandAugment: each operation against Pillow or a formula of its own, at the published magnitudes; what is drawn."""

import collections
import math
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from nfnet_flax.config import ConfigError
from nfnet_flax.data import randaugment as ra
from nfnet_flax.data.mixing_config import RandAugmentConfig

MAGNITUDES = (0.5, 1.0, 1.5)
# fmt: off
NAMES = [
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "Color", "Contrast",
    "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY", "Cutout", "SolarizeAdd",
]
# fmt: on


def images() -> dict[str, np.ndarray]:
    """Noise, a dim gradient, one colour, every colour of a palette, and the smallest shapes."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:120, :150]
    gradient = np.stack([40 + x // 2, 90 + y // 3, 200 - (x + y) // 3], -1) + rng.integers(0, 5, (120, 150, 3))
    shapes = {f"{h}x{w}": (h, w, 3) for h, w in ((1, 1), (1, 9), (9, 1), (2, 2), (3, 2), (37, 53))}
    found = {name: rng.integers(0, 256, shape).astype(np.uint8) for name, shape in shapes.items()}
    return {**found, "gradient": gradient.astype(np.uint8), "one colour": np.full((20, 30, 3), 77, np.uint8)}


IMAGES = images()
each_image = pytest.mark.parametrize("image", IMAGES.values(), ids=IMAGES.keys())


def enhanced(kind: Callable[[Image.Image], ImageEnhance._Enhance], image: np.ndarray, m: float) -> np.ndarray:
    return np.asarray(kind(Image.fromarray(image)).enhance(1.8 * m + 0.1))


PILLOW: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "AutoContrast": lambda image, m: np.asarray(ImageOps.autocontrast(Image.fromarray(image))),
    "Equalize": lambda image, m: np.asarray(ImageOps.equalize(Image.fromarray(image))),
    "Invert": lambda image, m: np.asarray(ImageOps.invert(Image.fromarray(image))),
    "Posterize": lambda image, m: np.asarray(ImageOps.posterize(Image.fromarray(image), {0.5: 2, 1.0: 4, 1.5: 6}[m])),
    "Solarize": lambda image, m: np.asarray(
        ImageOps.solarize(Image.fromarray(image), {0.5: 128, 1.0: 256, 1.5: 384}[m])
    ),
    "Color": lambda image, m: enhanced(ImageEnhance.Color, image, m),
    "Contrast": lambda image, m: enhanced(ImageEnhance.Contrast, image, m),
    "Brightness": lambda image, m: enhanced(ImageEnhance.Brightness, image, m),
    "Sharpness": lambda image, m: enhanced(ImageEnhance.Sharpness, image, m),
}


def test_the_table_is_the_published_one() -> None:
    assert list(ra.OPERATIONS) == NAMES


@each_image
@pytest.mark.parametrize("m", MAGNITUDES)
@pytest.mark.parametrize("name", PILLOW)
def test_an_operation_on_levels_is_pillows(name: str, m: float, image: np.ndarray) -> None:
    got = ra.OPERATIONS[name](image, m, np.random.default_rng(0))
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, PILLOW[name](image, m))


@pytest.mark.parametrize("m", MAGNITUDES)
def test_solarize_add_is_its_formula(m: float) -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    got = ra.OPERATIONS["SolarizeAdd"](levels, m, np.random.default_rng(0))
    addition = {0.5: 55, 1.0: 110, 1.5: 165}[m]
    want = [min(level + addition, 255) if level < 128 else level for level in range(256)]
    assert got[..., 1].ravel().tolist() == want


# Where the pixel (x, y) is taken from, about the centre (cx, cy); and the strength at m = 1.
Source = Callable[[float, float, float, float, float], tuple[float, float]]
GEOMETRIC: dict[str, tuple[float, Source]] = {
    "Rotate": (
        math.radians(30),
        lambda x, y, cx, cy, s: (
            cx + math.cos(s) * (x - cx) - math.sin(s) * (y - cy),
            cy + math.sin(s) * (x - cx) + math.cos(s) * (y - cy),
        ),
    ),
    "ShearX": (0.3, lambda x, y, cx, cy, s: (x + s * y, y)),
    "ShearY": (0.3, lambda x, y, cx, cy, s: (x, y + s * x)),
    "TranslateX": (100.0, lambda x, y, cx, cy, s: (x + s, y)),
    "TranslateY": (100.0, lambda x, y, cx, cy, s: (x, y + s)),
}


def moved(image: np.ndarray, source: Source, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """Pixel by pixel; and which pixels have a single nearest one to 1e-9."""
    height, width = image.shape[:2]
    out, is_clear = np.full_like(image, 128), np.ones((height, width), bool)
    for y, x in np.ndindex(height, width):
        position = source(x, y, (width - 1) / 2, (height - 1) / 2, strength)
        column, row = (math.floor(value + 0.5) for value in position)
        if 0 <= column < width and 0 <= row < height:
            out[y, x] = image[row, column]
        is_clear[y, x] = all(abs((value + 0.5) - round(value + 0.5)) > 1e-9 for value in position)
    return out, is_clear


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (157, 173)])
@pytest.mark.parametrize("m", MAGNITUDES)
@pytest.mark.parametrize("name", GEOMETRIC)
def test_a_geometric_operation_takes_the_nearest_pixel(name: str, m: float, shape: tuple[int, int]) -> None:
    image = np.random.default_rng(1).integers(0, 256, (*shape, 3)).astype(np.uint8)
    strength, source = GEOMETRIC[name]
    seen = set()
    for seed in range(8):
        got = ra.OPERATIONS[name](image, m, np.random.default_rng(seed))
        assert got.shape == image.shape
        for sign in (1, -1):
            want, is_clear = moved(image, source, sign * m * strength)
            assert is_clear.mean() > 0.5
            if np.array_equal(got[is_clear], want[is_clear]):
                seen.add(sign)
                break
        else:
            pytest.fail("neither sign gives this image")
        if len(seen) == 2:
            return
    assert min(shape) == 1, "only one sign was drawn"


@pytest.mark.parametrize("m", MAGNITUDES)
@pytest.mark.parametrize("sign", [1, -1])
def test_geometry_agrees_with_pillow(m: float, sign: int) -> None:
    # Pillow's affine map speaks of corners of pixels, the published code of their centres: half a pixel between them.
    # Pillow also rounds positions to 2^-16, so pixels on the border between two may go either way.
    image = np.random.default_rng(2).integers(0, 256, (97, 131, 3)).astype(np.uint8)
    picture, fill = Image.fromarray(image), (128, 128, 128)
    slope, pixels = sign * 0.3 * m, sign * 100.0 * m

    def affine(*coefficients: float) -> np.ndarray:
        kind, nearest = Image.Transform.AFFINE, Image.Resampling.NEAREST
        return np.asarray(picture.transform(picture.size, kind, coefficients, resample=nearest, fillcolor=fill))

    turned = picture.rotate(sign * 30 * m, resample=Image.Resampling.NEAREST, fillcolor=fill)
    pairs = {
        "Rotate": (ra.rotate(image, sign * 30 * m), np.asarray(turned)),
        "ShearX": (ra.shear_x(image, slope), affine(1, slope, -slope / 2, 0, 1, 0)),
        "ShearY": (ra.shear_y(image, slope), affine(1, 0, 0, slope, 1, -slope / 2)),
        "TranslateX": (ra.translate_x(image, pixels), affine(1, 0, pixels, 0, 1, 0)),
        "TranslateY": (ra.translate_y(image, pixels), affine(1, 0, 0, 0, 1, pixels)),
    }
    for name, (got, want) in pairs.items():
        differing = np.any(got != want, axis=-1)
        strength, source = GEOMETRIC[name]
        for y, x in np.argwhere(differing):
            position = source(x, y, 65, 48, sign * m * strength)
            assert min(abs(value + 0.5 - round(value + 0.5)) for value in position) < 1e-3, (name, x, y)
        assert differing.mean() < 0.11, name


@pytest.mark.parametrize("m", MAGNITUDES)
def test_cutout_is_a_grey_square_about_any_pixel(m: float) -> None:
    image = np.full((200, 230, 3), 10, np.uint8)
    half = {0.5: 20, 1.0: 40, 1.5: 60}[m]
    tops, lefts = set(), set()
    for seed in range(60):
        is_cut = np.all(ra.OPERATIONS["Cutout"](image, m, np.random.default_rng(seed)) == 128, axis=-1)
        rows, columns = np.flatnonzero(is_cut.any(axis=1)), np.flatnonzero(is_cut.any(axis=0))
        assert is_cut.sum() == len(rows) * len(columns)
        assert half <= len(rows) <= 2 * half
        assert half <= len(columns) <= 2 * half
        assert len(rows) == 2 * half or 0 in rows or 199 in rows
        assert len(columns) == 2 * half or 0 in columns or 229 in columns
        tops.add(rows[0])
        lefts.add(columns[0])
    assert len(tops) > 20
    assert len(lefts) > 20
    assert np.all(image == 10)
    assert np.argwhere(ra.cutout(image, 1, (5, 7))[..., 0] == 128).tolist() == [[4, 6], [4, 7], [5, 6], [5, 7]]


def test_directions_and_contrast_by_hand() -> None:
    image = np.zeros((9, 9, 3), np.uint8)
    image[4, 8] = 200  # at three o'clock
    assert np.argwhere(ra.rotate(image, 90)[..., 0] == 200).tolist() == [[0, 4]]
    assert np.argwhere(ra.translate_x(image, 3)[..., 0] == 200).tolist() == [[4, 5]]
    assert np.argwhere(ra.shear_x(image, 0.5)[..., 0] == 200).tolist() == [[4, 6]]
    grey = np.array([[[100, 100, 100], [200, 200, 200]]], np.uint8)
    assert ra.contrast(grey, 0.0)[..., 0].tolist() == [[150, 150]]
    assert ra.contrast(grey, 1.5)[..., 0].tolist() == [[75, 225]]


def test_every_operation_is_drawn_alike() -> None:
    image = np.random.default_rng(3).integers(20, 200, (40, 40, 3)).astype(np.uint8)
    config = RandAugmentConfig(num_layers=1, magnitude=3.0)
    known = {}
    for name, operation in ra.OPERATIONS.items():
        for seed in range(20):
            known[operation(image, 0.3, np.random.default_rng(seed)).tobytes()] = name
    counts: collections.Counter[str] = collections.Counter()
    for seed in range(1600):
        counts[known.get(ra.rand_augment(image, np.random.default_rng(seed), config).tobytes(), "Cutout")] += 1
    assert sorted(counts) == sorted(NAMES)
    assert min(counts.values()) > 60  # 100 are expected, with a deviation of 10
    assert max(counts.values()) < 140


@each_image
@pytest.mark.parametrize("magnitude", [0.0, 5.0, 10.0, 15.0, 30.0])
def test_layers_follow_one_another(image: np.ndarray, magnitude: float) -> None:
    before = image.copy()
    config = RandAugmentConfig(num_layers=4, magnitude=magnitude)
    for seed in range(20):
        got = ra.rand_augment(image, np.random.default_rng(seed), config)
        assert got.shape == image.shape
        assert got.dtype == np.uint8
        assert got.flags.c_contiguous
        assert np.array_equal(got, ra.rand_augment(image, np.random.default_rng(seed), config))
        rng, want = np.random.default_rng(seed), image
        for _ in range(4):
            want = ra.OPERATIONS[NAMES[rng.integers(16)]](want, magnitude / 10, rng)
        assert np.array_equal(got, want)
    assert np.array_equal(image, before)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.randaugment\.num_layers = 0"):
        RandAugmentConfig(num_layers=0)
    with pytest.raises(ConfigError, match=r"data\.randaugment\.magnitude = 31"):
        RandAugmentConfig(magnitude=31)
    with pytest.raises(ConfigError, match="order"):
        RandAugmentConfig(order="before")  # type: ignore[arg-type]
