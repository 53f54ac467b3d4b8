"""Write 8-bit PNG files, greyscale or with a palette."""

import struct
import zlib

import numpy as np


def png(pixels_HW: np.ndarray, palette: np.ndarray | None = None) -> bytes:
    """A PNG file of uint8 pixels.

    palette   uint8 (256, 3): red, green and blue of each pixel value; None: greyscale
    Source: the PNG specification, 8 bit, filter 0 on every row.
    """
    height, width = pixels_HW.shape
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0 if palette is None else 3, 0, 0, 0)),
        *([] if palette is None else [(b"PLTE", palette.tobytes())]),
        (b"IDAT", zlib.compress(np.pad(pixels_HW, ((0, 0), (1, 0))).tobytes(), 9)),
        (b"IEND", b""),
    )
    chunks = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
