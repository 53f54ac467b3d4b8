"""`sa3dist serve`: run the hosted endpoint on your own machine, and manage its keys."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from sa3dist.data.remote.local_paths import home_path
from sa3dist.errors import ConfigError
from sa3dist.runtime.exit_status import MANY, command, number, positive
from sa3dist.serve.keys import SCOPES, Keys
from sa3dist.serve.options import RunOptions, gpus_here, shared_work_dir
from sa3dist.serve.processes import locks_folder

if TYPE_CHECKING:
    from sa3dist.serve.server_options import WebOptions

# Default number of jobs submitted to a cluster at a time. Each needs a local process; the cluster has its own queue.
CLUSTER_SLOTS = 8
LOOPBACK = ("127.0.0.1", "localhost", "::1")
ABOUT = "Serve the endpoint; `sa3dist serve keys --help` makes keys for it."


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["keys"]:
        return command("sa3dist serve keys", KEY_ARGUMENTS, keys, description="Keys of the endpoint.")(words[1:])
    return command("sa3dist serve", ARGUMENTS, serve, description=ABOUT)(words)


def _model(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=DIRECTORY")
    return name, str(home_path(path).absolute())


_natural = number(int, 0, MANY)
# At most a hundred years.
_days = number(float, 0.001, 36_500)
STATE = {
    "type": home_path,
    "dest": "data_dir",
    "default": argparse.SUPPRESS,
    "metavar": "DATA_DIR",
    "help": "another name of --data-dir",
}
ARGUMENTS = {
    "--model": {
        "type": _model,
        "nargs": "+",
        "action": "extend",
        "default": [],
        "metavar": "NAME=DIR",
        "help": "directory of the base that requests call NAME; may repeat",
    },
    "--host": {"default": "127.0.0.1", "help": "default %(default)s; beyond loopback a key is needed"},
    "--port": {"type": number(int, 1, 65_535), "default": 8000, "help": "default %(default)s"},
    "--public-url": {"help": "how clients reach the server, behind a proxy for instance"},
    "--data-dir": {"type": home_path, "default": Path("sa3dist-serve"), "help": "of all files (default %(default)s)"},
    "--state": STATE,
    "--database": {"help": "sqlite:///FILE or postgresql://...; unset = jobs.db in data-dir"},
    "--storage": {"help": "fsspec address of uploaded files; unset = files in data-dir"},
    "--slots": {
        "type": number(int, 0, 1024),
        "help": f"jobs at once, 0 = none here; unset = by GPUs, one without, {CLUSTER_SLOTS} on a cluster",
    },
    "--executor": {"choices": ["local", "slurm", "kubernetes"], "default": "local", "help": "who runs the jobs"},
    "--device": {"choices": ["cpu", "cuda"], "help": "where jobs train; default cuda if there is one"},
    "--nodes": {"type": positive, "default": 1, "metavar": "N", "help": "of each job (slurm, kubernetes)"},
    "--gpus": {"type": positive, "default": 1, "metavar": "N", "help": "of each job, on each of its nodes"},
    "--option": {"action": "append", "default": [], "help": "for sbatch, or image= cpu= ... (kubernetes); may repeat"},
    "--stop-jobs": {
        "action": "store_true",
        "help": "SIGTERM makes jobs save and end, too; for containers",
    },
    "--set": {"action": "append", "default": [], "metavar": "KEY=VALUE", "help": "a default of the trainer here"},
    "--tls": {"action": "store_true", "help": "make a certificate authority and serve https"},
    "--allow-private-data": {"action": "store_true", "help": "take data addresses of this machine's network"},
    "--allow-private-webhooks": {"action": "store_true", "help": "call webhooks in this machine's network"},
    "--max-queue": {"type": _natural, "help": "refuse submits while more jobs wait"},
    "--keep-days": {"type": _days, "help": "delete finished jobs, and uploads that none needs, after; unset = never"},
    "--min-free": {"type": _natural, "default": 1, "metavar": "GIB", "help": "space to stay free; default %(default)s"},
}
KEY_ARGUMENTS = {
    "action": {"choices": ["add", "list", "remove"]},
    "name": {"nargs": "?", "default": "", "help": "of a new key, or the id of one to remove"},
    "--scope": {"choices": SCOPES, "default": "submit", "help": "admin sees everybody's jobs"},
    "--data-dir": {"type": home_path, "default": Path("sa3dist-serve"), "help": "the server's (default %(default)s)"},
    "--state": STATE,
}


def keys(options: argparse.Namespace) -> None:
    """Make, list or remove a key."""
    store = Keys(options.data_dir)
    if options.action == "add":
        print(store.add(options.name, options.scope))
    elif options.action == "remove":
        store.remove(options.name)
    else:
        for key_id, entry in store.read().items():
            created = time.strftime("%Y-%m-%d", time.localtime(entry["created"]))
            print(f"{key_id}  {entry['scope']:<6}  {created}  {entry['name']}")


def serve(options: argparse.Namespace) -> None:
    """Run the server and the scheduler until a signal comes. Running jobs continue."""
    try:
        import uvicorn

        from sa3dist.serve.addresses import HOSTS
        from sa3dist.serve.app import create_app
        from sa3dist.serve.connections import HEAD_SECONDS, Connection
        from sa3dist.serve.job_store import JobStore
        from sa3dist.serve.monitoring import log_as_json
        from sa3dist.serve.scheduler import Scheduler
        from sa3dist.serve.tls import make_certificates
    except ModuleNotFoundError as error:
        raise ConfigError(f"serve: needs {error.name}; pip install 'sa3dist[serve]'") from error
    data = options.data_dir.absolute()
    host = socket.gethostname() if options.host in ("0.0.0.0", "::") else options.host
    url = (options.public_url or f"{'https' if options.tls else 'http'}://{host}:{options.port}").rstrip("/")
    web, runs = web_options(options, data, url), run_options(options, data)
    require_free(options.host, options.port)
    data.mkdir(parents=True, exist_ok=True)
    tls, authority = {}, None
    if options.tls:
        authority, server = make_certificates(data / "tls", {*LOOPBACK, socket.gethostname(), host, *HOSTS})
        tls = {"ssl_certfile": str(server)}
    log_as_json()
    store = JobStore(options.database or f"sqlite:///{data / 'jobs.db'}", data / "jobs")
    app = create_app(web, store)
    scheduler = Scheduler(store, runs, options.keep_days)
    network = {"host": options.host, "port": options.port, "log_config": None, "access_log": False, **tls}
    network |= {"http": Connection, "ws": "none", "timeout_keep_alive": HEAD_SECONDS}
    config = uvicorn.Config(app, timeout_graceful_shutdown=10, **network)
    print(instructions(url, authority), flush=True)
    _run(uvicorn.Server(config), app.state.service.stopping, scheduler)
    if options.stop_jobs:
        scheduler.stop_jobs()


def require_free(host: str, port: int) -> None:
    """Raises ConfigError if the port cannot be used. uvicorn would exit with its own code, or not at all."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"port: cannot listen at {host}:{port}; choose another --port or --host ({error})") from error


def web_options(options: argparse.Namespace, data: Path, url: str) -> WebOptions:
    """The web server's options. Raises ConfigError."""
    from sa3dist.serve.server_options import GIB, WebOptions

    models = dict(options.model)
    for name, path in models.items():
        if not (Path(path) / "model_config.json").is_file():
            how = "give a base's directory; python -m sa3dist.commands.demo --prepare makes demo/base"
            raise ConfigError(f"model: {name}: {path} has no model_config.json; {how}")
    is_open = not Keys(data).read()
    for name, host in (("host", options.host), ("public_url", urlsplit(url).hostname)):
        if is_open and host not in LOOPBACK:
            raise ConfigError(f"{name}: {host} is not loopback, a key is needed; sa3dist serve keys add NAME")
    return WebOptions(
        data_dir=data,
        public_url=url,
        models=models,
        storage=options.storage,
        is_open=is_open,
        allow_private_data=options.allow_private_data,
        allow_private_webhooks=options.allow_private_webhooks,
        max_queue=options.max_queue,
        keep_days=options.keep_days,
        min_free_bytes=options.min_free * GIB,
    )


def _run(server, stopping, scheduler) -> None:
    stop = threading.Event()
    scheduling = threading.Thread(target=scheduler.run, args=[stop], name="scheduler")
    handle_exit = server.handle_exit

    def end_streams(number, frame) -> None:
        # Tell open streams to end, so that they do not delay the shutdown.
        stopping.set()
        handle_exit(number, frame)

    server.handle_exit = end_streams
    # uvicorn raises the signal again after its shutdown; with the default handler that would kill this process.
    signal.signal(signal.SIGTERM, end_streams)
    scheduling.start()
    try:
        with contextlib.suppress(KeyboardInterrupt):
            server.run()
    finally:
        stop.set()
        scheduling.join()


def run_options(options: argparse.Namespace, data: Path) -> RunOptions:
    """The scheduler's options. Raises ConfigError."""
    from sa3dist.config import build, read_arguments

    settings = read_arguments(options.set)
    # Check them now, rather than in every job.
    build({"audio_data_url": "unknown", **settings})
    is_local = options.executor == "local"
    gpus = gpus_here() if is_local and options.device != "cpu" else ()
    if is_local and options.device == "cuda" and not gpus:
        raise ConfigError("device: cuda, but this host has no GPU; leave --device out or use cpu")
    if options.device == "cpu" and options.executor == "kubernetes":
        raise ConfigError("device: cpu needs --executor local or slurm")
    if is_local and options.nodes > 1:
        raise ConfigError(f"nodes: {options.nodes} need --executor slurm or kubernetes")
    if is_local and options.gpus > max(len(gpus), 1):
        raise ConfigError(f"gpus: {options.gpus} for each job, this host has {len(gpus)}")
    without_gpus = ["--gpus-per-node=0"] if options.executor == "slurm" and options.device == "cpu" else []
    slots = options.slots if options.slots is not None or is_local else CLUSTER_SLOTS
    return RunOptions(
        executor=options.executor,
        devices=gpus or tuple(range(slots or 1)),
        gpus=bool(gpus),
        devices_per_job=options.gpus,
        nodes=options.nodes,
        limit=slots,
        work_dir=shared_work_dir(data),
        locks=str(locks_folder()),
        host=socket.gethostname(),
        models=dict(options.model),
        settings=json.loads(json.dumps(settings)),
        # Slurm takes the last of options that contradict each other.
        options=(*without_gpus, *options.option),
    )


def instructions(url: str, authority: Path | None) -> str:
    """What to set in each client to use the server at ``url``."""
    host = url.partition("://")[2]
    python = (
        [f"export FAL_RUN_HOST={host}/run", f"export FAL_QUEUE_RUN_HOST={host}", f"export SSL_CERT_FILE={authority}"]
        if authority
        else [f"sa3dist.fal_env({url!r})   # before using fal_client; or start with --tls and export three variables"]
    )
    proxy = f'{{proxyUrl: {{url: "{url}/api/fal/proxy", when: "always"}}}}'
    lines = [
        f"serving at {url}, with a page for people: {url}/",
        "Python:",
        *(f"  {line}" for line in python),
        "JavaScript:",
        f"  fal.config({proxy})",
    ]
    post = f"curl -X POST {url}/fal-ai/stable-audio-3-trainer -H 'Content-Type: application/json' -d @request.json"
    return "\n".join([*lines, "curl:", f"  {post}"])
