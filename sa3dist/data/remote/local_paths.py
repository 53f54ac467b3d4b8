"""Paths given by users: ``~`` and ``~user`` as in a shell, and file:// addresses."""

import os
from pathlib import Path
from urllib.parse import unquote

from sa3dist.errors import ConfigError

# NAME_MAX of Linux and macOS.
MAX_NAME_BYTES = 255


def expand_home(path: str | Path) -> str:
    """``path`` with a leading ``~`` or ``~user`` replaced by the home directory, unless a file of that name exists.

    Raises ConfigError if there is no such user.
    """
    text = str(path)
    expanded = os.path.expanduser(text)
    if expanded != text or not text.startswith("~") or os.path.lexists(text):
        return expanded
    user = text[1:].partition("/")[0]
    reason = f"no user {user} on this machine" if user else "no home directory is known here, HOME is not set"
    raise ConfigError(f"{text}: {reason}; write the path without ~, or ./~... for a name that begins with it")


def home_path(text: str) -> Path:
    """``expand_home`` as a Path, for command-line arguments."""
    return Path(expand_home(text))


def is_text(word: str) -> bool:
    """Whether a command-line argument was valid UTF-8; others cannot be written to our files."""
    return not any(0xD800 <= ord(character) <= 0xDFFF for character in word)


def can_be_named(path: str | Path) -> bool:
    """Whether common file systems accept every part of ``path`` as a name."""
    text = str(path)
    return (
        is_text(text)
        and "\0" not in text
        and all(len(os.fsencode(part)) <= MAX_NAME_BYTES for part in Path(path).parts)
    )


def local_name(source: str) -> str:
    """The path of a file:// address or plain path, with ``~`` expanded. Raises ConfigError.

    ``#`` and ``?`` have no special meaning in local addresses: they are part of the name.
    """
    if source[:7].lower() != "file://":
        return expand_home(source)
    rest = source[7:].removeprefix("localhost")
    if not rest.startswith(("/", "~")):
        raise ConfigError(f"{source}: names another host; expected file:///folder/name or a plain path")
    return expand_home(unquote(rest))
