"""The model card of an adapter: README.md with the hub's metadata, and the NOTICE of the base's licence.

A card contains no file names or paths of the data set, and its captions only on request.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sa3dist_kernels.adapter_types import ADAPTER_TYPES

from sa3dist.errors import counted, span
from sa3dist.formats import digest_of
from sa3dist.model.released import RELEASED

LICENCE_NAME, LICENCE_LINK = "stability-ai-community-license", "https://stability.ai/license"
LIBRARY = "stable-audio-3"
# The licence, part IV (a), requires both sentences verbatim, and a NOTICE that states what was changed and how.
ATTRIBUTION = "Powered by Stability AI"
NOTICE = (
    "This Stability AI Model is licensed under the Stability AI Community License, "
    "Copyright \N{COPYRIGHT SIGN} Stability AI Ltd. All Rights Reserved"
)
# Settings in the card's table, and their labels.
SHOWN = {
    "number_of_steps": "steps asked for",
    "learning_rate": "learning rate",
    "lr_scheduler": "schedule",
    "warmup_steps": "warm-up steps",
    "duration": "crop in seconds",
    "weight_decay": "weight decay",
    "prompt_dropout": "prompt dropout",
    "base_precision": "base precision",
    "mixed_precision": "mixed precision",
    "seed": "seed",
}
# Characters with a meaning in a line of Markdown; the colon makes addresses into links.
_MARKUP = set("\\`*_[](){}<>&|~$#@:^")
_MARK = re.compile(r"<!-- written by sa3dist ([0-9a-f]{64}) -->\n\Z")


@dataclasses.dataclass(frozen=True)
class Preview:
    """A preview, and the base's preview with the same prompt and noise. Paths are relative to the card.

    prompt   None if it is a caption that must not be shown
    """

    audio: str
    base: str | None
    picture: str | None
    prompt: str | None


def write(description: dict[str, Any], previews: Sequence[Preview], curves: str | None, files: Sequence[str]) -> str:
    """The text of README.md.

    description   content of config.json
    curves        path of the picture of losses, if there is one
    files         names of the adapter files
    """
    body = "\n\n".join(
        [
            *_what_it_is(description, files),
            *_listen(previews, description["step"]),
            *_use(description),
            *_training(description, curves),
            *_versions(description),
            *_licence(),
        ]
    )
    card = f"---\n{_metadata(description, previews)}\n---\n\n{body}\n\n"
    return f"{card}<!-- written by sa3dist {digest_of(card)} -->\n"


def is_as_written(text: str) -> bool:
    """Whether a card is unchanged since ``write`` made it."""
    mark = _MARK.search(text)
    return mark is not None and mark[1] == digest_of(text[: mark.start()])


def plain(text: str) -> str:
    """``text`` as one line of Markdown, escaped."""
    return "".join(f"\\{c}" if c in _MARKUP else c for c in " ".join(text.split()))


def hub_base(description: dict[str, Any]) -> str | None:
    """The hub's name of the base; None if the base was a directory."""
    return RELEASED.get(description["base_model"])


def notice(description: dict[str, Any]) -> str:
    """The text of NOTICE: the attribution, what was changed in the base and how, and a link to the licence."""
    config = description["lora_config"]
    program = f"sa3dist {description.get('sa3dist_version', '')}".strip()
    return (
        f"{NOTICE}\n\n"
        f"This adapter is derived from these Stability AI Materials: "
        f"{hub_base(description) or 'a base of Stable Audio 3'}. What was changed: an adapter (type "
        f"{config['adapter_type']}, rank {config['rank']}) was trained on other audio for "
        f"{counted(description['step'], 'step')}, with {program}. The weights of the Materials were not changed. A "
        f"program that loads the adapter, or merges it into the Materials, changes what they do.\n\n"
        f"The licence: {LICENCE_LINK}\n{ATTRIBUTION}\n"
    )


def _metadata(description: dict[str, Any], previews: Sequence[Preview]) -> str:
    from huggingface_hub import ModelCardData

    base = hub_base(description)
    shown = [preview for preview in previews if preview.prompt is not None]
    data = ModelCardData(
        license="other",
        license_name=LICENCE_NAME,
        license_link=LICENCE_LINK,
        library_name=LIBRARY,
        pipeline_tag="text-to-audio",
        base_model=base,
        base_model_relation="adapter" if base else None,
        tags=["lora", "stable-audio-3", "sa3dist"],
        widget=[{"text": preview.prompt or " ", "output": {"url": preview.audio}} for preview in shown] or None,
    )
    return data.to_yaml(line_break="\n")


def _what_it_is(description: dict[str, Any], files: Sequence[str]) -> list[str]:
    base = hub_base(description)
    of = f"[{base}](https://huggingface.co/{base})" if base else "a base of Stable Audio 3"
    config = description["lora_config"]
    names = " and ".join(f"`{name}`" for name in files)
    return [
        f"# {plain(description['settings']['name'])}",
        f"An adapter (`{config['adapter_type']}`, rank {config['rank']}, alpha {config['alpha']}) for {of}, a model "
        f"that makes audio from text, after {counted(description['step'], 'step')} of training: {names}.",
        ATTRIBUTION,
    ]


def _player(path: str) -> str:
    return f'<audio controls src="{path}"><a href="{path}">{path}</a></audio>'


def _listen(previews: Sequence[Preview], step: int) -> list[str]:
    if not previews:
        return []
    lines = [f"| prompt | base | step {step} | spectrogram |", "|---|---|---|---|"]
    for preview in previews:
        prompt = "a caption of the data set" if preview.prompt is None else plain(preview.prompt) or "(empty)"
        cells = [prompt, preview.base and _player(preview.base), _player(preview.audio)]
        cells.append(preview.picture and f"![spectrogram]({preview.picture})")
        lines.append(f"| {' | '.join(cell or '' for cell in cells)} |")
    return ["## Listen", "The base's clip and the adapter's begin with the same noise.", "\n".join(lines)]


def _use(description: dict[str, Any]) -> list[str]:
    kind, base = ADAPTER_TYPES[description["lora_config"]["adapter_type"]], description["base_model"]
    name = base if base in RELEASED else "path/to/the/base"
    native = (
        f'import sa3dist\n\nbase = sa3dist.load_base("{name}", device="cuda")\n'
        'sa3dist.load_adapter(base, "lora.safetensors", strength=1.0)\n'
        'audio = base.generate(["a prompt"], seconds=20)'
    )
    port = (
        "sa3dist export lora.safetensors --format diffusers --output peft/\n\n"
        'PeftModel.from_pretrained(pipe.transformer, "peft/transformer")\n'
        'PeftModel.from_pretrained(pipe.duration_embedder, "peft/duration_embedder")'
    )
    comfy = "comfy-diff" if kind.rows and kind.cols else "comfy"
    refused = f"cannot say what `{kind.name}` does; merge it instead."
    return [
        "## Use",
        "`lora.safetensors` is in Stable Audio 3's own format: its inference loads the file as it is. With sa3dist:",
        f"```python\n{native}\n```",
        f"**ComfyUI** silently ignores this format. `sa3dist export lora.safetensors --format {comfy}` writes a file "
        f"that it loads; it cannot load layers of `conditioners`.",
        f"**PEFT**: {refused}"
        if kind.cols
        else "**PEFT**: `sa3dist export lora.safetensors --format peft --output peft/`",
        f"**diffusers**, through PEFT: {refused}" if kind.cols else f"**diffusers**, through PEFT:\n\n```\n{port}\n```",
        f"**Merged** into a base, for any program: `sa3dist merge lora.safetensors --base {name} --output merged/`",
        "`sa3dist verify FILE --for PROGRAM` tells whether a program takes every layer of a file.",
    ]


def _table(rows: dict[str, Any]) -> str:
    lines = ["| | |", "|---|---|"]
    for name, value in rows.items():
        if value is not None:
            lines.append(f"| {name} | {plain(', '.join(value) if isinstance(value, list) else str(value))} |")
    return "\n".join(lines)


def _training(description: dict[str, Any], curves: str | None) -> list[str]:
    settings, config = description["settings"], description["lora_config"]
    clips, seconds = description.get("dataset_clips"), description.get("dataset_seconds")
    data = "A stream of captioned clips." if clips is None else f"{counted(clips, 'captioned clip')}"
    if clips is not None:
        data += f", {span(seconds)} of audio in all." if seconds else "."
    skipped = len(description.get("skipped_clips") or ())
    if skipped:
        data += f" {counted(skipped, 'clip')} that could not be used {'was' if skipped == 1 else 'were'} left out."
    rows = {
        "steps": description["step"],
        "epochs": description.get("epoch"),
        "clips per step": description.get("effective_batch_size"),
        "adapted layers": config.get("include"),
        "left out": config.get("exclude"),
        "began from": "another adapter" if settings.get("lora_checkpoint_url") else None,
        **{words: settings.get(key) for key, words in SHOWN.items()},
    }
    return ["## Training", data, _table(rows), *([f"![Loss over the steps]({curves})"] if curves else [])]


def _versions(description: dict[str, Any]) -> list[str]:
    names = {"sa3dist": "sa3dist_version", "torch": "torch_version"}
    return ["## Versions", _table({name: description.get(key) for name, key in names.items()})]


def _licence() -> list[str]:
    return [
        "## Licence",
        f"That of the base: [Stability AI Community License]({LICENCE_LINK}); see `NOTICE`. The training clips have "
        f"their own rights.",
    ]


def read(path: Path) -> str | None:
    """The text of a card; None if it does not exist."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
