"""540 mutated archives, indices and latent shards, under a limit on memory; prints what became of them as JSON.

python tests/helpers/fuzz_archives.py FOLDER
"""

import io
import json
import random
import resource
import sys
import zipfile
from pathlib import Path

import torch

from sa3dist.data.latents.cache import EncodedClips
from sa3dist.data.latents.shards import FLIPPED, LATENTS, PROMPT
from sa3dist.data.latents.source import read_latents
from sa3dist.data.remote.disk_cache import ClipCache
from sa3dist.data.source.archive import open_container
from sa3dist.data.source.build import build_shards
from sa3dist.data.source.captions import read_caption
from sa3dist.data.source.index_check import index_faults
from sa3dist.data.source.pairing import pair_members
from sa3dist.data.source.shard_split import describe
from sa3dist.errors import DataError
from sa3dist.formats import INDEX_NAME, DatasetIndex, dataset_digest
from tests.helpers.clips import captioned, write_tar
from tests.helpers.fuzzing import forged, mutated, outcome
from tests.helpers.latent_sets import ENCODERS, Framing, write_set

MEMORY_BYTES = 6 << 30
EACH = {"zip": 160, "tar": 120, "index": 100, "latent index": 100, "latent shard": 60}


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def zipped(members):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


def misnamed(draw, data):
    """Now and then a name of the same length that points elsewhere."""
    other = draw.choice([b"../up", b"/root", b"a/../", b"clip0"])
    return data.replace(b"clip1", other) if draw.random() < 0.2 else data


def shard(source, work):
    build_shards(str(source), work, allow_any_dataset_size=True, num_workers=1)


def read_all(source, work):
    with open_container(str(source), work) as container:
        listing = pair_members(container)
        for line in listing.refusals:
            raise DataError(line)
        for pair in listing.pairs:
            read_caption(container, pair.caption)
            container.read(pair.audio)


def use_index(directory):
    index = DatasetIndex.read(directory)
    for fault in index_faults(index):
        raise DataError(fault)
    if index.clips:
        describe(index)
        dataset_digest(index.clips)


def use_latents(tar, work):
    index = read_latents(str(tar), [(str(tar), str(tar.with_suffix(".json")), 0)], ClipCache(work / "clip-cache", 0))
    encoded = EncodedClips(index, work, Framing, ENCODERS.autoencoder, ENCODERS.text_encoder)
    encoded.add_shards(index.latent_shards)
    for clip in index.clips:
        for kind in (LATENTS, FLIPPED, PROMPT):
            encoded.member(clip, kind)


def main(folder):
    draw = random.Random(11)
    torch.set_num_threads(1)
    inputs, work = folder / "in", folder / "work"
    members = captioned(3, seconds=0.02) | {"song.m4a": b"x", "note.pdf": b"x"}
    archive, tar = zipped(members), write_tar(put(folder / "in/made.tar", b""), members).read_bytes()
    made = build_shards(str(put(inputs / "good.zip", archive)), work / "good", allow_any_dataset_size=True)
    index = (made.directory / INDEX_NAME).read_bytes()
    (latents,) = write_set(put(inputs / "latents/x", b"").parent, [3])
    latent_index, latent_tar = latents.with_suffix(".json").read_bytes(), latents.read_bytes()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))

    def broken_index(data):
        return forged(draw, data) if draw.random() < 0.6 else mutated(draw, data)

    def latents_of(index_bytes, tar_bytes):
        put(latents.with_suffix(".json"), index_bytes)
        use_latents(put(latents, tar_bytes), work)

    tries = {
        "zip": lambda: shard(put(inputs / "a.zip", mutated(draw, misnamed(draw, archive), 60)), work),
        "tar": lambda: read_all(put(inputs / "a.tar", mutated(draw, misnamed(draw, tar), 512)), work),
        "index": lambda: use_index(put(work / "index" / INDEX_NAME, broken_index(index)).parent),
        "latent index": lambda: latents_of(broken_index(latent_index), latent_tar),
        "latent shard": lambda: latents_of(latent_index, flipped(draw, latent_tar)),
    }
    counts = {}
    for kind, work_of in tries.items():
        ends = [outcome(work_of) for _ in range(EACH[kind])]
        counts[kind] = {end: ends.count(end) for end in ("taken", "refused")}
    # Not ru_maxrss: across exec Linux keeps what the process that started this one held.
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    print(json.dumps({"counts": counts, "peak": peak}))


def flipped(draw, data):
    """As long as before, so that the tar is looked into at all."""
    data = bytearray(data)
    for _ in range(draw.randrange(1, 4)):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(data)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
