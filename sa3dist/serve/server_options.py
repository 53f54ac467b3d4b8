"""Options of a web server: addresses, folders and limits."""

import dataclasses
from pathlib import Path

# The name of the hosted trainer.
DEFAULT_APP = "fal-ai/stable-audio-3-trainer"
MIB, GIB = 1 << 20, 1 << 30


@dataclasses.dataclass(frozen=True)
class WebOptions:
    """Options of one server. All servers of one database must have the same.

    data_dir       folder of keys, secret, and uploaded files unless ``storage`` is set
    public_url     URL at which clients reach the server, without a trailing slash; for addresses in webhooks and logs
    models         name in requests -> directory of a base; in addition to the released ones
    storage        fsspec address for uploaded files; default: ``files`` in data_dir
    is_open        whether requests need no key; only on loopback
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
    # Longest time without receiving a byte of a body.
    silent_seconds: float = 60.0
    link_seconds: int = 7 * 24 * 3600
    # Equal requests within this time return the first one's job, while it is unfinished.
    replay_seconds: float = 600.0
    keep_days: float | None = None
