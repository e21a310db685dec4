"""A matrix of files as encoders write them and as the world spoils them: each is read as Pillow reads it, or named.

One reader decides for training, evaluation, the scan of a folder, `nfnet doctor` and `prepare_imagenet --verify`, so a
file that this matrix holds is treated alike by all of them.
"""

import io
import warnings
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from nfnet_flax.data.decode import IMAGE_SUFFIXES, CorruptImageError, Crop, decode, decode_crop, encoded_size
from nfnet_flax.data.source_config import FolderSource
from nfnet_flax.data.sources import open_source
from tests.test_decode import PICTURE, cmyk_jpeg, encode, jpeg

# Pillow's notes on odd files are not this project's; whatever matters ends in an error.
pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL")

RGB = Image.fromarray(PICTURE)
FEW_COLOURS = RGB.quantize(16)


def with_alpha(mode: str) -> Image.Image:
    image = RGB.convert(mode)
    image.putalpha(Image.fromarray(PICTURE[..., 1]))
    return image


def pages(form: str, **options: Any) -> bytes:
    """Two pages or frames, of which the first is PICTURE."""
    return encode(RGB, form, save_all=True, append_images=[Image.fromarray(255 - PICTURE)], **options)


def by_opencv(suffix: str, image: np.ndarray, *flags: int) -> bytes:
    return cv2.imencode(suffix, image, flags)[1].tobytes()


def segment(marker: int, body: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + (len(body) + 2).to_bytes(2, "big") + body


FILE = jpeg()
PROGRESSIVE = jpeg(progressive=True)
JFIF = FILE.index(b"JFIF\0")
SCAN = FILE.index(b"\xff\xda")
AFTER_JFIF = 20
LAST_SCAN = PROGRESSIVE.rindex(b"\xff\xda")
ADOBE = FILE[:2] + segment(0xEE, b"Adobe\0\x64\0\0\0\0\x01") + FILE[AFTER_JFIF:]
DEEP = PICTURE.astype(np.uint16) * 256 + 77

AS_PILLOW: dict[str, bytes] = {
    "JPEG": FILE,
    "JPEG grey": jpeg(RGB.convert("L")),
    "JPEG progressive": PROGRESSIVE,
    "JPEG 4:4:4": jpeg(subsampling="4:4:4"),
    "JPEG 4:2:2": jpeg(subsampling="4:2:2"),
    "JPEG restart markers": jpeg(restart_marker_blocks=3),
    "JPEG optimized": jpeg(optimize=True),
    "JPEG stored as RGB": jpeg(keep_rgb=True),
    "JPEG Adobe CMYK": cmyk_jpeg("Adobe CMYK"),
    "JPEG YCCK": cmyk_jpeg("YCCK"),
    "JPEG with comment, ICC profile and EXIF": jpeg(comment=b"x" * 99, icc_profile=b"y" * 99, exif=Image.Exif()),
    "JPEG by OpenCV": by_opencv(".jpg", PICTURE),
    "JPEG by OpenCV, 4:1:1": by_opencv(".jpg", PICTURE, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, 0x411111),
    "JPEG by OpenCV, 4:4:0": by_opencv(".jpg", PICTURE, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, 0x121111),
    "MPO": pages("MPO"),
    "JPEG, JFIF 0.00": FILE[: JFIF + 5] + b"\0\0" + FILE[JFIF + 7 :],
    "JPEG, JFIF 2.01": FILE[: JFIF + 5] + b"\2\1" + FILE[JFIF + 7 :],
    "JPEG, bytes before the tables": FILE[:AFTER_JFIF] + b"\0\0\0" + FILE[AFTER_JFIF:],
    "JPEG, 0xff before the tables": FILE[:AFTER_JFIF] + b"\xff\xff" + FILE[AFTER_JFIF:],
    "JPEG, bytes before the scan": FILE[:SCAN] + b"stray" + FILE[SCAN:],
    "JPEG, bytes between scans": PROGRESSIVE[:LAST_SCAN] + b"stray" + PROGRESSIVE[LAST_SCAN:],
    "JPEG, bytes before the end": FILE[:-2] + b"stray" + FILE[-2:],
    "JPEG, bytes after the end": FILE + b"stray" * 99,
    "JPEG, Adobe marker": ADOBE,
    "JPEG, Adobe transform 9": ADOBE.replace(b"\0\0\0\0\x01", b"\0\0\0\0\x09", 1),
    "JPEG, Adobe transform 2": ADOBE.replace(b"\0\0\0\0\x01", b"\0\0\0\0\x02", 1),
    "JPEG, unknown segment": FILE[:2] + segment(0xEA, b"whatever") + FILE[2:],
    "JPEG, empty comment": FILE[:AFTER_JFIF] + segment(0xFE, b"") + FILE[AFTER_JFIF:],
    "PNG": encode(RGB, "PNG"),
    "PNG black and white": encode(RGB.convert("1"), "PNG"),
    "PNG grey": encode(RGB.convert("L"), "PNG"),
    "PNG palette": encode(FEW_COLOURS, "PNG"),
    "PNG by OpenCV, 3 x 16 bits": by_opencv(".png", DEEP),
    "GIF": encode(FEW_COLOURS, "GIF"),
    "GIF animation": pages("GIF"),
    "BMP": encode(RGB, "BMP"),
    "BMP grey": encode(RGB.convert("L"), "BMP"),
    "BMP palette": encode(FEW_COLOURS, "BMP"),
    "WebP": encode(RGB, "WEBP"),
    "WebP lossless": encode(RGB, "WEBP", lossless=True),
    "WebP animation": pages("WEBP"),
    "TIFF": encode(RGB, "TIFF"),
    "TIFF LZW": encode(RGB, "TIFF", compression="tiff_lzw"),
    "TIFF deflate": encode(RGB, "TIFF", compression="tiff_adobe_deflate"),
    "TIFF JPEG": encode(RGB, "TIFF", compression="jpeg"),
    "TIFF fax": encode(RGB.convert("1"), "TIFF", compression="group4"),
    "TIFF palette": encode(FEW_COLOURS, "TIFF"),
    "TIFF CMYK": encode(RGB.convert("CMYK"), "TIFF"),
    "TIFF YCbCr": encode(RGB.convert("YCbCr"), "TIFF"),
    "TIFF in Lab": encode(Image.merge("LAB", RGB.split()), "TIFF"),
    "TIFF pages": pages("TIFF"),
    "TIFF by OpenCV, 3 x 16 bits": by_opencv(".tif", DEEP),
    "PPM": encode(RGB, "PPM"),
    "PGM": encode(RGB.convert("L"), "PPM"),
    "PBM": encode(RGB.convert("1"), "PPM"),
    "PPM as text": b"P3 3 1 255\n" + b" ".join(b"%d" % number for number in range(9)) + b"\n",
    "AVIF": encode(RGB, "AVIF"),
}

WITHOUT_ALPHA: dict[str, bytes] = {
    f"{form} {mode}": encode(with_alpha(mode), form, **options)
    for form, mode, options in (
        ("PNG", "LA", {}),
        ("PNG", "RGBA", {}),
        ("BMP", "RGBA", {}),
        ("TIFF", "LA", {}),
        ("TIFF", "RGBA", {}),
        ("WEBP", "RGBA", {"lossless": True, "exact": True}),
    )
}

UPPER_8_BITS: dict[str, bytes] = {
    "PNG": encode(DEEP[..., 0], "PNG"),
    "TIFF": encode(DEEP[..., 0], "TIFF"),
    "PGM": encode(DEEP[..., 0], "PPM"),
}


NAMED: dict[str, bytes] = {
    "JPEG, no code in the scan": FILE[: SCAN + 300] + b"\xff\0" * 20 + FILE[SCAN + 340 :],  # all ones are never a code
    "JPEG, hole in the scan": FILE[: SCAN + 300] + FILE[SCAN + 500 :],
    "JPEG, cut but ended": FILE[: len(FILE) // 2] + FILE[-2:],
    "JPEG, JFIF 0.00 and cut but ended": AS_PILLOW["JPEG, JFIF 0.00"][: len(FILE) // 2] + FILE[-2:],
    "JPEG, bytes before the tables and a hole in the scan": FILE[:AFTER_JFIF]
    + b"\0\0"
    + FILE[AFTER_JFIF:-900]
    + FILE[-400:],
    "JPEG, a restart marker is lost": jpeg(restart_marker_blocks=3).replace(b"\xff\xd1", b"", 1),
    "TIFF of floats": encode(Image.fromarray(PICTURE[..., 0].astype(np.float32)), "TIFF"),
    **{
        f"{name}, cut": file[: len(file) // 2]
        for name, file in AS_PILLOW.items()
        if name in ("MPO", "PNG", "GIF", "BMP", "WebP", "TIFF", "TIFF LZW", "TIFF JPEG", "PPM", "PPM as text", "AVIF")
    },
    "a web page": b"<html>404 not found</html>",
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"></svg>',
    "PDF": encode(RGB, "PDF"),
    "ICO": encode(RGB, "ICO"),
    "zero bytes": b"",
}


def by_pillow(file: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


def check(file: bytes, wanted: np.ndarray) -> None:
    pixels = decode(file)
    assert np.array_equal(pixels, wanted)
    assert encoded_size(file) == wanted.shape[:2]
    height, width = wanted.shape[:2]
    crop = Crop(top=0, left=1, height=height, width=width - 1)
    assert np.array_equal(decode_crop(file, crop), wanted[:, 1:])


@pytest.mark.parametrize("name", AS_PILLOW)
def test_it_is_read_as_pillow_reads_it(name: str) -> None:
    check(AS_PILLOW[name], by_pillow(AS_PILLOW[name]))


@pytest.mark.parametrize("name", WITHOUT_ALPHA)
def test_alpha_is_dropped(name: str) -> None:
    grey = np.repeat(np.asarray(RGB.convert("L"))[..., None], 3, axis=2)
    check(WITHOUT_ALPHA[name], grey if name.endswith("LA") else PICTURE)


@pytest.mark.parametrize("name", UPPER_8_BITS)
def test_of_16_bits_the_upper_8_are_kept(name: str) -> None:
    check(UPPER_8_BITS[name], np.repeat(PICTURE[..., :1], 3, axis=2))


@pytest.mark.parametrize("name", NAMED)
def test_it_is_named(name: str) -> None:
    with pytest.raises(CorruptImageError):
        decode(NAMED[name])


def test_the_scan_takes_just_what_can_be_decoded(tmp_path: Path) -> None:
    folder = tmp_path / "train" / "one"
    folder.mkdir(parents=True)
    (tmp_path / "train" / "two").mkdir()
    (tmp_path / "train" / "two" / "a.png").write_bytes(AS_PILLOW["PNG"])
    known = Image.registered_extensions()
    for suffix in IMAGE_SUFFIXES:
        form = known[suffix]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (folder / f"image{suffix}").write_bytes(encode(RGB, form))
    for name in ("image.svg", "image.pdf", "image", "image.jpg?w=640"):
        (folder / name).write_bytes(FILE)
    source = open_source(FolderSource(root=str(tmp_path)), "train", 0)
    assert len(source) == len(IMAGE_SUFFIXES) + 1
    assert {decode(source[index]["image"]).shape for index in range(len(source))} == {PICTURE.shape}
    (said,) = source.unused
    assert "4 files whose names end in none of .jpg .jpeg" in said.text
