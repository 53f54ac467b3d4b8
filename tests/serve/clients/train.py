"""The Python client from PyPI as it is, led here by environment variables: what it sees, as one line of JSON."""

import asyncio
import json
import sys
import time

import fal_client
import fal_client.client
import httpx

server, hook, clips = sys.argv[1:]
# The two addresses that no variable sets.
module = sys.modules["fal_client.client"]
module.REST_URL, module.CDN_URL = f"{server}/rest", server
app = "fal-ai/stable-audio-3-trainer"
fields = {"number_of_steps": 2, "rank": 4, "base_precision": "fp32", "duration": 2}
seen: dict = {"version": fal_client.__version__, "updates": []}


def note(update) -> None:
    seen["updates"].append(type(update).__name__)
    seen["logs"] = len(getattr(update, "logs", None) or [])


def status_code(call) -> int:
    try:
        call()
    except fal_client.FalClientHTTPError as error:
        return error.status_code
    return 0


def write(name: str, size: int) -> bytes:
    # As a file: 1.0.0 cuts large bytes in memory down to their first part.
    data = bytes(range(256)) * (size >> 8)
    with open(name, "wb") as file:
        file.write(data)
    return data


async def asynchronous() -> dict:
    """The same with the client that waits for nothing, and with every header that says how to queue."""
    client = fal_client.AsyncClient()
    headers = {"X-Fal-Retry-Config": '{"server_error": {"retries": 2}}', "X-Fal-Tags": "team=sound"}
    words = {"hint": "warm", "priority": "low", "headers": headers}
    handle = await client.submit(app, {**fields, "seed": 3}, **words)
    events = [type(event).__name__ async for event in handle.iter_events(with_logs=True)]
    small, address = write("small.zip", 3 << 20), await client.upload_file("small.zip")
    found = httpx.get(address).content
    return {"end": events[-1], "files": sorted(await handle.get()), "small_is_whole": found == small}


fields["audio_data_url"] = fal_client.upload_file(clips)
done = fal_client.subscribe(app, fields, with_logs=True, on_queue_update=note)
lora = done["lora_file"]
with open("lora.safetensors", "wb") as file:
    file.write(httpx.get(lora["url"]).content)
seen["run"] = sorted(fal_client.run(app, {**fields, "audio_data_url": fal_client.encode_file(clips)}))
seen["refused"] = status_code(lambda: fal_client.submit(app, {**fields, "rank": 500}))
seen["unknown"] = status_code(lambda: fal_client.status(app, "0" * 32))
long = {**fields, "number_of_steps": 20000}
running = fal_client.submit(app, long, webhook_url=hook)
queued = fal_client.submit(app, {**long, "seed": 1})
while not isinstance(running.status(), fal_client.InProgress):
    time.sleep(0.1)
seen["waiting"] = type(queued.status()).__name__
queued.cancel()
seen["cancelled_queued"] = status_code(queued.get)
running.cancel()
seen["streamed"] = [type(event).__name__ for event in running.iter_events()][-1]
seen["cancelled_running"] = status_code(running.get)
seen["request"] = running.request_id
small, large = write("small.zip", 3 << 20), write("large.zip", 130 << 20)
seen["small_is_whole"] = httpx.get(fal_client.upload_file("small.zip")).content == small
seen["large_is_whole"] = httpx.get(fal_client.upload_file("large.zip")).content == large
seen["asynchronous"] = asyncio.run(asynchronous())
print(json.dumps(seen))
