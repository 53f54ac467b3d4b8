"""Chunks of WAV, AIFF, CAF and AU files: where the samples lie, and sizes that a recorder never wrote."""

import dataclasses
import struct
from collections.abc import Iterator

from sa3dist.errors import DataError

# Written where the size was not known yet.
UNKNOWN = 0xFFFFFFFF
# Sizes from here on are those that programs write ahead of what they send through a pipe.
STREAMED = 0x7F000000
# A file of nothing but empty chunks would have a hundred million.
MAX_CHUNKS = 10_000
# Below this what lies behind the last chunk is padding, or a tag of some program.
MIN_LOST_SECONDS = 0.5


@dataclasses.dataclass(frozen=True)
class ChunkTable:
    """What the chunk headers of a file say.

    order           of bytes: "<" or ">"        samples   name of the chunk with the samples
    length          of the file in bytes
    chunks          (name, where its content begins, size as written), up to the one that holds samples without a size
    """

    order: str
    samples: bytes
    length: int
    chunks: tuple[tuple[bytes, int, int], ...]

    def find(self, name: bytes, at_least: int = 0) -> tuple[int, int] | None:
        """Where the content of a chunk begins, and its size as written; None where ``at_least`` bytes are not there."""
        for found, start, size in self.chunks:
            if found == name and size >= at_least and start + at_least <= self.length:
                return start, size
        return None


def chunk_table(data: bytes) -> ChunkTable | None:
    """None when ``data`` is no file of chunks with sizes of four bytes."""
    kind, form = data[:4], data[8:12]
    if kind in (b"RIFF", b"RF64", b"RIFX") and form == b"WAVE":
        order, samples = ">" if kind == b"RIFX" else "<", b"data"
    elif kind == b"FORM" and form in (b"AIFF", b"AIFC"):
        order, samples = ">", b"SSND"
    else:
        return None
    return ChunkTable(order, samples, len(data), tuple(_chunks(data, order, samples, _declared_end(data, order))))


def _declared_end(data: bytes, order: str) -> int:
    (size,) = struct.unpack_from(f"{order}I", data, 4)
    # A file that was not closed says 0, or the size that its header had when it was opened.
    return 8 + size if 36 < size < UNKNOWN else len(data)


def _chunks(data: bytes, order: str, samples: bytes, end: int) -> Iterator[tuple[bytes, int, int]]:
    offset, seen, left = 12, False, MAX_CHUNKS
    while left and offset + 8 <= len(data) and (offset < end or not seen):
        left -= 1
        name = data[offset : offset + 4]
        (size,) = struct.unpack_from(f"{order}I", data, offset + 4)
        yield name, offset + 8, size
        seen = seen or name == samples
        if name == samples and (size == 0 or size == UNKNOWN):
            return
        offset += 8 + size + size % 2


def samples_of(data: bytes, table: ChunkTable) -> tuple[int, int]:
    """Where the chunk with the samples begins, and ends by the header; the end of the file where it does not say.

    The end lies behind that of a file that is cut off.
    """
    start, size = table.find(table.samples) or (len(data), 0)
    sizes = table.find(b"ds64", 24)
    if size == UNKNOWN and data[:4] == b"RF64" and sizes is not None:
        (size,) = struct.unpack_from("<Q", data, sizes[0] + 8)
        says = size < UNKNOWN << 32
    else:
        says = size < STREAMED
    return start, start + size if says and size else len(data)


def mended(data: bytes) -> bytes:
    """``data`` with the size of its samples in its header, where the recorder crashed before it wrote one.

    The samples are then all that follows. A file that is empty, and has nothing or whole chunks behind, stays as it is.
    """
    if data[:4] == b".snd" and len(data) > 24 and struct.unpack_from(">I", data, 8) == (0,):
        return _with(data, (8, ">I", UNKNOWN))
    if data[:4] == b"caff":
        return _mended_caf(data)
    table = chunk_table(data)
    found = table and table.find(table.samples)
    if not found:
        return data
    start, size = found
    if data[:4] == b"RF64" and size == UNKNOWN:
        return _mended_rf64(data, table, start)
    left = len(data) - start
    # In an AIFF eight bytes of the chunk are no samples.
    if size > (8 if table.samples == b"SSND" else 0) or left <= 8 or _are_chunks(data, start + size, table.order):
        return data
    if table.samples == b"SSND":
        return _mended_aiff(data, table, start)
    order = table.order
    return _with(data, (4, f"{order}I", min(len(data) - 8, UNKNOWN - 1)), (start - 4, f"{order}I", left))


def _mended_rf64(data: bytes, table: ChunkTable, start: int) -> bytes:
    sizes = table.find(b"ds64", 24)
    if sizes is None or struct.unpack_from("<Q", data, sizes[0] + 8) != (0,):
        return data
    return _with(data, (sizes[0], "<Q", len(data) - 8), (sizes[0] + 8, "<Q", len(data) - start))


def _mended_aiff(data: bytes, table: ChunkTable, start: int) -> bytes:
    common = table.find(b"COMM", 18)
    if common is None:
        return data
    channels, _, bits = struct.unpack_from(">hIh", data, common[0])
    frame = channels * ((bits + 7) // 8)
    if frame <= 0:
        return data
    size = len(data) - start
    return _with(
        data, (4, ">I", len(data) - 8), (start - 4, ">I", size), (common[0] + 2, ">I", max(size - 8, 0) // frame)
    )


def _mended_caf(data: bytes) -> bytes:
    offset = 8
    while offset + 12 <= len(data):
        name, size = struct.unpack_from(">4sq", data, offset)
        if name == b"data":
            # Four bytes of it count edits.
            left = len(data) - offset - 12
            return _with(data, (offset + 4, ">q", left)) if size in (0, 4) and left > 4 else data
        if size < 0:
            break
        offset += 12 + size
    return data


def _with(data: bytes, *values: tuple[int, str, int]) -> bytes:
    patched = bytearray(data)
    for offset, kind, value in values:
        struct.pack_into(kind, patched, offset, value)
    return bytes(patched)


def _are_chunks(data: bytes, offset: int, order: str) -> bool:
    """Whether whole chunks, of names in ASCII, fill the rest of the file."""
    for _ in range(MAX_CHUNKS):
        if offset + 8 > len(data):
            break
        name, (size,) = data[offset : offset + 4], struct.unpack_from(f"{order}I", data, offset + 4)
        if not _is_name(name):
            return False
        offset += 8 + size + size % 2
    # A last byte that only evens the length is often left out.
    return offset in (len(data), len(data) + 1)


def _is_name(name: bytes) -> bool:
    return name.isascii() and name.decode().isprintable()


def refuse_several(data: bytes) -> None:
    """Raise DataError where a file of chunks holds samples twice, or goes on behind its end."""
    table = chunk_table(data)
    if table is None:
        return
    pieces = sum(name == table.samples for name, _, _ in table.chunks)
    if pieces > 1:
        raise DataError(f"holds {pieces} pieces of audio, of which one would be used; export it again as one")
    start, end = samples_of(data, table)
    size = end - start
    # What the file counts in is passed over, unless no chunk begins there: then a program miscounted the samples.
    if any(_is_name(data[at : at + 4]) for at in (end, end + 1)):
        end = max(end, min(_declared_end(data, table.order), len(data)))
    lost = len(data) - end
    rate = _bytes_per_second(data, table)
    if lost > rate * MIN_LOST_SECONDS > 0 and not _are_chunks(data, end + end % 2, table.order) and any(data[end:]):
        raise DataError(
            f"holds {lost / rate:.1f} s more than its header counts ({size / rate:.1f} s), as where a recorder crashed "
            f"or files were joined; write its header again (sox --ignore-length IN.wav OUT.wav) or cut it off there"
        )


def _bytes_per_second(data: bytes, table: ChunkTable) -> float:
    if found := table.find(b"fmt ", 16):
        return struct.unpack_from(f"{table.order}I", data, found[0] + 8)[0]
    if found := table.find(b"COMM", 18):
        channels, _, bits, exponent, mantissa = struct.unpack_from(">hIhHQ", data, found[0])
        # A float of 80 bits; no rate needs more than 24 of them.
        return channels * bits / 8 * (mantissa >> (16383 + 63 - exponent)) if 0 <= exponent - 16383 < 24 else 0.0
    return 0.0
