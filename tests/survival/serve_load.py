"""A thousand submits, a hundred at a time, then hours of polling in minutes: what the endpoint's server does under it.

    python tests/survival/serve_load.py DIRECTORY [--seconds 600] [--rate 500] [--connections 200] [--jobs 1000]

Needs Debian's wrk. The server is a process of its own, with keys, on SQLite, and runs no job: all of them wait. Each
connection asks for the status of a random job and waits a random time, so that all together ask ``rate`` times a
second. Fails on any error, on a queue out of order and on growing memory; on the 99th percentile only where --p99 says
so, since a busy machine decides over that. It does not over the server's processor time per request.
"""

import argparse
import asyncio
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

from sa3dist.serve.keys import Keys  # noqa: E402
from sa3dist.serve.server_options import DEFAULT_APP, MIB  # noqa: E402
from tests.helpers.web_server import WebServer  # noqa: E402

AT_ONCE = 100
# What an allocator may keep of one minute's work and give back later.
FLAT_MIB = 8.0
LOOK_SECONDS = 1.0
# wrk asks ``delay`` before each request, and does not count it.
SCRIPT = """
local paths = {}
for line in io.lines("PATHS") do paths[#paths + 1] = line end
wrk.headers["Authorization"] = "Key KEY"
function request() return wrk.format("GET", paths[math.random(#paths)]) end
function delay() return math.random(0, MOST) end
function done(summary, latency, requests)
    local errors = 0
    for name, count in pairs(summary.errors) do errors = errors + count end
    io.write(string.format('{"requests": %d, "errors": %d, "seconds": %f, ', summary.requests, errors,
        summary.duration / 1e6))
    io.write(string.format('"p50_ms": %f, "p99_ms": %f, "most_ms": %f}\\n', latency:percentile(50) / 1e3,
        latency:percentile(99) / 1e3, latency.max / 1e3))
end
"""


async def submit_all(url: str, key: str, jobs: int) -> tuple[list[list[dict]], list[float]]:
    """Waves of ``AT_ONCE`` submits at once, each wave after the one before: what they were answered, with the priority
    they asked for; and the seconds each wave took."""
    limits = httpx.Limits(max_connections=AT_ONCE, max_keepalive_connections=AT_ONCE)
    headers = {"Authorization": f"Key {key}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=120) as client:
        stored = (await client.put("/files/clips.zip", content=b"clips")).json()["url"]

        async def submit(number: int) -> dict:
            priority = ("normal", "low")[number % 2]
            body = {"audio_data_url": stored, "seed": number}
            answer = await client.post(f"/{DEFAULT_APP}", json=body, headers={"X-Fal-Queue-Priority": priority})
            assert answer.status_code == 200, answer.text
            return answer.json() | {"priority": priority}

        waves, seconds = [], []
        for first in range(0, jobs, AT_ONCE):
            begin = time.monotonic()
            numbers = range(first, min(first + AT_ONCE, jobs))
            waves.append(list(await asyncio.gather(*map(submit, numbers))))
            seconds.append(time.monotonic() - begin)
    return waves, seconds


def is_in_order(url: str, key: str, waves: list[list[dict]]) -> bool:
    """Whether the queue has all normal ones before all low ones, and of equal ones those of earlier waves first."""
    places = []
    with httpx.Client(base_url=url, headers={"Authorization": f"Key {key}"}, timeout=60) as client:
        for wave, answers in enumerate(waves):
            for answer in answers:
                status = client.get(answer["status_url"]).json()
                places.append((status["queue_position"], answer["priority"] == "low", wave))
    places.sort()
    in_turn = [turn for _, *turn in places]
    return [place for place, *_ in places] == list(range(len(places))) and in_turn == sorted(in_turn)


def poll(url: str, key: str, waves: list[list[dict]], words: argparse.Namespace) -> list[str]:
    """The command that asks for their status as ``words`` say."""
    paths, script = words.directory / "paths.txt", words.directory / "poll.lua"
    paths.write_text("\n".join(answer["status_url"].removeprefix(url) for wave in waves for answer in wave))
    most = round(2000 * words.connections / words.rate)
    text = SCRIPT.replace("PATHS", str(paths)).replace("KEY", key).replace("MOST", str(most))
    script.write_text(text)
    script.chmod(0o600)
    asked = ["-t1", f"-c{words.connections}", f"-d{words.seconds}s", "--timeout", "30s", "-s", str(script), url]
    return ["wrk", *asked]


def busy_seconds(server: psutil.Process) -> float:
    times = server.cpu_times()
    return times.user + times.system


def measure(server: WebServer, command: list[str]) -> dict:
    """What wrk found, and what the server took meanwhile."""
    process = psutil.Process(server.process.pid)
    busy, sizes = busy_seconds(process), []
    polling = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while polling.poll() is None:
        sizes.append(process.memory_info().rss / MIB)
        time.sleep(LOOK_SECONDS)
    said = polling.stdout.read()
    assert polling.returncode == 0, said
    found = json.loads(said.splitlines()[-1])
    busy = busy_seconds(process) - busy
    third = max(len(sizes) // 3, 1)
    # The first third warms up.
    grown = statistics.median(sizes[-third:]) - statistics.median(sizes[third : 2 * third] or sizes)
    return found | {
        "rate": round(found["requests"] / found["seconds"], 1),
        "server_share_of_a_core": round(busy / found["seconds"], 4),
        "server_microseconds_per_request": round(1e6 * busy / max(found["requests"], 1), 1),
        "rss_mib": {"first": round(sizes[0], 1), "last": round(sizes[-1], 1), "most": round(max(sizes), 1)},
        "rss_grown_mib": round(grown, 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="made anew")
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--rate", type=int, default=500, help="requests a second, of all connections together")
    parser.add_argument("--connections", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--p99", type=float, metavar="MS", help="fail above that; for an idle machine")
    words = parser.parse_args()
    if shutil.which("wrk") is None:
        parser.error("wrk is not installed: apt-get install wrk")
    words.directory = words.directory.absolute()
    (words.directory / "data").mkdir(parents=True)
    key = Keys(words.directory / "data").add("load", "submit")
    server = WebServer(words.directory, None, "--slots", "0", "--min-free", "0")
    server.start()
    try:
        waves, seconds = asyncio.run(submit_all(server.url, key, words.jobs))
        found = {"accepted": sum(map(len, waves)), "slowest_wave_seconds": round(max(seconds), 2)}
        found["in_order"] = is_in_order(server.url, key, waves)
        found |= measure(server, poll(server.url, key, waves, words))
    finally:
        server.stop()
    print(json.dumps(found, indent=1))
    good = found["accepted"] == words.jobs and found["in_order"] and not found["errors"] and found["requests"]
    flat = found["rss_grown_mib"] < FLAT_MIB
    return 0 if good and flat and (words.p99 is None or found["p99_ms"] < words.p99) else 1


if __name__ == "__main__":
    sys.exit(main())
