"""Make a captioned zip from any folder of recordings: captions from the file names, unreadable files left out by name.

    python tests/helpers/make_real_dataset.py OUT.zip FOLDER [FOLDER ...] [--limit 80]

Debian's hydrogen-data and sound-theme-freedesktop bring /usr/share/hydrogen/data/drumkits and /usr/share/sounds.
"""

import argparse
import re
import sys
import zipfile
from pathlib import Path

from sa3dist.data.source.audio import check_audio
from sa3dist.errors import DataError
from sa3dist.formats import atomic_path

# .oga is what freedesktop calls Ogg Vorbis.
EXTENSIONS = {
    ".wav": "wav",
    ".flac": "flac",
    ".mp3": "mp3",
    ".ogg": "ogg",
    ".oga": "ogg",
    ".aif": "aif",
    ".aiff": "aiff",
}


def recordings(folder):
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())


def caption(path, folder):
    """ "kits/Old Jazz/snare_02.wav" -> "snare 02, Old Jazz": the name, then the folder it lies in."""
    words = " ".join(re.split(r"[_\-.\s]+", path.stem)).strip()
    where = " ".join(re.split(r"[_\-.\s]+", path.parent.name if path.parent != folder else folder.name))
    return f"{words}, {where}"


def pick(paths, limit):
    """Evenly spread over the sorted list, so that every kit and format is met."""
    if limit is None or len(paths) <= limit:
        return paths
    return [paths[number * len(paths) // limit] for number in range(limit)]


def write_dataset(out, folders, limit=None):
    """Write ``out`` and return (number of clips, names and reasons of what was left out)."""
    paths = pick([(folder, path) for folder in folders for path in recordings(folder)], limit)
    written, refused = 0, []
    with atomic_path(out) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for folder, path in paths:
            data = path.read_bytes()
            try:
                check_audio(data)
            except DataError as error:
                refused.append(f"{path}: {error}")
                continue
            stem = f"{folder.name}/{path.relative_to(folder).with_suffix('')} ({path.suffix[1:]})"
            # A fixed date: the same folders give the same bytes.
            archive.writestr(zipfile.ZipInfo(f"{stem}.{EXTENSIONS[path.suffix.lower()]}"), data)
            archive.writestr(zipfile.ZipInfo(f"{stem}.txt"), caption(path, folder))
            written += 1
    return written, refused


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--limit", type=int, help="at most this many clips, spread evenly (default: all)")
    settings = parser.parse_args()
    count, left_out = write_dataset(settings.out, settings.folders, settings.limit)
    print(*left_out, sep="\n", file=sys.stderr)
    print(f"{settings.out}: {count} clips, {len(left_out)} left out")
