"""The endpoint's application over a folder, in this process: with keys, and behind a real socket."""

import contextlib
import socket
import threading
import time
from pathlib import Path

import uvicorn

from sa3dist.serve.app import create_app
from sa3dist.serve.connections import Connection
from sa3dist.serve.job_store import JobStore
from sa3dist.serve.keys import Keys
from sa3dist.serve.server_options import DEFAULT_APP, WebOptions

PATH = f"/{DEFAULT_APP}"
REQUEST = {"audio_data_url": "data:application/zip;base64,UEsFBgAAAAAAAAAAAAAAAAAAAAAAAA==", "number_of_steps": 7}


@contextlib.contextmanager
def application(folder: Path, **options):
    """An application without limits on the disk, and its job store."""
    store = JobStore(f"sqlite:///{folder / 'jobs.db'}")
    yield create_app(WebOptions(**{"data_dir": folder, "min_free_bytes": 0, **options}), store), store
    store.close()


def key_headers(folder: Path, name: str, scope: str = "submit") -> dict[str, str]:
    """What a client with a new key sends."""
    return {"Authorization": f"Key {Keys(folder).add(name, scope)}"}


@contextlib.contextmanager
def listening(app):
    """The port at which uvicorn serves the application as `sa3dist serve` does."""
    config = uvicorn.Config(app, port=0, http=Connection, ws="none", log_config=None)
    server = uvicorn.Server(config)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        serving = threading.Thread(target=server.run, args=[[listener]])
        serving.start()
        try:
            while not server.started:
                assert serving.is_alive()
                time.sleep(0.01)
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            serving.join()
