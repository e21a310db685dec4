"""One image as input of a network, and why there is none."""

import dataclasses
import io
import os
import stat
import typing
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from PIL import Image

from nfnet_flax.data.augment_config import Resampler
from nfnet_flax.data.decode import CorruptImageError, decode
from nfnet_flax.data.transforms import eval_crop
from nfnet_flax.weights import Preprocessing

AnyImage: TypeAlias = str | os.PathLike[str] | bytes | np.ndarray
"""The path of a file, the bytes of one, or (H, W, 3) uint8, RGB."""
Images: TypeAlias = Sequence[AnyImage] | np.ndarray
"""Several images; as one array they are (N, H, W, 3)."""
_MAX_FILE_BYTES = 1 << 30
"""Largest file that is read: an image of the largest number of pixels that is decoded takes less."""
_JPEG_QUALITY = 80


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """An image that has no prediction."""

    source: str
    """Its path as it was given, or `images[3]` for the fourth of several arrays."""
    reason: str
    """Why it has none."""


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """An image that was decoded and cropped."""

    source: str
    """Its path as it was given, or `images[3]` for the fourth of several arrays."""
    crop: np.ndarray
    """(S, S, 3) uint8: the evaluation crop."""
    thumbnail: bytes | None
    """The whole image, small, as a JPEG file; None if it was not asked for."""


def source_of(image: AnyImage, index: int) -> str:
    """What an image is called in results and messages."""
    return os.fspath(image) if isinstance(image, str | os.PathLike) else f"images[{index}]"


def prepare(
    image: AnyImage | Unreadable, index: int, preprocessing: Preprocessing, thumbnail_px: int | None
) -> Prepared | Unreadable:
    """Reads, decodes and crops an image as in an evaluation; the EXIF orientation of a photo is ignored.

    Args:
      image: the image; one that is known to be unreadable is returned unchanged.
      index: its position among all images, counted from 0.
      preprocessing: size, margin and resampler; its normalisation is left to the device.
      thumbnail_px: longer side of the thumbnail, in pixels; None: it has none.
    """
    if isinstance(image, Unreadable):
        return image
    source = source_of(image, index)
    try:
        pixels = _pixels(image)
        crop = eval_crop(
            pixels,
            image_size=preprocessing.image_size,
            margin=preprocessing.crop_margin,
            resampler=typing.cast(Resampler, preprocessing.resampler),
            keeps_aspect=preprocessing.keeps_aspect,
        )
        return Prepared(source, crop, None if thumbnail_px is None else _thumbnail(pixels, thumbnail_px))
    except CorruptImageError as error:
        return Unreadable(source, f"{error}")
    except OSError as error:
        return Unreadable(source, f"cannot be read: {error.strerror or error}")
    except MemoryError:
        return Unreadable(source, "there is not enough memory to decode it")


def _pixels(image: AnyImage) -> np.ndarray:
    """(H, W, 3) uint8, RGB."""
    if isinstance(image, bytes):
        return decode(image)
    if isinstance(image, str | os.PathLike):
        return decode(_read(os.fspath(image)))
    if not isinstance(image, np.ndarray):
        raise CorruptImageError(
            f"is of type {type(image).__name__}: give the path of a file, its bytes, or a uint8 array (H, W, 3)"
        )
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
        raise CorruptImageError(
            f"is an array of shape {image.shape} and type {image.dtype}: give (H, W, 3) uint8, RGB, not normalised"
        )
    return np.ascontiguousarray(image)


def _read(path: str) -> bytes:
    """The content of a file, unless reading might never end or take all memory."""
    if "\0" in path:
        raise CorruptImageError("the path contains a NUL character, which no path can")
    info = os.stat(path)
    if stat.S_ISDIR(info.st_mode):
        raise CorruptImageError("is a folder: nfnet_flax.prediction.find_images([folder]) finds the images in it")
    if not stat.S_ISREG(info.st_mode):
        raise CorruptImageError("is neither a file nor a folder")
    if info.st_size > _MAX_FILE_BYTES:
        raise CorruptImageError(f"the file has {info.st_size:,} bytes, which no image that can be decoded has")
    with open(path, "rb") as file:
        return file.read(_MAX_FILE_BYTES)


def _thumbnail(pixels: np.ndarray, px: int) -> bytes:
    image = Image.fromarray(pixels)
    image.thumbnail((px, px))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=_JPEG_QUALITY)
    return file.getvalue()
