"""`sa3dist generate`: make audio from prompts, with a base and optional adapters."""

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sa3dist import __version__
from sa3dist.adapters import AdapterFile, bake_adapter, load_adapter_file
from sa3dist.commands.base_option import base_of_adapter
from sa3dist.commands.export import read_source
from sa3dist.commands.merge import split_weight
from sa3dist.data.remote.local_paths import expand_home, is_text
from sa3dist.data.source.cut_captions import cut_captions
from sa3dist.errors import ConfigError, OutOfMemory
from sa3dist.formats import write_json
from sa3dist.listening.audio_files import FORMATS, check_format, write_audio
from sa3dist.model.base import Base
from sa3dist.model.checkpoint import tensors_digest
from sa3dist.model.generation import Generation
from sa3dist.model.loading import known_config, load_base
from sa3dist.progress import progress
from sa3dist.runtime.exit_status import command

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EPILOG = """\
  sa3dist generate --model medium-base --prompt "a slow piano" "rain on a roof" --seconds 20 --output base/
  sa3dist generate --adapter runs/drums --prompt "a drum loop" --seconds 10 --output drums/
      a run's newest checkpoint on the base that it names; a checkpoint's folder and an adapter file do as well
  sa3dist generate --adapter a.safetensors=0.7 b.safetensors=0.3 --prompt "a drum loop" --seconds 10 --output both/
      one after the other, as Stable Audio 3 stacks them; strength 0 is the base itself"""


ARGUMENTS = {
    "--model": {"metavar": "MODEL", "help": "released name or directory; default the one the adapter names"},
    "--adapter": {
        "nargs": "+",
        "action": "extend",
        "default": [],
        "metavar": "PATH[=STRENGTH]",
        "help": "adapter file, run or checkpoint folder; a strength is 1 when left out",
    },
    "--prompt": {"nargs": "+", "action": "extend", "required": True, "metavar": "TEXT", "help": "one clip for each"},
    "--seconds": {"type": float, "required": True, "help": "length of every clip"},
    "--steps": {"type": int, "help": "default 50, or 8 for a post-trained model"},
    "--cfg": {"type": float, "help": "guidance scale; default 7, or 1 for a post-trained model"},
    "--seed": {"type": int, "default": 0, "help": "of the noise, together with a clip's number; default 0"},
    "--output": {"type": Path, "required": True, "help": "folder of the clips"},
    "--format": {"choices": list(FORMATS), "default": "flac", "help": "default flac"},
    "--device": {"choices": ["cpu", "cuda"], "help": "default cuda where there is one"},
    "--precision": {"choices": list(PRECISIONS), "help": "of the model; default bf16 on cuda, fp32 on cpu"},
    "--text-encoder": {"metavar": "DIR", "help": "where T5Gemma is, when not beside the model"},
}


def generate(options: argparse.Namespace) -> None:
    """``make_clips``, with advice if it runs out of memory."""
    try:
        make_clips(options)
    except torch.OutOfMemoryError:
        raise OutOfMemory("out of memory; fewer --seconds, a narrower --precision or --device cpu may fit") from None


def make_clips(options: argparse.Namespace) -> None:
    check_format(options.format)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device: torch finds no CUDA device here; use cpu")
    if not all(map(is_text, options.prompt)):
        raise ConfigError("--prompt: holds bytes that are not UTF-8; type it in a UTF-8 terminal")
    weighted = map(split_weight, options.adapter)
    adapters = [(read_source(Path(expand_home(path)))[0], strength) for path, strength in weighted]
    if not options.model and not any(file.base for file, _ in adapters):
        raise ConfigError("--model: is needed, as no adapter names its base; give a released name or a directory")
    first = adapters[0][0].path if adapters else Path()
    model = base_of_adapter(first, options.model, [file.base for file, _ in adapters], "--model")
    how = read_how(options, model)
    output = Path(expand_home(options.output))
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output: {output} is a file, expected a folder; choose another")
    precision = options.precision or ("bf16" if device == "cuda" else "fp32")
    other = {"precision": precision, "text_encoder": options.text_encoder}
    descriptions = describe(options.prompt, how, model, adapters, other)
    todo = [number for number in descriptions if not is_done(output, number, descriptions[number], options.format)]
    if todo:
        base = load_base(model, device, PRECISIONS[precision], options.text_encoder, encoder=False)
        cut = base.text_source and cut_captions(
            base.text_source, ((f"prompt {number}", descriptions[number]["prompt"]) for number in todo)
        )
        if cut and cut.tokens:
            print(f"note: {cut.line()}", file=sys.stderr)
        for file, strength in adapters:
            load_adapter_file(base, file, strength)
            bake_adapter(base)
        write_clips(base, how, output, {number: descriptions[number] for number in todo}, options.format)
    existing = "; the others were there" if len(todo) < len(descriptions) else ""
    print(f"wrote {output}: {len(todo)} of {len(descriptions)} clips{existing}")


def read_how(options: argparse.Namespace, model: str) -> Generation:
    config = known_config(model)
    steps, cfg_scale = (8, 1.0) if config.post_trained else (Generation.steps, Generation.cfg_scale)
    steps = steps if options.steps is None else options.steps
    how = Generation(options.seconds, steps, cfg_scale if options.cfg is None else options.cfg, options.seed)
    how.check(config)
    return how


def describe(
    prompts: Sequence[str],
    how: Generation,
    model: str,
    adapters: Sequence[tuple[AdapterFile, float]],
    other: dict[str, Any],
) -> dict[int, dict[str, Any]]:
    """The content of the JSON file of every clip, by number: everything that affects its sound.

    other   further values that do
    """
    parts = [
        {"file": str(file.path), "strength": strength, "sha256": tensors_digest(file.tensors)}
        for file, strength in adapters
    ]
    shared = {**dataclasses.asdict(how), "model": model, **other, "adapters": parts, "sa3dist_version": __version__}
    return {number: {"prompt": prompt, "number": number, **shared} for number, prompt in enumerate(prompts)}


def is_done(output: Path, number: int, description: dict[str, Any], suffix: str) -> bool:
    """Whether an earlier call has written this clip. Raises ConfigError if another request has written its files."""
    audio, json_file = output / f"{number}.{suffix}", output / f"{number}.json"
    same = False
    with contextlib.suppress(OSError, ValueError):
        # It is written before the audio, so existing audio fits it.
        same = json.loads(json_file.read_text(encoding="utf-8")) == description
    for path in (audio, json_file):
        if path.exists() and not same:
            raise ConfigError(f"--output: {path} exists already, of another request; choose a new directory")
    return same and audio.exists()


def write_clips(
    base: Base, how: Generation, output: Path, descriptions: dict[int, dict[str, Any]], suffix: str
) -> None:
    prompts = [(number, description["prompt"]) for number, description in descriptions.items()]
    with progress("generate", len(prompts), shown=True) as update:
        for done, (number, audio_CN) in enumerate(how.clips(base, prompts), start=1):
            write_json(output / f"{number}.json", descriptions[number])
            write_audio(output / f"{number}.{suffix}", audio_CN, base.sample_rate_hz)
            update(done)


# Exit code 0 when written; 2, with one line and nothing written, if this cannot be generated.
main = command(
    "sa3dist generate",
    ARGUMENTS,
    generate,
    description="Make audio from prompts: OUTPUT/0.flac with 0.json, 1.flac ...",
    epilog=EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
)
