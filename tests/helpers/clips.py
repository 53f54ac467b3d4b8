"""Captioned clips for the tests of the data road: tones in any format, zips and tars of them, and lying headers."""

import io
import tarfile
import zipfile

import numpy as np
import soundfile


def tone(seconds=0.3, rate=44100, channels=1, hertz=440.0, peak=0.5):
    """float32 (samples, channels); every channel another phase, so that a swap shows."""
    time = np.arange(round(seconds * rate)) / rate
    return np.stack([peak * np.sin(2 * np.pi * hertz * time + c) for c in range(channels)], 1).astype(np.float32)


def encode(samples, rate=44100, container="WAV", subtype=None):
    out = io.BytesIO()
    soundfile.write(out, samples, rate, format=container, subtype=subtype)
    return out.getvalue()


def captioned(count=4, folder="", **kwargs):
    """{name: bytes} of ``count`` distinct clips with their captions."""
    members = {}
    for number in range(count):
        members[f"{folder}clip{number}.wav"] = encode(tone(hertz=300 + 40 * number, **kwargs))
        members[f"{folder}clip{number}.txt"] = f"tone number {number}".encode()
    return members


def write_zip(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name if isinstance(name, zipfile.ZipInfo) else zipfile.ZipInfo(name), data, compression)
    return path


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_folder(path, members):
    for name, data in members.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def declare(path, members, **claims):
    """A zip of ``members`` whose directory claims other sizes or flags for its last member, as an attacker's would."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        # The directory is written on closing, from these objects.
        for field, value in claims.items():
            setattr(archive.infolist()[-1], field, value)
    return path
