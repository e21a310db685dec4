"""Files as they occur in image sets: odd ones decode, damaged ones say what is wrong."""

import io
import re
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from nfnet_flax.data.decode import CorruptImageError, Crop, decode, decode_crop, encoded_size


def picture(height: int, width: int) -> np.ndarray:
    """A smooth image that survives JPEG; its channels differ and it has no symmetry."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    channels = (np.sin(5 * x + y), np.cos(4 * y - x), np.sin(3 * x * y + 1))
    return np.stack([127 + 100 * channel for channel in channels], axis=-1).astype(np.uint8)


PICTURE = picture(60, 90)


def encode(image: np.ndarray | Image.Image, form: str, **options: Any) -> bytes:
    """A file as Pillow writes it."""
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, form, **options)
    return stream.getvalue()


def jpeg(image: np.ndarray | Image.Image = PICTURE, **options: Any) -> bytes:
    return encode(image, "JPEG", quality=95, **options)


def cmyk_jpeg(kind: str) -> bytes:
    """PICTURE as four inks, without black. Pillow stores 255 minus what it is given, behind an Adobe marker."""
    inks = 255 - PICTURE
    no_black = np.zeros((*PICTURE.shape[:2], 1), np.uint8)
    if kind == "Adobe CMYK":
        return jpeg(Image.fromarray(np.concatenate([inks, no_black], axis=-1), "CMYK"))
    if kind == "plain CMYK":  # inks not inverted, no marker
        file = jpeg(Image.fromarray(255 - np.concatenate([inks, no_black], axis=-1), "CMYK"))
        start = file.index(b"\xff\xee")
        return file[:start] + file[start + 16 :]
    # YCCK: luma and chroma of the complement of the stored inks, which Adobe inverts; 255 is no black.
    luma_chroma = np.asarray(Image.fromarray(inks).convert("YCbCr"))
    file = jpeg(Image.fromarray(255 - np.concatenate([luma_chroma, 255 - no_black], axis=-1), "CMYK"))
    transform = file.index(b"Adobe") + 11
    return file[:transform] + b"\x02" + file[transform + 1 :]


def far(a: np.ndarray, b: np.ndarray) -> float:
    """Mean absolute difference in grey levels."""
    assert a.shape == b.shape
    return float(np.abs(a.astype(float) - b).mean())


@pytest.mark.parametrize(
    "options",
    [{}, {"progressive": True}, {"subsampling": "4:2:0"}, {"restart_marker_rows": 1}, {"keep_rgb": True}],
    ids=str,
)
def test_a_jpeg_decodes_as_pillow_decodes_it(options: dict[str, Any]) -> None:
    file = jpeg(**options)
    assert encoded_size(file) == (60, 90)
    assert np.array_equal(decode(file), np.asarray(Image.open(io.BytesIO(file)).convert("RGB")))
    assert far(decode(file), PICTURE) < 1.5


@pytest.mark.parametrize("kind", ["Adobe CMYK", "plain CMYK", "YCCK"])
def test_a_jpeg_of_inks_has_the_colours_of_the_picture(kind: str) -> None:
    file = cmyk_jpeg(kind)
    assert simplejpeg.decode_jpeg_header(file)[2] == kind.split()[-1]
    assert encoded_size(file) == (60, 90)
    assert far(decode(file), PICTURE) < 1.5


def test_grey_becomes_three_equal_channels() -> None:
    grey = PICTURE[..., 0]
    pixels = decode(jpeg(grey))
    assert far(pixels, np.repeat(grey[..., None], 3, axis=2)) < 1
    assert np.ptp(pixels, axis=2).max() == 0


@pytest.mark.parametrize("form", ["PNG", "BMP", "WEBP", "GIF"])
def test_the_bytes_decide_not_the_name(form: str) -> None:
    few_colours = PICTURE // 64 * 64  # at most 64: they fit in a GIF's palette
    lossless = {"lossless": True} if form == "WEBP" else {}
    file = encode(few_colours, form, **lossless)
    assert encoded_size(file) == (60, 90)
    assert np.array_equal(decode(file), few_colours)


def test_alpha_palette_and_sixteen_bits() -> None:
    alpha = PICTURE[..., :1]
    assert np.array_equal(decode(encode(np.concatenate([PICTURE, alpha], axis=-1), "PNG")), PICTURE)
    two = np.concatenate([PICTURE[..., :1], alpha], axis=-1)
    assert np.array_equal(decode(encode(Image.fromarray(two, "LA"), "PNG")), np.repeat(PICTURE[..., :1], 3, axis=2))
    palette = Image.fromarray(PICTURE).quantize(16)
    wanted = np.asarray(palette.convert("RGB"))
    assert np.array_equal(decode(encode(palette, "PNG", transparency=bytes(range(16)))), wanted)
    deep = PICTURE[..., 0].astype(np.uint16) * 256 + 77
    assert np.array_equal(decode(encode(deep, "PNG")), np.repeat(PICTURE[..., :1], 3, axis=2))


def test_exif_orientation_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me by 90 degrees"
    assert np.array_equal(decode(jpeg(exif=exif.tobytes())), decode(jpeg()))
    assert encoded_size(jpeg(exif=exif.tobytes())) == (60, 90)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("make", ["baseline", "progressive", "CMYK", "PNG", "WEBP", "GIF", "BMP"])
def test_a_truncated_file_is_corrupt(make: str, share: float) -> None:
    noisy = PICTURE ^ np.random.default_rng(0).integers(0, 64, PICTURE.shape, np.uint8)
    if make in ("baseline", "progressive"):
        file = jpeg(noisy, progressive=make == "progressive")
    else:
        file = cmyk_jpeg("YCCK") if make == "CMYK" else encode(noisy, make)
    # The markers of the end alone are not missed, except in a plain JPEG.
    uncut = len(file) - (1 if make in ("baseline", "progressive") else 40)
    with pytest.raises(CorruptImageError, match=r"\d+ bytes"):
        decode(file[: min(int(len(file) * share), uncut)])


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (b"", "the file is empty (0 bytes)"),
        (
            b"<html>404 not found</html>",
            "not an image of a known format (JPEG, PNG, GIF, BMP, WEBP, TIFF, PPM, AVIF): 26 bytes",
        ),
        (jpeg()[:2], "not an image"),
        (jpeg()[:100], "damaged header of an image of 100 bytes"),
        (jpeg()[:-2], "damaged JPEG of"),
        (b"\xff\xd8\xff" + b"no JPEG at all" * 9, "not an image"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "not an image"),
    ],
    ids=["zero bytes", "text", "2 bytes", "no header", "no end", "JPEG's start, then text", "PNG's start, then zeros"],
)
def test_what_is_no_image_says_why(file: bytes, reason: str) -> None:
    with pytest.raises(CorruptImageError, match=re.escape(reason)):
        decode(file)
    if reason != "damaged JPEG of":  # its header is whole
        with pytest.raises(CorruptImageError, match=re.escape(reason)):
            encoded_size(file)


def test_a_header_that_claims_gigabytes_is_refused() -> None:
    file = jpeg()
    size = file.index(b"\xff\xc0") + 5
    huge = file[:size] + b"\xff\x00\xff\x00" + file[size + 4 :]
    with pytest.raises(CorruptImageError, match="65280 x 65280 pixels"):
        decode(huge)


def test_stray_bytes_before_the_end_marker_do_no_harm() -> None:
    file = jpeg()
    assert np.array_equal(decode(file[:-2] + b"stray bytes" + file[-2:]), decode(file))


def test_no_damage_escapes_as_another_error() -> None:
    rng = np.random.default_rng(0)
    files = [jpeg(), jpeg(progressive=True), cmyk_jpeg("YCCK"), *(encode(PICTURE, f) for f in ("PNG", "GIF", "WEBP"))]
    outcomes = set()
    for file in files:
        for _ in range(40):
            damaged = bytearray(file)
            for place in rng.integers(0, len(file), 6):
                damaged[place] = rng.integers(256)
            try:
                outcomes.add(decode(bytes(damaged)).ndim)
            except CorruptImageError:
                outcomes.add(0)
    assert outcomes == {0, 3}


def test_a_crop_is_that_part_of_the_decoded_image() -> None:
    crop = Crop(top=13, left=21, height=30, width=44)
    for file in (jpeg(), jpeg(progressive=True), encode(PICTURE, "PNG"), cmyk_jpeg("plain CMYK")):
        assert np.array_equal(decode_crop(file, crop), decode(file)[13:43, 21:65])


@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_a_reduced_crop_averages_squares(reduction: int) -> None:
    rng = np.random.default_rng(0)
    image = picture(203, 301)  # a multiple of no reduction
    image[40:90, 50:150] = rng.integers(0, 256, 3)  # and edges
    crop = Crop(top=2 * reduction, left=3 * reduction, height=16 * reduction, width=24 * reduction)
    for file, tolerance in ((jpeg(image), 0.7), (encode(image, "PNG"), 0.3)):
        part = decode_crop(file, crop).astype(float)
        means = part.reshape(16, reduction, 24, reduction, 3).mean(axis=(1, 3))
        assert far(decode_crop(file, crop, reduction=reduction), means) < tolerance
