"""Crops, flips and resizing: distributions over many draws, pixels against exact averages and Pillow."""

import io
import subprocess
import sys

import cv2
import numpy as np
import pytest
from PIL import Image

from nfnet_flax.config import ConfigError
from nfnet_flax.data.augment_config import AffineAugment, CropAugment, Resampler
from nfnet_flax.data.transforms import eval_crop, random_affine, random_crop, resize, sample_crop

RESAMPLERS: tuple[Resampler, ...] = ("area_cubic", "pillow_bicubic")


def smooth(height: int, width: int) -> np.ndarray:
    """An image without fine detail: any correct resampling of it agrees with any other."""
    y, x = (np.arange(length) / length for length in (height, width))
    channels = [np.sin(3 * x + 2 * y[:, None]), np.cos(4 * y[:, None] - x), np.sin(5 * x * y[:, None])]
    return np.stack([127 + 90 * channel for channel in channels], axis=-1).round().astype(np.uint8)


def jpeg(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def far(a: np.ndarray, b: np.ndarray) -> float:
    """Mean absolute difference in grey levels."""
    assert a.shape == b.shape
    return float(np.abs(a.astype(float) - b).mean())


def distance_to_uniform(draws: np.ndarray) -> float:
    """Kolmogorov and Smirnov's: above 1.95 / sqrt(n) in one of a thousand samples of a uniform variable."""
    ordered = np.sort(draws)
    return float(np.abs(ordered - (np.arange(len(draws)) + 0.5) / len(draws)).max() + 0.5 / len(draws))


def test_crops_have_the_published_distribution() -> None:
    height, width, count = 3000, 4000, 10_000  # large, so that whole pixels do not matter
    rng = np.random.default_rng(0)
    crops = np.array([sample_crop(height, width, rng, image_size=224, config=CropAugment()) for _ in range(count)])
    top, left, rows, columns = crops.T
    aspect, area = columns / rows, rows * columns / (height * width)
    assert 0.08 <= area.min() < 0.085
    assert 0.98 < area.max() <= 1
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + rows <= height).all()
    assert (left + columns <= width).all()
    limit = 1.95 / np.sqrt(count)
    assert distance_to_uniform((aspect - 3 / 4) / (4 / 3 - 3 / 4)) < limit
    # Given the aspect, the height is uniform from area 0.08 up to the full area or the first side that is full.
    smallest = np.sqrt(0.08 * height * width / aspect)
    largest = np.minimum(np.sqrt(height * width / aspect), np.minimum(width / aspect, height))
    assert distance_to_uniform((rows - smallest) / (largest - smallest)) < limit + 1e-3
    assert distance_to_uniform((top + rng.random(count)) / (height - rows + 1)) < limit
    assert distance_to_uniform((left + rng.random(count)) / (width - columns + 1)) < limit


def test_an_impossible_crop_is_the_centred_square() -> None:
    # 224 / (224 + 32) of the shorter side: no rectangle of a permitted aspect has 8% of so long an image.
    for height, width in ((4000, 100), (100, 4000)):
        top, left, rows, columns = sample_crop(
            height, width, np.random.default_rng(0), image_size=224, config=CropAugment()
        )
        assert (rows, columns) == (87, 87)
        assert (top, left) == ((height - 86) // 2, (width - 86) // 2)  # odd: one more before than after


def test_half_of_the_images_are_mirrored() -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    image[:, 4:] = 200  # bright on the right
    whole = CropAugment(min_area=1.0, min_aspect=1.0, max_aspect=1.0)
    rng = np.random.default_rng(0)
    crops = [random_crop(image, rng, image_size=8, config=whole) for _ in range(400)]
    mirrored = sum(bool(np.array_equal(crop, image[:, ::-1])) for crop in crops)
    assert sum(bool(np.array_equal(crop, image)) for crop in crops) + mirrored == 400
    assert 160 < mirrored < 240  # four standard deviations
    never = CropAugment(min_area=1.0, min_aspect=1.0, max_aspect=1.0, flip=False)
    assert all(np.array_equal(random_crop(image, rng, image_size=8, config=never), image) for _ in range(20))


@pytest.mark.parametrize("resampler", RESAMPLERS)
def test_a_file_is_cropped_like_its_pixels(resampler: Resampler) -> None:
    image = smooth(100, 140)
    file = jpeg(image)
    decoded = np.asarray(Image.open(io.BytesIO(file)))
    config = CropAugment(resampler=resampler)
    for seed in range(20):
        from_file, from_pixels = (
            random_crop(given, np.random.default_rng(seed), image_size=40, config=config) for given in (file, decoded)
        )
        assert from_file.dtype == np.uint8
        # Twice as large as the output or more, the file is decoded at half size.
        assert far(from_file, from_pixels) < (0.6 if resampler == "area_cubic" else 1e-9)


def test_a_large_jpeg_is_decoded_at_a_scale_that_is_exact_enough() -> None:
    image = smooth(1200, 1600)
    rng = np.random.default_rng(0)
    for _ in range(80):  # rectangles: edges at every scale
        y, x = rng.integers(1100), rng.integers(1500)
        image[y : y + rng.integers(4, 200), x : x + rng.integers(4, 200)] = rng.integers(0, 256, 3)
    file = jpeg(image)
    pixels = np.asarray(Image.open(io.BytesIO(file)))
    for image_size, tolerance in ((64, 1.6), (224, 0.6)):  # at an eighth; at a quarter and a half
        scaled, full = (
            [
                random_crop(given, np.random.default_rng(s), image_size=image_size, config=CropAugment())
                for s in range(6)
            ]
            for given in (file, pixels)
        )
        assert 0 < far(np.stack(scaled), np.stack(full)) < tolerance


@pytest.mark.parametrize("resampler", RESAMPLERS)
@pytest.mark.parametrize(
    "size", [(300, 400), (250, 230), (700, 900), (90, 120), (90, 400), (400, 90), (224, 224)], ids=str
)
def test_a_smooth_image_survives_resizing(size: tuple[int, int], resampler: Resampler) -> None:
    # Down, up, and one axis each way: what comes out is the same function on a coarser or finer grid.
    y, x = ((np.arange(224) + 0.5) / 224 for _ in range(2))
    wanted = 127 + 90 * np.sin(3 * x + 2 * y[:, None])
    source_y, source_x = ((np.arange(length) + 0.5) / length for length in size)
    source = np.repeat(np.round(127 + 90 * np.sin(3 * source_x + 2 * source_y[:, None]))[..., None], 3, axis=2)
    resized = resize(source.astype(np.uint8), 224, 224, resampler)
    assert resized.shape == (224, 224, 3)
    assert np.abs(resized - wanted[..., None]).max() < 3
    assert abs((resized - wanted[..., None]).mean()) < 0.05


@pytest.mark.parametrize("resampler", RESAMPLERS)
@pytest.mark.parametrize("size", [(400, 400), (150, 400), (400, 150), (1500, 300)], ids=str)
def test_noise_is_averaged_on_the_way_down(size: tuple[int, int], resampler: Resampler) -> None:
    # Where an axis shrinks by s, a pixel averages s of the source's: noise shrinks with it. Without antialiasing, as
    # OpenCV's own when the other axis grows, it would not.
    source = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    resized = resize(source, 200, 200, resampler)
    shrink = np.prod([max(length / 200, 1) for length in size])
    assert resized.std() < 1.15 * source.std() / np.sqrt(shrink)
    assert abs(resized.mean() - source.mean()) < 0.2


def test_whole_factors_are_exact_averages() -> None:
    source = np.random.default_rng(0).integers(0, 256, (96, 120, 3), np.uint8)
    exact = source.reshape(24, 4, 24, 5, 3).mean(axis=(1, 3))
    assert np.abs(resize(source, 24, 24, "area_cubic") - exact).max() <= 0.5001


def test_evaluation_takes_the_centre_of_the_resized_image() -> None:
    image = smooth(300, 200)
    wanted = np.asarray(Image.fromarray(image).resize((256, 256), Image.Resampling.BICUBIC))[16:240, 16:240]
    assert np.array_equal(
        eval_crop(image, image_size=224, margin=32, resampler="pillow_bicubic", keeps_aspect=False), wanted
    )
    assert far(eval_crop(image, image_size=224, margin=32, resampler="area_cubic", keeps_aspect=False), wanted) < 0.6
    file = jpeg(image)
    decoded = np.asarray(Image.open(io.BytesIO(file)))
    for resampler in RESAMPLERS:
        crops = [
            eval_crop(given, image_size=64, margin=0, resampler=resampler, keeps_aspect=False)
            for given in (file, decoded)
        ]
        assert np.array_equal(crops[0], crops[1])


@pytest.mark.parametrize("method", ["BICUBIC", "BILINEAR"])
@pytest.mark.parametrize(("height", "width"), [(300, 200), (97, 131), (64, 64), (40, 400)])
def test_the_shorter_side_is_resized_as_timm_does_it(height: int, width: int, method: str) -> None:
    image = smooth(height, width)
    size, side = 48, 53
    longer = int(side * max(height, width) / min(height, width))
    shape = (side, longer) if height < width else (longer, side)
    whole = Image.fromarray(image).resize((shape[1], shape[0]), Image.Resampling[method])
    top, left = (round((length - size) / 2.0) for length in shape)
    wanted = np.asarray(whole)[top : top + size, left : left + size]
    resampler: Resampler = "pillow_bicubic" if method == "BICUBIC" else "pillow_bilinear"
    got = eval_crop(image, image_size=size, margin=side - size, resampler=resampler, keeps_aspect=True)
    assert np.array_equal(got, wanted)


def test_the_middle_of_a_very_long_image_is_resized() -> None:
    image = np.broadcast_to(smooth(1, 65_500), (1, 65_500, 3))
    got = eval_crop(image, image_size=256, margin=0, resampler="area_cubic", keeps_aspect=True)
    assert got.shape == (256, 256, 3)
    assert far(got, np.broadcast_to(image[:, 32_750], got.shape)) < 3


@pytest.mark.parametrize("resampler", RESAMPLERS)
@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2, 7)], ids=str)
def test_images_of_one_pixel_across(size: tuple[int, int], resampler: Resampler) -> None:
    image = np.full((*size, 3), 93, np.uint8)
    for given in (image, jpeg(image)):
        config = CropAugment(resampler=resampler)
        crop = random_crop(given, np.random.default_rng(0), image_size=32, config=config)
        centre = eval_crop(given, image_size=32, margin=4, resampler=resampler, keeps_aspect=False)
        assert crop.shape == centre.shape == (32, 32, 3)
        assert set(np.unique(crop)) == set(np.unique(centre)) == {93}


def test_opencv_adds_no_threads_in_any_process_that_transforms() -> None:
    code = "import nfnet_flax.data.transforms, cv2; print(cv2.getNumThreads(), cv2.ocl.useOpenCL())"
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert printed.split() == ["1", "False"]
    assert cv2.getNumThreads() == 1


def test_affine_moves_by_what_was_drawn() -> None:
    image = np.zeros((9, 9, 3), np.uint8)
    image[4, 4] = 200

    def brightest(**settings: float) -> tuple[int, ...]:
        config = AffineAugment(**{"max_degrees": 0.0, "max_scale": 0.0, "max_shift": 0.0, **settings})
        moved = random_affine(image, np.random.default_rng(0), config)
        return tuple(int(place) for place in np.unravel_index(np.argmax(moved[..., 0]), (9, 9)))

    still = AffineAugment(max_degrees=0, max_scale=0, max_shift=0)
    assert np.array_equal(random_affine(image, np.random.default_rng(0), still), image)
    assert brightest(max_degrees=45) == (4, 4)  # the centre stays
    assert brightest(max_shift=0.3) != (4, 4)
    assert np.array_equal(image[4, 4], [200, 200, 200])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_area": 0.0}, r"min_area, max_area\) = \(0.0, 1.0\)"),
        ({"max_area": 1.5}, "at most 1"),
        ({"min_aspect": 2.0}, "ascending"),
        ({"num_tries": 0}, "must be at least 1"),
        ({"resampler": "nearest"}, "resampler = 'nearest': expected"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CropAugment(**settings)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"max_shift = -1\.0: must not be negative"):
        AffineAugment(max_shift=-1.0)
