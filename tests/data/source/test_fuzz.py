"""Mutated files of every kind under a memory limit: each is taken or refused in one line, never a crash."""

import json
import os
import subprocess
import sys

import pytest

from tests.helpers.golden import ROOT

# Every thread takes address space, which is limited here, and there would be one per core.
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

PROGRAM = """
import json, random, resource, sys
sys.path.insert(0, sys.argv[1])
from tests.helpers.clips import encode, tone, write_zip
from tests.helpers.fuzzing import mutated, outcome
from pathlib import Path
from sa3dist.data.source.pairing import pair_members
from sa3dist.data.source.archive import open_container
from sa3dist.data.source.audio import check_audio
from sa3dist.data.source.captions import read_caption
from sa3dist.inspection.measure import Measurement
from sa3dist.errors import DataError

folder = Path(sys.argv[2])
audio = [
    encode(tone(0.3, rate, channels), rate, container, subtype)
    for container, subtype, rate, channels in [
        ("WAV", "PCM_16", 44100, 1), ("WAV", "FLOAT", 48000, 2), ("FLAC", None, 44100, 2), ("OGG", "VORBIS", 44100, 1),
        ("OGG", "OPUS", 48000, 2), ("MP3", None, 44100, 1), ("AIFF", None, 22050, 1), ("RF64", None, 44100, 1),
        ("W64", None, 44100, 2), ("CAF", None, 44100, 1), ("AU", None, 44100, 1), ("AIFF", "FLOAT", 44100, 1),
    ]
]
texts = [
    (".json", json.dumps({"caption": "a tone", "tags": ["x", {"y": [1, 2.5, None]}]}).encode()),
    ("captions.csv", b'file,caption\\r\\nx.wav,"a, tone"\\r\\nsub/y.wav,other\\r\\n'),
    ("captions.jsonl", b'{"file": "x.wav", "text": "a tone"}\\n{"file": "y.wav", "caption": "b"}\\n'),
]
draw = random.Random(5)

check_audio(audio[2], Measurement())
used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
counts = {"taken": 0, "refused": 0}

def measure(data):
    measurement = Measurement()
    check_audio(data, measurement)
    measurement.finish()

for number in range(420):
    data = mutated(draw, audio[number % len(audio)])
    counts[outcome(lambda: measure(data))] += 1

def captions(source):
    with open_container(str(source), folder / "work") as container:
        listing = pair_members(container)
        assert all("\\n" not in line for line in listing.refusals)
        for pair in listing.pairs:
            read_caption(container, pair.caption)
        if listing.refusals:
            raise DataError(listing.refusals[0])

for number in range(180):
    name, data = texts[number % len(texts)]
    name = "x.json" if name == ".json" else name
    source = write_zip(folder / "a.zip", {"x.wav": b"", "sub/y.wav": b"", "y.wav": b"", name: mutated(draw, data)})
    counts[outcome(lambda: captions(source))] += 1
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - used
print(json.dumps(counts | {"grown": grown}))
"""


@pytest.mark.slow
def test_540_mutated_zips_tars_indices_and_latent_shards_are_taken_or_refused_in_lines(tmp_path):
    command = [sys.executable, "-m", "tests.helpers.fuzz_archives", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ONE_THREAD, cwd=ROOT)
    if done.returncode:
        pytest.fail(done.stderr[-2000:])
    result = json.loads(done.stdout)
    counts = result["counts"]
    assert sum(sum(ends.values()) for ends in counts.values()) == 540
    assert all(ends["refused"] > 10 and ends["taken"] for ends in counts.values()), counts
    # Nothing here is large; the interpreter with torch takes some 400 MB.
    assert result["peak"] < 1 << 30
    # Names like ../up led nowhere.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "work"]
    assert sorted(path.name for path in (tmp_path / "in").iterdir()) == [
        "a.tar",
        "a.zip",
        "good.zip",
        "latents",
        "made.tar",
    ]
    assert not [path for path in (tmp_path / "work").rglob("*") if path.name.startswith(("up", "root"))]


def test_600_mutated_files_are_taken_or_refused_in_one_line_within_bounded_memory(tmp_path):

    command = [sys.executable, "-c", PROGRAM, str(ROOT), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ONE_THREAD)
    if done.returncode:
        pytest.fail(done.stderr[-2000:])
    counts = json.loads(done.stdout)
    assert counts["taken"] + counts["refused"] == 600
    assert min(counts["taken"], counts["refused"]) > 60
    # What a damaged header may claim is bounded by the limits of one clip; here nothing was that large.
    assert counts["grown"] < 1 << 30
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]
