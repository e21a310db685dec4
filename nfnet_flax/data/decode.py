"""Decoding of images, and which files are images. Training, evaluation, checks and preparation all use this file.

The format of a file is recognized by its bytes and never by its name; names only determine which files of a folder are
used (`is_image_name`). Plain JPEGs are decoded by libjpeg-turbo through simplejpeg, which releases the GIL while it
works; everything else (CMYK and YCCK JPEGs, PNG, TIFF, ...) by Pillow. Both use the accurate inverse DCT and the smooth
("fancy") chroma upsampling and agree to the last bit. The fast variants were measured on 500x375 JPEGs of quality 90
and are not used: the fast DCT saves 3% of the decoding time and is off by 1.0 grey level on average, the fast
upsampling saves 6% and is off by 0.33. For images much larger than the network's input, decoding at a half, a quarter
or an eighth of the size saves more (`decode_crop`).

EXIF orientation is ignored, as in the published pipeline.
"""

import io
import struct
import zlib
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
from PIL import Image, ImageChops, features

from nfnet_flax.config import ConfigError
from nfnet_flax.data import jpeg_header

_JPEG_START = b"\xff\xd8\xff"
_PILLOW_ERRORS = (
    OSError,
    SyntaxError,  # raised by Pillow for a broken PNG
    ValueError,
    EOFError,
    IndexError,
    RuntimeError,  # raised by Pillow's AVIF decoder
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_SUFFIXES_OF = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),  # MPO: several JPEGs in one file; the first is used
    "PNG": (".png",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
}
"""File formats that are decoded, by Pillow's names for them, with the endings of their files' names."""
if "avif" in features.modules and features.check_module("avif"):  # Pillow can be built without it
    _SUFFIXES_OF["AVIF"] = (".avif",)
IMAGE_SUFFIXES = tuple(suffix for suffixes in _SUFFIXES_OF.values() for suffix in suffixes)
"""Endings of the names of image files, in lower case."""
# Warnings of libjpeg that do not affect the pixels: bytes between the last pixel of a scan and the next marker, and a
# header field that decoders ignore. Real sets contain such files, and other pipelines read them without a message.
_HARMLESS = (
    "extraneous bytes before marker 0xd9",
    "extraneous bytes before marker 0xda",
    "extraneous bytes before marker 0xc4",
    "Invalid SOS parameters",
)
_MAX_PIXELS = 89_478_485
"""Largest number of pixels, as in Pillow: a larger image is a damaged header or an attack, and would need gigabytes."""


class CorruptImageError(ConfigError):
    """The bytes are not a complete image. The message says why; the caller adds the name of the example."""


class Crop(NamedTuple):
    """A rectangle of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def is_image_name(name: str) -> bool:
    """Whether a file has the name of an image."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def encoded_size(encoded: bytes) -> tuple[int, int]:
    """Height and width of an image, read from its header only.

    Raises:
      CorruptImageError: the header is not that of an image.
    """
    header = _plain_jpeg_header(encoded)
    if header is not None:
        return header
    with _open(encoded) as image:
        return image.height, image.width


def decode(encoded: bytes) -> np.ndarray:
    """The pixels of an encoded image.

    Grey becomes RGB, the alpha channel is dropped, the first frame or page is used, and of 16 bits the upper 8 are
    kept. Otherwise the pixels are the same as Pillow's.

    Returns:
      (H, W, 3) uint8, RGB.

    Raises:
      CorruptImageError: the bytes are not an image, or not a complete one.
    """
    size = _plain_jpeg_header(encoded)
    pixels = None if size is None else _decode_plain_jpeg(encoded, size, 1)
    return _decode_with_pillow(encoded) if pixels is None else pixels


def decode_crop(encoded: bytes, crop: Crop, *, reduction: int = 1) -> np.ndarray:
    """A part of an encoded image, reduced by a whole factor.

    A reduced JPEG is decoded at that scale, directly from its DCT coefficients, in about half the time. The result
    differs by at most 0.5 grey levels on average from the mean of each `reduction` x `reduction` square (0.3 to 0.4 at
    a half, 0.5 at an eighth), which is computed for other formats.

    Args:
      encoded: bytes of the file.
      crop: rectangle inside the image; top, left, height and width are multiples of `reduction`.
      reduction: 1, 2, 4 or 8.

    Returns:
      (crop.height / reduction, crop.width / reduction, 3) uint8, RGB.

    Raises:
      CorruptImageError: as for `decode`.
    """
    top, left, height, width = crop
    size = _plain_jpeg_header(encoded)
    pixels = None if size is None else _decode_plain_jpeg(encoded, size, reduction)
    if pixels is not None:
        top, left, height, width = (value // reduction for value in crop)
        return pixels[top : top + height, left : left + width]
    pixels = _decode_with_pillow(encoded)[top : top + height, left : left + width]
    if reduction == 1:
        return pixels
    return cv2.resize(pixels, (width // reduction, height // reduction), interpolation=cv2.INTER_AREA)


def _plain_jpeg_header(encoded: bytes) -> tuple[int, int] | None:
    """Height and width of an image that simplejpeg can decode; None for images that Pillow has to decode."""
    if not encoded.startswith(_JPEG_START):
        return None
    try:
        height, width, colour_space, _ = simplejpeg.decode_jpeg_header(encoded, strict=False)
    except (ValueError, KeyError):  # a broken header, or a rare chroma subsampling: Pillow finds out which
        return None
    _refuse_huge(height, width)
    return None if colour_space in ("CMYK", "YCCK") else (height, width)


def _refuse_huge(height: int, width: int) -> None:
    if height * width > _MAX_PIXELS:
        raise CorruptImageError(f"the header claims {width} x {height} pixels, more than {_MAX_PIXELS}")


def _decode_plain_jpeg(encoded: bytes, size: tuple[int, int], reduction: int) -> np.ndarray | None:
    """The pixels at 1 / `reduction` of the size, rounded up; None for a harmless irregularity that Pillow can read."""
    height, width = (-(-length // reduction) for length in size)
    try:
        return simplejpeg.decode_jpeg(
            encoded, "RGB", min_height=height, min_width=width, min_factor=reduction, strict=True
        )
    except ValueError as error:
        # It stops at the first warning. A warning about an irregular header must not hide that pixels are missing
        # later.
        tidy = jpeg_header.without_oddities(encoded)
        if tidy != encoded:
            return _decode_plain_jpeg(tidy, size, reduction)
        if any(text in str(error) for text in _HARMLESS):
            return None
        raise CorruptImageError(f"damaged JPEG of {len(encoded)} bytes: {error}") from error


def _open(encoded: bytes) -> Image.Image:
    """The image with its header read."""
    if not encoded:
        raise CorruptImageError("the file is empty (0 bytes)")
    try:
        image = Image.open(io.BytesIO(encoded), formats=tuple(_SUFFIXES_OF))
    except Image.UnidentifiedImageError as error:
        start = bytes(encoded[:12])
        raise CorruptImageError(
            f"not an image of a known format ({', '.join(_SUFFIXES_OF)}): {len(encoded)} bytes that begin {start!r}"
        ) from error
    except _PILLOW_ERRORS as error:
        raise CorruptImageError(f"damaged header of an image of {len(encoded)} bytes: {error}") from error
    _refuse_huge(image.height, image.width)
    return image


def _decode_with_pillow(encoded: bytes) -> np.ndarray:
    with _open(encoded) as image:
        try:
            image.load()
        except _PILLOW_ERRORS as error:
            raise CorruptImageError(f"damaged {image.format} of {len(encoded)} bytes: {error}") from error
        has_16_bits = image.mode.startswith("I;16") or (image.format == "PPM" and image.mode == "I")
        if has_16_bits:
            upper = (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)
            return np.repeat(upper[..., None], 3, axis=2)
        if image.mode in ("I", "F"):
            raise CorruptImageError(f"{image.format} with 32-bit pixels (mode {image.mode}): its range is not known")
        if image.mode == "CMYK" and image.format in ("JPEG", "MPO") and "adobe" not in image.info:
            return np.array(ImageChops.invert(image).convert("RGB"))  # Pillow assumes inverted inks, as Adobe writes
        if image.mode == "P" and "transparency" in image.info:
            return np.array(image.convert("RGBA").convert("RGB"))
        return np.array(image.convert("RGB"))
