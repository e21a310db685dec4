"""Geometric augmentations and the evaluation crop: functions of an image and a NumPy generator, run by input workers.

Images are (H, W, 3) uint8 or, where this is stated, encoded bytes, of which only the needed part is decoded.
"""

import math
import typing
from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image

from nfnet_flax.config import require, require_one_of
from nfnet_flax.data.augment_config import AffineAugment, CropAugment, Resampler
from nfnet_flax.data.decode import Crop, decode, decode_crop, encoded_size

# The input already runs in several threads or processes, so OpenCV must not use threads of its own. The setting is
# valid for the whole process, and every input worker imports this module. Without OpenCV's thread pool a fork is safe,
# too.
cv2.setNumThreads(0)
cv2.ocl.setUseOpenCL(False)

_PILLOWS = {"pillow_bicubic": Image.Resampling.BICUBIC, "pillow_bilinear": Image.Resampling.BILINEAR}
_CENTRE_MARGIN = 32
"""Pixels by which the centre crop of the published pipeline is smaller than the image, at the network's resolution."""
_MAX_ASPECT = 16
"""Longer side of an image as a multiple of the shorter one, beyond which only its middle is resized."""


def random_crop(
    image: bytes | np.ndarray, rng: np.random.Generator, *, image_size: int, config: CropAugment
) -> np.ndarray:
    """A random part of an image, resized to a square and, half of the time, mirrored.

    With the resampler "area_cubic", a crop of at least 2, 4 or 8 times the output size on both axes is rounded to
    multiples of that factor, so that a JPEG can be decoded at that scale; "pillow_bicubic" always decodes in full size.

    Args:
      image: an encoded file or (H, W, 3) uint8.
      rng: random generator of this example.
      image_size: S, in pixels.
      config: the distribution of the crop, see `sample_crop`.

    Returns:
      (S, S, 3) uint8.

    Raises:
      CorruptImageError: the encoded file is damaged.
    """
    height, width = encoded_size(image) if isinstance(image, bytes) else image.shape[:2]
    crop = sample_crop(height, width, rng, image_size=image_size, config=config)
    flip = config.flip and rng.random() < 0.5
    reduction = 1
    if config.resampler == "area_cubic":
        excess = min(crop.height, crop.width) // image_size
        reduction = max(factor for factor in (1, 2, 4, 8) if factor <= max(excess, 1))
        crop = Crop(*(value // reduction * reduction for value in crop))
    if isinstance(image, bytes):
        part = decode_crop(image, crop, reduction=reduction)
    else:
        part = image[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    resized = resize(part, image_size, image_size, config.resampler)
    return cv2.flip(resized, 1) if flip else resized


def sample_crop(height: int, width: int, rng: np.random.Generator, *, image_size: int, config: CropAugment) -> Crop:
    """Draws the rectangle of a random crop.

    As in the published pipeline (TensorFlow's `sample_distorted_bounding_box`): the aspect is uniform, not log-uniform;
    then the height is uniform between those at which the crop has `min_area` and `max_area` or fills the image, so the
    area is not uniform; then the place is uniform. If `num_tries` draws give no crop of an allowed area (very long
    images), the crop is the centred square of `image_size / (image_size + 32)` times the shorter side.

    The published call also requires that a tenth of the image is covered, so its smallest area is in effect 0.1; here
    the smallest area is `min_area`.

    Args:
      height: height of the image, in pixels.
      width: width of the image, in pixels.
      rng: random generator of this example.
      image_size: height and width of the output, in pixels; only the centred square depends on it.
      config: areas, aspects, number of tries.
    """
    min_pixels, max_pixels = config.min_area * height * width, config.max_area * height * width
    for _ in range(config.num_tries):
        aspect = rng.uniform(config.min_aspect, config.max_aspect)
        lowest = round(math.sqrt(min_pixels / aspect))
        highest = min(round(math.sqrt(max_pixels / aspect)), int((width + 0.5) / aspect), height)
        if lowest > highest:
            continue
        crop_height = int(rng.integers(lowest, highest, endpoint=True))
        crop_width = round(crop_height * aspect)
        if 0 < crop_width <= width and min_pixels <= crop_height * crop_width <= max_pixels:
            top = int(rng.integers(height - crop_height, endpoint=True))
            left = int(rng.integers(width - crop_width, endpoint=True))
            return Crop(top, left, crop_height, crop_width)
    side = max(1, min(height, width) * image_size // (image_size + _CENTRE_MARGIN))
    return Crop((height - side + 1) // 2, (width - side + 1) // 2, side, side)


def eval_crop(
    image: bytes | np.ndarray, *, image_size: int, margin: int, resampler: Resampler, keeps_aspect: bool
) -> np.ndarray:
    """The centre of a resized image.

    Args:
      image: an encoded file or (H, W, 3) uint8.
      image_size: S, in pixels.
      margin: pixels by which the resized image exceeds the output on each axis (published: 32).
      resampler: see `resize`.
      keeps_aspect: False: the image is resized to `image_size + margin` on each side, as published. True: its shorter
        side is, and the other one in proportion, as most networks of timm expect it.

    Returns:
      (S, S, 3) uint8.

    Raises:
      CorruptImageError: the encoded file is damaged.
    """
    pixels = decode(image) if isinstance(image, bytes) else image
    side = image_size + margin
    if not keeps_aspect:
        top = left = (margin + 1) // 2
        resized = resize(pixels, side, side, resampler)
    else:
        pixels = _central(pixels)
        rows, columns = pixels.shape[:2]
        height, width = (side, side * columns // rows) if rows <= columns else (side * rows // columns, side)
        top, left = round((height - image_size) / 2), round((width - image_size) / 2)
        resized = resize(pixels, height, width, resampler)
    return np.ascontiguousarray(resized[top : top + image_size, left : left + image_size])


def _central(image: np.ndarray) -> np.ndarray:
    """A view of the middle of a very long image; resizing all of it would take gigabytes."""
    rows, columns = image.shape[:2]
    longest = _MAX_ASPECT * min(rows, columns)
    top, left = max(0, rows - longest) // 2, max(0, columns - longest) // 2
    return image[top : top + longest, left : left + longest]


def preprocess(
    images: Sequence[bytes | np.ndarray],
    *,
    image_size: int,
    crop_margin: int,
    resampler: Resampler,
    mean: Sequence[float],
    std: Sequence[float],
    keeps_aspect: bool = False,
) -> np.ndarray:
    """Images as input for a network, prepared as in an evaluation; see `eval_crop`.

    The arguments after the images are the fields of `nfnet_flax.weights.Preprocessing`, which weight files contain.

    Args:
      images: encoded files or (H, W, 3) uint8, RGB, of any sizes. As in training, the EXIF orientation of a photo is
        ignored.
      image_size: S, in pixels.
      crop_margin: total number of pixels that are cut off on each axis after resizing.
      resampler: see `resize`.
      mean: value for each channel that is subtracted from the grey levels (0 to 255).
      std: value for each channel by which the grey levels are then divided.
      keeps_aspect: see `eval_crop`.

    Returns:
      (N, S, S, 3) float32.

    Raises:
      ConfigError: there is no image, or the resampler is unknown.
      CorruptImageError: an encoded file is damaged.
    """
    require(len(images) > 0, "images", images, "give at least one")
    require_one_of("resampler", resampler, typing.get_args(Resampler))
    crops = [
        eval_crop(image, image_size=image_size, margin=crop_margin, resampler=resampler, keeps_aspect=keeps_aspect)
        for image in images
    ]
    return (np.stack(crops).astype(np.float32) - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)


def resize(image: np.ndarray, height: int, width: int, resampler: Resampler) -> np.ndarray:
    """Resizes to `height` x `width`, each axis by itself: with antialiasing if it shrinks, bicubic if it grows.

    "area_cubic" averages over the area of an output pixel, then interpolates bicubically (OpenCV, a = -0.75). It takes
    a third of the time of OpenCV's INTER_AREA, which also does not antialias at all if one of the axes grows.
    "pillow_bicubic" is the exact antialiased bicubic (a = -0.5), six times as slow, and "pillow_bilinear" the
    antialiased bilinear; timm's networks were evaluated with these. From 500x375 to 224x224 they differ
    by 0.5 grey levels on average on smooth images and by 0.7 on images with hard edges (INTER_AREA: 0.3 and 0.5).

    Args:
      image: (H, W, 3) uint8; it may be a view.
      height: height of the result, in pixels.
      width: width of the result, in pixels.
      resampler: the method, as described above.

    Returns:
      (height, width, 3) uint8.
    """
    if resampler in _PILLOWS:
        return np.array(Image.fromarray(image).resize((width, height), _PILLOWS[resampler]))
    rows, columns = image.shape[:2]
    whole_y, whole_x = max(rows // height, 1), max(columns // width, 1)
    if max(whole_y, whole_x) > 1:  # to less than twice the output; neither axis grows, so INTER_AREA averages
        image = cv2.resize(image, (columns // whole_x, rows // whole_y), interpolation=cv2.INTER_AREA)
    rows, columns = image.shape[:2]
    if rows > height or columns > width:
        kernel_x, kernel_y = _box_kernel(columns / width), _box_kernel(rows / height)
        image = cv2.sepFilter2D(image, -1, kernel_x, kernel_y, borderType=cv2.BORDER_REPLICATE)
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC)


def _box_kernel(scale: float) -> np.ndarray:
    """Weights of a box that is `scale` < 2 input pixels wide and centred on a pixel.

    The weights are multiples of 1/256 that sum to one: OpenCV filters uint8 in 8-bit fixed point, and rounding each
    weight independently would change the brightness.
    """
    side = round(256 * max(scale - 1, 0) / (2 * scale)) / 256
    return np.array([side, 1 - 2 * side, side])


def random_affine(image: np.ndarray, rng: np.random.Generator, config: AffineAugment) -> np.ndarray:
    """Rotates, scales and shifts an image about its centre (bilinear; pixels from outside the image are black).

    Args:
      image: (H, W, 3) uint8.
      rng: random generator of this example.
      config: the angle is uniform in +-`max_degrees`, the factor in 1 +- `max_scale`, the shift along each axis in
        +-`max_shift` of its size.

    Returns:
      (H, W, 3) uint8.
    """
    height, width = image.shape[:2]
    angle = np.deg2rad(rng.uniform(-config.max_degrees, config.max_degrees))
    scale = 1.0 + rng.uniform(-config.max_scale, config.max_scale)
    shift_x, shift_y = rng.uniform(-config.max_shift, config.max_shift, size=2) * (width, height)
    a, b = np.cos(angle) / scale, np.sin(angle) / scale
    centre_x, centre_y = (width - 1) / 2, (height - 1) / 2
    from_x, from_y = centre_x + shift_x, centre_y + shift_y
    inverse = (a, b, centre_x - a * from_x - b * from_y, -b, a, centre_y + b * from_x - a * from_y)
    moved = Image.fromarray(image).transform(
        (width, height), Image.Transform.AFFINE, inverse, resample=Image.Resampling.BILINEAR
    )
    return np.asarray(moved)
