"""Refuse files whose audio would be lost: truncated, several joined with cat, or with uncounted MP3 frames."""

import functools
import re
import struct
from collections.abc import Iterator

from sa3dist.data.source.riff import MISCOUNTED_BYTES, UNKNOWN, chunk_table, refuse_extra_audio, samples_of
from sa3dist.errors import DataError

_REMEDY = "cut it apart, or join it anew: ffmpeg -i IN OUT.flac"
# Beginnings of audio files: (bytes to search for, offset from them, bytes that must be there).
_STARTS = (
    (b"RIFF", 8, b"WAVE"),
    (b"RIFX", 8, b"WAVE"),
    (b"RF64", 8, b"WAVE"),
    (b"FORM", 8, b"AIF"),
    (b"fLaC", 5, b"\0\0\x22"),
    (b"caff\0\1", 8, b"desc"),
    (b"OggS\0\2", 6, bytes(8)),
    (b".snd\0\0", 12, b"\0\0\0"),
    (b"riff\x2e\x91\xcf\x11", 24, b"wave"),
)
_SEARCHED_THROUGHOUT = (
    (b"fLaC\0\0\0\x22", 0, b""),
    (b"fLaC\x80\0\0\x22", 0, b""),
    (b"caff\0\1\0\0desc", 0, b""),
)
_BITRATES_KBPS = {
    1: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    2: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
# Offsets of a Xing, Info or VBRI header in its frame: after the side information of mono or stereo, of either version,
# and an optional CRC of two bytes.
_HEADER_OFFSETS = (13, 15, 21, 23, 36, 38)
_RATES_HZ = (44100, 48000, 32000)
# This many frames in a row cannot be chance.
_FRAMES_IN_A_ROW = 3
# The first frame may depend on data before it, and the last may be truncated.
_SLACK_FRAMES = 4
# If no header counts the frames, a decoder's guess of their size may be off by 0.04 bytes of 418.
_SLACK_SHARE = 1 / 4000


def check_end(data: bytes) -> None:
    """Raise DataError, without a file name, if the first stream is truncated or followed by other audio.

    Cover images, overviews and tags do not count as audio. Parallel streams in an Ogg file are accepted. A truncated
    FLAC or MP3 is found only by decoding.
    """
    if data[:3] == b"ID3":
        # May precede a FLAC, too.
        data = data[_tag_size(data, 0) :]
    if data[:4] == b"OggS":
        streams, end = _ogg_streams(data)
        _refuse_cut(data, end)
        if streams > 1:
            raise DataError(f"holds {streams} streams joined one after the other, but one would be used; {_REMEDY}")
        _refuse_second(data, end)
    elif (end := _end_of_samples(data)) is not None:
        _refuse_cut(data, end, MISCOUNTED_BYTES)
        _refuse_second(data, end)
        refuse_extra_audio(data)
    elif (counted := mp3_counted(data)) is not None:
        # Before decoding, during which libmpg123 would print its own warning.
        _refuse_more(data, counted)


def refuse_lost(data: bytes, samples: int) -> None:
    """Raise DataError if an MP3 has more than the ``samples`` decoded from it. Call after ``check_end``."""
    if data[:4] == b"OggS" or _end_of_samples(data) is not None:
        return
    counted = mp3_counted(data)
    if counted is None or samples < counted:
        _refuse_more(data, samples)


def _refuse_cut(data: bytes, end: int, slack_bytes: int = 0) -> None:
    missing = end - len(data)
    if missing > slack_bytes:
        raise DataError(f"is cut off: at least {missing} bytes are missing at its end; copy or export it again")


def _refuse_more(data: bytes, samples: int) -> None:
    least = mp3_samples(data)
    if least is not None and samples < least:
        raise DataError(
            f"holds at least {least} samples, of which {samples} would be used, as where files were joined or cut "
            f"without a new header; {_REMEDY}"
        )


def _refuse_second(data: bytes, start: int) -> None:
    # If only decoding finds the end, search the whole file, for its own kind alone, to save time.
    own = [known for known in _SEARCHED_THROUGHOUT if data.startswith(known[0][:4])]
    for magic, offset, rest in own or _STARTS:
        place = start - 1
        while (place := data.find(magic, place + 1)) >= 0:
            if data.startswith(rest, place + offset):
                raise DataError(f"holds a second file, which begins at byte {place} and would be lost; {_REMEDY}")


def _end_of_samples(data: bytes) -> int | None:
    """Where to begin the search for a second file; None for MP3 and non-audio. Skips tags, which may hold anything."""
    if data[:4] == b"fLaC":
        # Only decoding finds the end of the samples.
        place = 4
        while place + 4 <= len(data):
            kind, size = data[place], int.from_bytes(data[place + 1 : place + 4], "big")
            place += 4 + size
            if kind & 0x80:
                break
        return place
    table = chunk_table(data)
    if table is not None:
        return samples_of(data, table)[1]
    if data[:4] == b".snd" and len(data) >= 24:
        start, size = struct.unpack_from(">II", data, 4)
        return len(data) if size == UNKNOWN else start + size
    if data[:4] == b"riff" and len(data) >= 24:
        return struct.unpack_from("<Q", data, 16)[0]
    return 12 if data[:4] == b"caff" else None


def _ogg_streams(data: bytes) -> tuple[int, int]:
    """Number of consecutive groups of streams, and the end of the last page.

    A new group begins where the first page of a stream follows pages that are not first ones.
    """
    streams, in_heads, place, end = 0, False, 0, 0
    while (place := data.find(b"OggS", place)) >= 0 and place + 27 <= len(data):
        segments = data[place + 26]
        if data[place + 4] != 0:
            place += 4
        else:
            begins = bool(data[place + 5] & 2)
            streams += begins and not in_heads
            in_heads = begins
            place = end = place + 27 + segments + sum(data[place + 27 : place + 27 + segments])
    return streams, end


def mp3_samples(data: bytes) -> int | None:
    """Lower bound of the samples per channel in an MP3's frames; None if unknown (layers I, II).

    Raises DataError if frames differ in rate or channels: such joined files cannot be decoded as one.
    """
    headings = _header_frames(data)
    samples, kinds, trimmed, end = 0, set(), 0, 0
    for place, frame in _mp3_frames(data):
        size, rate, channels, of_frame = frame
        if place in headings:
            # Decoders use only the first one.
            trimmed = trimmed if end else _trimmed(data[place : place + size])
        else:
            kinds.add((rate, channels))
            samples += of_frame
        end = place + size
    if len(kinds) > 1:
        raise DataError(f"changes its sample rate or channels on the way, as where files were joined; {_REMEDY}")
    if not kinds:
        return None
    _refuse_second(data, end)
    return max(0, samples - trimmed - _SLACK_FRAMES * of_frame - int(samples * _SLACK_SHARE))


def mp3_counted(data: bytes) -> int | None:
    """Samples of an MP3 as its header frame counts them; None without one. A decoder then guesses from the size."""
    place, frame = next(_mp3_frames(data), (0, None))
    if frame is None or place not in _header_frames(data[place : place + 200], place):
        return None
    size, _, _, of_frame = frame
    heading = data[place : place + size]
    if heading[36:40] == b"VBRI":
        return of_frame * int.from_bytes(heading[50:54], "big")
    at, flags = _xing(heading)
    if not flags & 1:
        return None
    return max(0, of_frame * int.from_bytes(heading[at + 8 : at + 12], "big") - _trimmed(heading))


def _header_frames(data: bytes, start: int = 0) -> set[int]:
    """Possible positions of frames with counts (Xing, Info, VBRI) instead of sound.

    start   position of ``data`` in the file
    """
    marks = (match.start() for mark in (b"Xing", b"Info", b"VBRI") for match in re.finditer(mark, data))
    return {start + at - before for at in marks for before in _HEADER_OFFSETS}


def _mp3_frames(data: bytes) -> Iterator[tuple[int, tuple[int, int, int, int]]]:
    """(position, (bytes, sample rate in Hz, channels, samples)) of every layer III frame. Skips tags."""
    place, in_step = 0, False
    tags = dict.fromkeys((b"ID3", b"APETAGEX"), -1)
    while place + 4 <= len(data):
        frame = _frame(data[place : place + 4])
        in_step = frame is not None and (in_step or _in_a_row(data, place))
        if in_step:
            yield place, frame
            place += frame[0]
        elif tag := _tag_size(data, place):
            place += tag
        else:
            for mark, at in tags.items():
                if at <= place:
                    tags[mark] = _find_or_end(data, mark, place + 1)
            place = min(_find_or_end(data, b"\xff", place + 1), *tags.values())


def _find_or_end(data: bytes, mark: bytes, start: int) -> int:
    place = data.find(mark, start)
    return len(data) if place < 0 else place


def _in_a_row(data: bytes, place: int) -> bool:
    for _ in range(_FRAMES_IN_A_ROW):
        frame = _frame(data[place : place + 4])
        if frame is None:
            return False
        place += frame[0]
        if place >= len(data):
            return True
    return True


# A minute of audio has 2300 frames, but a file has few different frame headers.
@functools.lru_cache(maxsize=4096)
def _frame(header: bytes) -> tuple[int, int, int, int] | None:
    head = int.from_bytes(header, "big")
    version, bitrate, rate = (head >> 19) & 3, (head >> 12) & 15, (head >> 10) & 3
    if head >> 21 != 0x7FF or version == 1 or (head >> 17) & 3 != 1 or bitrate in (0, 15) or rate == 3:
        return None
    first = version == 3
    rate_hz = _RATES_HZ[rate] >> {3: 0, 2: 1, 0: 2}[version]
    samples = 1152 if first else 576
    size = samples // 8 * 1000 * _BITRATES_KBPS[1 if first else 2][bitrate] // rate_hz + ((head >> 9) & 1)
    return size, rate_hz, 1 if (head >> 6) & 3 == 3 else 2, samples


def _trimmed(frame: bytes) -> int:
    """Samples of delay and padding that a decoder drops, from the encoder's tag."""
    at, flags = _xing(frame)
    if not at:
        return 0
    tag = at + 8 + 4 * bool(flags & 1) + 4 * bool(flags & 2) + 100 * bool(flags & 4) + 4 * bool(flags & 8)
    delays = int.from_bytes(frame[tag + 21 : tag + 24], "big")
    return (delays >> 12) + (delays & 0xFFF)


def _xing(frame: bytes) -> tuple[int, int]:
    """Offset of the Xing or Info header in a frame, and its flags; 0, 0 without one."""
    at = next((at for at in _HEADER_OFFSETS if frame[at : at + 4] in (b"Xing", b"Info")), 0)
    return at, int.from_bytes(frame[at + 4 : at + 8], "big") if at else 0


def _tag_size(data: bytes, place: int) -> int:
    """Size of the ID3v2, ID3v1 or APE tag at ``place``; 0 if there is none."""
    head = data[place : place + 10]
    if head[:3] == b"ID3" and len(head) == 10 and max(head[6:]) < 128:
        size = sum(byte << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
        return 10 + size + 10 * bool(head[5] & 0x10)
    if head[:3] == b"TAG" and place == len(data) - 128:
        return 128
    if head[:8] == b"APETAGEX":
        # The size excludes the header of 32 bytes.
        (size,) = struct.unpack_from("<I", data[place : place + 32].ljust(32, b"\0"), 12)
        return 32 + size
    return 0
