"""What a server is told at its start: addresses, folders and limits."""

import dataclasses
from pathlib import Path

# The hosted trainer's own name.
DEFAULT_APP = "fal-ai/stable-audio-3-trainer"
MIB, GIB = 1 << 20, 1 << 30


@dataclasses.dataclass(frozen=True)
class WebOptions:
    """One server's options; several servers of one database are given the same.

    data_dir       keys, secret, and uploaded files unless ``storage`` says otherwise
    public_url     what clients reach the server at, without a slash at the end; for addresses in webhooks and logs
    models         directories of bases by the names that requests may use, beside the released ones
    storage        any fsspec address for uploaded files; unset = ``files`` in data_dir
    is_open        whether requests need no key: on loopback alone
    """

    data_dir: Path
    public_url: str = "http://127.0.0.1:8000"
    models: dict[str, str] = dataclasses.field(default_factory=dict)
    apps: tuple[str, ...] = (DEFAULT_APP,)
    storage: str | None = None
    is_open: bool = True
    allow_private_data: bool = False
    allow_private_webhooks: bool = False
    # A request with a data URI of this size needs a few times as much memory.
    max_body_bytes: int = 64 * MIB
    max_upload_bytes: int = 20 * GIB
    max_uploads: int = 32
    max_waiters: int = 1000
    max_queue: int | None = None
    min_free_bytes: int = GIB
    # Seconds without a byte of a body.
    silent_seconds: float = 60.0
    link_seconds: int = 7 * 24 * 3600
    # Equal requests within this time of the first are replays of it, while it is unfinished.
    replay_seconds: float = 600.0
    keep_days: float | None = None
