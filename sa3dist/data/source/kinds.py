"""Kinds of files by name: audio, caption table, system file, or left out."""

from pathlib import PurePosixPath

# Files that libsndfile reads, in the container formats of audio.py.
AUDIO_EXTENSIONS = (
    *("wav", "wave", "bwf", "flac", "mp3", "ogg", "oga", "opus", "aif", "aiff", "aifc"),
    *("au", "snd", "caf", "w64", "rf64"),
)
# Audio, and video with sound, that it cannot read.
UNREAD_AUDIO_EXTENSIONS = frozenset(
    (
        *("m4a", "m4b", "m4p", "m4r", "mp4", "m4v", "aac", "adts", "alac", "wma", "wmv", "asf", "amr", "3gp"),
        *("3g2", "ape", "wv", "tak", "tta", "mpc", "mp+", "ac3", "eac3", "dts", "dtshd", "thd", "dsf", "dff"),
        *("mka", "mkv", "webm", "mov", "avi", "flv", "mpg", "mpeg", "ogv", "ra", "rm", "ram", "spx", "shn", "qcp"),
        *("gsm", "vox", "voc", "mp1", "mp2", "mpga", "mpa", "paf", "sd2", "iff", "svx", "8svx", "ircam", "nist"),
        *("sph", "weba", "caff", "oma", "aa3", "at3", "ofr", "la"),
    )
)
ARCHIVE_EXTENSIONS = frozenset(
    (
        *("zip", "zipx", "tar", "gz", "tgz", "bz2", "tbz", "tbz2", "xz", "txz", "zst", "tzst", "lz4", "lzma"),
        *("7z", "rar", "cab", "iso", "dmg", "z", "arj", "lzh"),
    )
)
# Tables of captions. metadata.* comes from Hugging Face's AudioFolder, but is a common name for other tables too.
CAPTION_TABLES = ("captions.csv", "captions.jsonl")
METADATA_TABLES = ("metadata.csv", "metadata.jsonl")
MANIFEST_NAMES = CAPTION_TABLES + METADATA_TABLES
# In lower case; docs/data.md lists them.
SYSTEM_FILES = frozenset(("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r"))
SYSTEM_FOLDERS = frozenset(("__macosx", "$recycle.bin", "system volume information", "lost+found", "@eadir"))
# Folders and prefixes whose audio files are deleted files, or not audio at all.
_DISCARDED = ("__macosx", "$recycle.bin", "@eadir", ".trash", ".git", "._")
BESIDE_SHARDS = "file", "beside shards: of a folder with .tar files on top only these are read"


def extension_of(name: str) -> str:
    """Extension in lower case, without the dot; empty if there is none."""
    return PurePosixPath(name).suffix[1:].lower()


def is_audio(name: str) -> bool:
    return extension_of(name) in AUDIO_EXTENSIONS


def is_manifest(name: str) -> bool:
    return PurePosixPath(name).name.lower() in MANIFEST_NAMES


def is_system(name: str) -> bool:
    """Whether ``name`` was left by an operating system or file manager, or begins with a dot."""
    parts = [part.lower() for part in PurePosixPath(name).parts]
    return any(part.startswith(".") or part in SYSTEM_FOLDERS for part in parts) or parts[-1:][0] in SYSTEM_FILES


def is_hidden_audio(name: str) -> bool:
    """Whether a system file is audio the user may miss: its name, or a folder's, begins with a dot."""
    return is_audio(name) and not any(part.lower().startswith(_DISCARDED) for part in PurePosixPath(name).parts)


def kind_of(name: str) -> tuple[str, str]:
    """(what it is, why it is left out and what to do) of a file that is neither readable audio nor a caption."""
    extension = extension_of(name)
    if extension in UNREAD_AUDIO_EXTENSIONS:
        return (
            f"{extension} file",
            f"audio of a kind that cannot be read here; convert it: ffmpeg -i NAME.{extension} NAME.flac",
        )
    if extension in ARCHIVE_EXTENSIONS:
        shown = f"tar.{extension}" if extension_of(name[: -len(extension) - 1]) == "tar" else extension
        return (
            f"{shown} archive",
            "an archive inside the data set is not opened; unpack it, or give it by itself",
        )
    return "other file", "neither audio nor a caption"
