"""Oddities in the header of a JPEG that touch no pixel."""

_START = b"\xff\xd8"
_APP0, _APP14, _START_OF_SCAN = 0xE0, 0xEE, 0xDA
_WITHOUT_LENGTH = (0x01, *range(0xD0, 0xD9))
_JFIF_VERSION = slice(9, 11)  # of a segment that begins with its marker
_ADOBE_TRANSFORM = 15
_YCBCR = 1


def without_oddities(encoded: bytes) -> bytes:
    """A JPEG whose header says the same in the words that libjpeg reads without a warning.

    - The version of JFIF becomes 1.01 where it is another one; cameras and phones have written 0.00.
    - An unknown colour transform of Adobe's marker becomes that of YCbCr, as which libjpeg reads it.
    - Bytes between two segments, which libjpeg skips, are left out.

    Args:
      encoded: begins as a JPEG does, and is not of four inks, of which YCbCr is none.

    Returns:
      `encoded` itself where nothing is odd, or where the header is not whole.
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
    """Where the next marker begins, from `place` on: 0xff and another byte, which is neither 0 nor 0xff."""
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
