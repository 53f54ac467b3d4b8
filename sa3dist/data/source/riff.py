"""Chunks of WAV, AIFF, CAF and AU files: find the samples, and repair sizes that a recorder never wrote."""

import dataclasses
import struct
from collections.abc import Iterator

from sa3dist.errors import DataError

# Size field of a chunk whose size is not known yet.
UNKNOWN = 0xFFFFFFFF
# Programs that write to a pipe use placeholder sizes from here on.
STREAMED = 0x7F000000
# Limits the work on a hostile file: one of empty chunks only could have a hundred million.
MAX_CHUNKS = 10_000
# Less audio than this after the last chunk is padding or some program's tag. In a short clip a tenth is much.
MIN_LOST_SECONDS = 0.5
MIN_LOST_SHARE = 0.1
# Some programs add a header, or padding to a block, to the size of the samples that they write.
MISCOUNTED_BYTES = 4096
# Tags that programs append to a file although its format has chunks.
_TAGS = (b"ID3", b"TAG", b"APETAGEX")
# Bits of a sample in a compressed AIFC. Its header holds those of the decoded sample.
_PACKED_BITS = {b"ulaw": 8, b"ULAW": 8, b"alaw": 8, b"ALAW": 8, b"ima4": 4.25}


@dataclasses.dataclass(frozen=True)
class ChunkTable:
    """The chunk headers of a file.

    order     byte order: "<" or ">"
    samples   name of the chunk with the samples
    length    of the file in bytes
    chunks    (name, start of its content, size as written), up to the samples' chunk if that has no size
    """

    order: str
    samples: bytes
    length: int
    chunks: tuple[tuple[bytes, int, int], ...]

    @property
    def head(self) -> struct.Struct:
        """Name and size of a chunk."""
        return struct.Struct(f"{self.order}4sI")

    def find(self, name: bytes, at_least: int = 0) -> tuple[int, int] | None:
        """Start of a chunk's content and its size as written; None without such a chunk of ``at_least`` bytes."""
        for chunk, start, size in self.chunks:
            if chunk == name and size >= at_least and start + at_least <= self.length:
                return start, size
        return None


def chunk_table(data: bytes) -> ChunkTable | None:
    """The chunks of a RIFF or AIFF file; None for any other file."""
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
    # A file that was not closed has size 0, or that of its header.
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
    """Start of the samples' chunk, and its end according to the header, or the end of the file if not stated.

    In a truncated file the end is past the end of the file.
    """
    start, size = table.find(table.samples) or (len(data), 0)
    sizes = table.find(b"ds64", 24)
    if size == UNKNOWN and data[:4] == b"RF64" and sizes is not None:
        (size,) = struct.unpack_from("<Q", data, sizes[0] + 8)
        is_known = size < UNKNOWN << 32
    else:
        is_known = size < STREAMED
    return start, start + size if is_known and size else len(data)


def with_sizes_repaired(data: bytes) -> bytes:
    """``data`` with the size of its samples filled in, if a recorder crashed before writing it.

    The samples are then all the remaining bytes. A file without samples, followed by nothing or whole chunks, is left
    unchanged.
    """
    if data[:4] == b".snd" and len(data) > 24 and struct.unpack_from(">I", data, 8) == (0,):
        return _with(data, (8, ">I", UNKNOWN))
    if data[:4] == b"caff":
        return _repaired_caf(data)
    table = chunk_table(data)
    location = table and table.find(table.samples)
    if not location:
        return data
    start, size = location
    if data[:4] == b"RF64" and size == UNKNOWN:
        return _repaired_rf64(data, table, start)
    left = len(data) - start
    # In an AIFF the chunk's first eight bytes are not samples.
    if size > (8 if table.samples == b"SSND" else 0) or left <= 8 or _are_chunks(data, start + size, table.head):
        return data
    if table.samples == b"SSND":
        return _repaired_aiff(data, table, start)
    order = table.order
    return _with(data, (4, f"{order}I", min(len(data) - 8, UNKNOWN - 1)), (start - 4, f"{order}I", left))


def _repaired_rf64(data: bytes, table: ChunkTable, start: int) -> bytes:
    sizes = table.find(b"ds64", 24)
    if sizes is None or struct.unpack_from("<Q", data, sizes[0] + 8) != (0,):
        return data
    return _with(data, (sizes[0], "<Q", len(data) - 8), (sizes[0] + 8, "<Q", len(data) - start))


def _repaired_aiff(data: bytes, table: ChunkTable, start: int) -> bytes:
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


def _repaired_caf(data: bytes) -> bytes:
    start, size = _caf_data(data)
    left = len(data) - start
    # Its first four bytes are an edit count. -1 is a size that is not known, which libsndfile refuses.
    return _with(data, (start - 8, ">q", left)) if size in (-1, 0, 4) and left > 4 else data


def _caf_data(data: bytes) -> tuple[int, int]:
    """Start of a CAF's data chunk and its size as written; without one the end of the file."""
    offset = 8
    while offset + 12 <= len(data):
        name, size = struct.unpack_from(">4sq", data, offset)
        if name == b"data":
            return offset + 12, size
        if size < 0:
            break
        offset += 12 + size
    return len(data), 0


def _with(data: bytes, *values: tuple[int, str, int]) -> bytes:
    patched = bytearray(data)
    for offset, kind, value in values:
        struct.pack_into(kind, patched, offset, value)
    return bytes(patched)


def _are_chunks(data: bytes, offset: int, head: struct.Struct, even: int = 2) -> bool:
    """Whether complete chunks with ASCII names fill the rest of the file.

    head   of a chunk: its name and size      even   a chunk's content is padded to a multiple of this
    """
    for _ in range(MAX_CHUNKS):
        if offset + head.size > len(data):
            break
        name, size = head.unpack_from(data, offset)
        if not _is_name(name) or size < 0:
            return False
        offset += head.size + size + -size % even
    # A final padding byte is often omitted.
    return offset in (len(data), len(data) + 1)


def _is_name(name: bytes) -> bool:
    return name.isascii() and name.decode().isprintable()


def refuse_extra_audio(data: bytes) -> None:
    """Raise DataError if a file of chunks has samples twice, or it or an AU has more audio after its end."""
    table = chunk_table(data)
    if table is None:
        _refuse_uncounted(data)
        return
    pieces = sum(name == table.samples for name, _, _ in table.chunks)
    if pieces > 1:
        raise DataError(f"holds {pieces} pieces of audio, of which one would be used; export it again as one")
    start, end = samples_of(data, table)
    size = end - start
    # Skip chunks after the samples, up to the declared end. If no chunk begins there, the samples' size is wrong.
    if any(_is_name(data[at : at + 4]) for at in (end, end + 1)):
        end = max(end, min(_declared_end(data, table.order), len(data)))
    lost = len(data) - end
    rate = _bytes_per_second(data, table)
    least = min(rate * MIN_LOST_SECONDS, max(size * MIN_LOST_SHARE, MISCOUNTED_BYTES))
    if lost > least > 0 and not _are_chunks(data, end + end % 2, table.head) and _may_be_samples(data[end:]):
        raise DataError(
            f"holds {lost / rate:.1f} s more than its header counts ({size / rate:.1f} s), as where a recorder crashed "
            f"or files were joined; write its header again (sox --ignore-length IN.wav OUT.wav) or cut it off there"
        )


def _refuse_uncounted(data: bytes) -> None:
    if data[:4] == b".snd" and len(data) > 24:
        start, size = struct.unpack_from(">II", data, 4)
        known = 0 < size < UNKNOWN
    elif data[:4] == b"caff":
        start, size = _caf_data(data)
        # A size of 4 or less means that the samples go on to the end of the file.
        known = size > 4 and not _are_chunks(data, start + size, struct.Struct(">4sq"), 1)
    else:
        return
    lost = len(data) - start - size
    if known and lost > MISCOUNTED_BYTES and _may_be_samples(data[start + size :]):
        raise DataError(
            f"holds {lost} bytes more than the {size} that its header counts, as where a recorder crashed; export "
            f"it again, or cut it off there (head -c {start + size} IN)"
        )


def _may_be_samples(rest: bytes) -> bool:
    return any(rest) and not rest.startswith(_TAGS)


def _bytes_per_second(data: bytes, table: ChunkTable) -> float:
    if location := table.find(b"fmt ", 16):
        return struct.unpack_from(f"{table.order}I", data, location[0] + 8)[0]
    if location := table.find(b"COMM", 18):
        channels, _, bits, exponent, mantissa = struct.unpack_from(">hIhHQ", data, location[0])
        bits = _PACKED_BITS.get(data[location[0] + 18 : location[0] + 22], bits)
        # The rate is an 80-bit float; none needs more than 24 bits.
        return channels * bits / 8 * (mantissa >> (16383 + 63 - exponent)) if 0 <= exponent - 16383 < 24 else 0.0
    return 0.0
