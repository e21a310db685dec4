"""Irregularities in the header of a JPEG that do not affect its pixels."""

_START = b"\xff\xd8"
_APP0, _APP14, _START_OF_SCAN = 0xE0, 0xEE, 0xDA
_WITHOUT_LENGTH = (0x01, *range(0xD0, 0xD9))
_JFIF_VERSION = slice(9, 11)  # place within a segment, which begins with its marker
_ADOBE_TRANSFORM = 15
_YCBCR = 1


def without_oddities(encoded: bytes) -> bytes:
    """The same JPEG with a header that libjpeg reads without a warning.

    - The JFIF version becomes 1.01 if its first number is not 1; some cameras and phones write 0.00.
    - An unknown colour transform in Adobe's marker becomes YCbCr, which libjpeg assumes in this case.
    - Bytes between two segments, which libjpeg skips, are left out.

    Args:
      encoded: bytes that begin like a JPEG. It must not have four colour channels, as YCbCr would be wrong for these.

    Returns:
      The changed bytes; `encoded` itself if nothing is irregular or the header is incomplete.
    """
    parts, place = [_START], len(_START)
    while True:
        start = _next_marker(encoded, place)
        if start is None:
            return encoded
        marker = encoded[start + 1]
        if marker in _WITHOUT_LENGTH:
            stop = start + 2
        else:
            stop = start + 2 + int.from_bytes(encoded[start + 2 : start + 4], "big")
            if stop < start + 4 or stop > len(encoded):
                return encoded
        if marker == _START_OF_SCAN:
            return b"".join([*parts, encoded[start:]])
        parts.append(_tidied(encoded[start:stop]))
        place = stop


def _next_marker(encoded: bytes, place: int) -> int | None:
    """Position of the next marker from `place` on: 0xff followed by a byte that is neither 0 nor 0xff."""
    while 0 <= (place := encoded.find(b"\xff", place)) < len(encoded) - 1:
        if encoded[place + 1] not in (0x00, 0xFF):
            return place
        place += 1
    return None


def _tidied(segment: bytes) -> bytes:
    marker, changed = segment[1], bytearray(segment)
    if marker == _APP0 and segment[4:9] == b"JFIF\0" and len(segment) >= _JFIF_VERSION.stop and segment[9] != 1:
        changed[_JFIF_VERSION] = b"\1\1"
    if marker == _APP14 and segment[4:9] == b"Adobe" and len(segment) > _ADOBE_TRANSFORM:
        changed[_ADOBE_TRANSFORM] = min(segment[_ADOBE_TRANSFORM], _YCBCR)
    return bytes(changed)
