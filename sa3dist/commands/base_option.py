"""Which base a command uses for an adapter: the one its option gives, or the one the adapter's file names."""

import os
from collections.abc import Iterable
from pathlib import Path

from sa3dist.data.remote.local_paths import home_path
from sa3dist.errors import ConfigError
from sa3dist.model.released import RELEASED


def base_of_adapter(path: Path, given: str | None, named: Iterable[str | None], option: str) -> str:
    """The given base, or the first named one that is a released name or a directory here.

    path     the adapter, for messages
    named    bases that adapter files name; a file of a run contains only the name of the base's folder
    option   the command's option for the base
    Raises ConfigError, with the option, if there is none.
    """
    if given:
        return given
    names = list(dict.fromkeys(filter(None, named)))
    if not names:
        raise ConfigError(f"{path}: names no base model; give it with {option} MODEL")
    for name in names:
        if name in RELEASED or os.path.isdir(home_path(name)):
            return name
    raise ConfigError(
        f"{path}: its base is called {names[0]!r}, which is no released base and no directory here; give the base with "
        f"{option} DIRECTORY"
    )
