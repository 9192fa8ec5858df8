"""The header of a JPEG file, as far as fast reading needs it (ITU-T T.81, annex B)."""

from __future__ import annotations

from typing import NamedTuple

_START, _END = b"\xff\xd8", b"\xff\xd9"
_START_OF_SCAN, _APP1 = 0xDA, 0xE1
_HUFFMAN_FRAMES = frozenset({0xC0, 0xC1, 0xC2})  # baseline, extended, progressive (table B.1)
_NO_FRAMES = frozenset({0xC4, 0xCC})  # tables, whose markers stand among the frames'


class Frame(NamedTuple):
    """What the header says of the picture."""

    place: int  # of the frame header's marker in the file, in bytes
    width: int  # pixels
    height: int
    unit: int  # rows of pixels that are coded together
    tagged: bool = False  # with EXIF or XMP, which may say that the picture is turned

    @property
    def height_field(self) -> slice:
        """Where in the file the height stands, two bytes: behind the marker, a length and the bits."""
        return slice(self.place + 5, self.place + 7)


def plain_frame(data: bytearray) -> Frame | None:
    """The header of a whole 8-bit JPEG, grey or of three colours, Huffman-coded; None for everything else."""
    # A file that was cut off does not end with the marker of the end.
    if not (data.startswith(_START) and data.endswith(_END)):
        return None
    place, frame, tagged = len(_START), None, False
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker, length = data[place + 1], data[place + 2] << 8 | data[place + 3]
        if marker == _START_OF_SCAN:
            return frame._replace(tagged=tagged) if frame else None
        if marker in _HUFFMAN_FRAMES and frame is None:
            frame = _frame(place, data[place + 4 : place + 2 + length])
            if frame is None:
                return None
        elif 0xC0 <= marker <= 0xCF and marker not in _NO_FRAMES:
            return None  # arithmetic coding, lossless, hierarchical, or a second frame
        elif marker < 0xC0 or 0xD0 <= marker <= 0xD9 or marker == 0xFF:
            return None  # nothing that has a length
        tagged |= marker == _APP1
        place += 2 + length
    return None


def _frame(place: int, header: bytearray) -> Frame | None:
    """The fields of B.2.2: bits, height, width, and three bytes for each component."""
    if len(header) < 6 or header[0] != 8 or header[5] not in (1, 3) or len(header) != 6 + 3 * header[5]:
        return None
    height, width = header[1] << 8 | header[2], header[3] << 8 | header[4]
    blocks = max(factors & 15 for factors in header[7::3])  # of 8 rows each, in the finest component
    return Frame(place, width, height, 8 * blocks) if height and width and 1 <= blocks <= 4 else None
