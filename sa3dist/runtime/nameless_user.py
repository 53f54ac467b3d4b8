"""Compile caches for a user that has no name on this system, as in a container started with a bare user id."""

import getpass
import os
import tempfile


def keep_caches_without_a_name() -> None:
    """Set the cache directories that torch would name after the user, whose import fails without a name.

    Call before torch._dynamo or transformers is imported. Variables that are set stay; Triton's cache stays in a
    writable home.
    """
    try:
        getpass.getuser()
    # OSError: Python 3.13 and later.
    except (KeyError, OSError):
        names = ["TORCHINDUCTOR_CACHE_DIR"]
        if not os.access(os.path.expanduser("~"), os.W_OK):
            names.append("TRITON_CACHE_DIR")
        for name in names:
            kind = name.split("_")[0].lower()
            os.environ.setdefault(name, os.path.join(tempfile.gettempdir(), f"{kind}_{os.getuid()}"))
