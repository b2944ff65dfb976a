"""JPEG input files: the segments that decoding needs."""

import re
from typing import NamedTuple

from consumer.media.parts import FileParts, broken
from consumer.ports.media import InputUnavailable

START = b"\xff\xd8"
_END = b"\xff\xd9"
# Limits of one file. Cameras write about 10 scans and 20 segments; content credentials or depth
# maps add about 200 segments. One scan of 53 bytes takes 11 ms at 16 million pixels, and 1 MB of
# such scans takes minutes.
_MAX_SCANS = 100
_MAX_SEGMENTS = 5_000
# The next marker as libjpeg finds it: between segments, and at the end of a scan, where restart
# markers and the escaped 0xFF belong to the data.
_MARKER = re.compile(rb"\xff[^\x00\xff]")
_END_OF_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_SOI, _EOI, _SOS = 0xD8, 0xD9, 0xDA
_APP0, _APP1, _APP2, _APP14 = 0xE0, 0xE1, 0xE2, 0xEE
_WITHOUT_BODY = {0x01, *range(0xD0, 0xD8)}
_FRAMES = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}  # 0xF7: JPEG-LS
_READ_FRAMES = {0xC0, 0xC1, 0xC2, 0xC3, 0xC9, 0xCA}
_TABLES = {0xC4, 0xCC, 0xDB, 0xDC, 0xDD}
_ALL_COEFFICIENTS = 2**64 - 1
# Added after the last scan where the end marker is missing. The two differ in every bit, and no
# byte of them is 0 or 0xFF.
_FILLERS = bytes(range(1, 255)), bytes(range(254, 0, -1))


class _Segment(NamedTuple):
    marker: int
    body: bytes
    scan: bytes = b""

    def to_bytes(self) -> bytes:
        size = (len(self.body) + 2).to_bytes(2)
        return b"".join((b"\xff", bytes((self.marker,)), size, self.body, self.scan))


class _Coverage:
    """The coefficients of each component that the scans contain in full precision."""

    def __init__(self) -> None:
        self._bits: dict[int, int] = {}  # id of a component -> a bit for each coefficient

    @property
    def is_complete(self) -> bool:
        return bool(self._bits) and all(bits == _ALL_COEFFICIENTS for bits in self._bits.values())

    def add(self, segment: _Segment) -> None:
        body = segment.body
        if segment.marker in _FRAMES:
            self._bits = dict.fromkeys(body[6::3], 0)
        elif segment.marker == _SOS and body:
            first, last, precision = body[-3:]
            if precision & 0x0F == 0:
                for component in body[1:-3:2]:
                    bits = 2 ** (last + 1) - 2**first
                    self._bits[component] = self._bits.get(component, 0) | bits


def jpeg_parts(data: bytes) -> FileParts:
    """Read the segments of a JPEG file up to the end of its first image.

    A file without the end marker is complete if it has all scans and if the data after them does
    not affect the pixels. To check that, `FileParts.second_file` has other data there.

    Raises:
        InputUnavailable: Damaged, of a kind that libjpeg does not decode, or too many segments.
    """
    segments, complete, ended = _segments(data)
    for segment in segments:
        if segment.marker in _FRAMES:
            _check_frame(segment)
    kept = b"".join((START, *(each.to_bytes() for each in segments if _is_needed(each))))
    files = [kept + _END]
    if not ended:
        if not complete:  # without all scans an image has coarse pixels
            raise broken()
        files = [_without_padding(kept) + filler + _END for filler in _FILLERS]
    return FileParts(
        format="JPEG",
        file=files[0],
        second_file=None if ended else files[1],
        exif=_first(segments, _APP1, b"Exif\0\0"),
        xmp=_first(segments, _APP1, b"http://ns.adobe.com/xap/1.0/\0"),
        profile=_profile(segments),
    )


def _segments(data: bytes) -> tuple[list[_Segment], bool, bool]:
    """Split a file into its segments.

    Data after the last scan that the image needs is left out. Some phones store a video there,
    without an end marker, and each further scan takes the time of a pass over the image.

    Returns:
        The segments, whether all scans are present, and whether the end marker follows them.
    """
    segments: list[_Segment] = []
    coverage = _Coverage()
    at, scans = len(START), 0
    for _ in range(_MAX_SEGMENTS):
        found = _MARKER.search(data, at)
        if found is None:
            return segments, coverage.is_complete, False
        marker, at = data[found.start() + 1], found.end()
        if marker in _WITHOUT_BODY or (marker == _SOI and not scans):
            continue
        size = int.from_bytes(data[at : at + 2])
        is_cut_off = size < len(bytes(2)) or at + size > len(data)
        if marker in {_EOI, _SOI} or is_cut_off or coverage.is_complete:
            return segments, coverage.is_complete, marker == _EOI
        body, scan = data[at + 2 : at + size], b""
        at += size
        if marker == _SOS:
            scans += 1
            end = _END_OF_SCAN.search(data, at)
            scan = data[at : end.start() if end else len(data)]
            at += len(scan)
        if scans > _MAX_SCANS:
            break
        segments.append(_Segment(marker, body, scan))
        coverage.add(segments[-1])
    raise _too_many()


def _without_padding(data: bytes) -> bytes:
    """Return the segments of a file without an end marker up to the end of its last scan.

    An interrupted download into a file of full size ends in zeros. The last byte of a scan is
    padded with ones, so it is not zero; but a byte of 0xFF is followed by a zero.
    """
    scan = data.rstrip(b"\0")
    if scan == data:
        return data.rstrip(b"\xff")  # the first byte of the end marker
    return scan + b"\0" if scan.endswith(b"\xff") else scan


def _too_many() -> InputUnavailable:
    return InputUnavailable("the image has too many JPEG segments")


def _check_frame(frame: _Segment) -> None:
    if frame.marker not in _READ_FRAMES:
        raise InputUnavailable(
            "the image is a hierarchical or JPEG-LS file; baseline and progressive JPEG are read"
        )
    if frame.body[:1] != b"\x08":
        bits = frame.body[0] if frame.body else 0
        raise InputUnavailable(f"the image is a JPEG file with {bits} bits per sample; 8 are read")


def _is_needed(segment: _Segment) -> bool:
    """Return whether libjpeg needs a segment: frame, tables, scans and colour space markers."""
    marker, body = segment.marker, segment.body
    return (
        marker in _FRAMES
        or marker in _TABLES
        or marker == _SOS
        or (marker == _APP0 and body.startswith(b"JFIF\0"))
        or (marker == _APP14 and body.startswith(b"Adobe"))
    )


def _first(segments: list[_Segment], marker: int, beginning: bytes) -> bytes:
    for segment in segments:
        if segment.marker == marker and segment.body.startswith(beginning):
            return segment.body[len(beginning) :]
    return b""


def _profile(segments: list[_Segment]) -> bytes:
    """Join the pieces of the ICC profile by their numbers; empty if a piece is missing."""
    name = b"ICC_PROFILE\0"
    pieces: dict[int, bytes] = {}
    count = 0
    for marker, body, _ in segments:
        if marker == _APP2 and body.startswith(name) and len(body) > len(name) + 2:
            number, count = body[len(name)], body[len(name) + 1]
            pieces.setdefault(number, body[len(name) + 2 :])
    if sorted(pieces) != list(range(1, count + 1)):
        return b""
    return b"".join(piece for _, piece in sorted(pieces.items()))
