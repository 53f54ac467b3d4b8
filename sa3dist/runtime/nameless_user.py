"""Where compiled programs are kept for a user that the system has no name for, as containers are started with."""

import getpass
import os
import tempfile


def keep_caches_without_a_name() -> None:
    """Before torch compiles or transformers is imported: both end where torch finds no user to name its cache after.

    Caches that the environment names stay where they are, and so does Triton's in a home that can be written to.
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
