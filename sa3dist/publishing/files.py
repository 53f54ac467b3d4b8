"""Choose the files of a run to publish with its adapter, and write the card next to them."""

import contextlib
import json
import logging
import re
from pathlib import Path
from typing import Any

from sa3dist.errors import CheckpointError, ConfigError
from sa3dist.formats import BEST_ADAPTER_NAME, RUN_CONFIG_NAME, write_whole
from sa3dist.publishing import card, curves
from sa3dist.training.row_files import METRICS_NAME, read_rows

log = logging.getLogger(__name__)

LORA_NAME = "lora.safetensors"
CARD_NAME, NOTICE_NAME, CURVES_NAME = "README.md", "NOTICE", "curves.svg"
# The adapter of the last step, and the best one if the run kept it.
ADAPTERS = (LORA_NAME, BEST_ADAPTER_NAME)
_STEP = re.compile(r"step-(\d{8})")


def describe(folder: Path) -> dict[str, Any]:
    """The content of config.json next to the adapter. Raises CheckpointError if there is no finished adapter."""
    if not (folder / LORA_NAME).is_file():
        raise CheckpointError(
            f"{folder}: no {LORA_NAME}: the run has not ended; sa3dist export {folder} writes one of its newest "
            f"checkpoint"
        )
    path = folder / RUN_CONFIG_NAME
    with contextlib.suppress(OSError, ValueError, AttributeError):
        description = json.loads(path.read_text(encoding="utf-8"))
        if {"settings", "lora_config", "step", "base_model"} <= description.keys():
            return description
    raise CheckpointError(f"{path}: not the {RUN_CONFIG_NAME} of a run; sa3dist export {folder} writes it")


def previews_of(folder: Path, description: dict[str, Any], with_captions: bool) -> list[card.Preview]:
    """The newest previews of the adapter, each with the base's preview if it exists.

    with_captions   also show prompts that are captions of the data set
    """
    steps = {int(match[1]): path for path in folder.glob("previews/*") if (match := _STEP.fullmatch(path.name))}
    newest = max((step for step in steps if 0 < step <= description["step"]), default=None)
    if newest is None:
        return []
    may_show = with_captions or bool(description["settings"].get("preview_prompts"))
    previews = []
    for audio in sorted(steps[newest].glob("*.flac"), key=lambda path: (len(path.name), path.name)):
        prompt = None
        with contextlib.suppress(OSError, ValueError, KeyError):
            prompt = str(json.loads(audio.with_suffix(".json").read_text(encoding="utf-8"))["prompt"])
        files = [audio, folder / "previews/step-00000000" / audio.name, audio.with_suffix(".png")]
        paths = [path.relative_to(folder).as_posix() if path.is_file() else None for path in files]
        previews.append(card.Preview(*paths, prompt if may_show or prompt == "" else None))
    return previews


def make(folder: Path, with_captions: bool = False) -> dict[str, str]:
    """The text files to publish with the adapter, by name. Writes nothing. Raises like ``describe``."""
    description = describe(folder)
    rows = read_rows(folder / METRICS_NAME)
    picture = curves.draw([row for row in rows if row.get("step", 0) <= description["step"]])
    adapters = [name for name in ADAPTERS if (folder / name).is_file()]
    previews = previews_of(folder, description, with_captions)
    text = card.write(description, previews, CURVES_NAME if picture else None, adapters)
    return {CARD_NAME: text, NOTICE_NAME: card.notice(description)} | ({CURVES_NAME: picture} if picture else {})


def write_beside(folder: Path, with_captions: bool = False) -> None:
    """Write README.md, NOTICE and curves.svg. A card edited or written by hand is not changed.

    Raises ConfigError if captions were requested in such a card; also like ``describe``.
    """
    texts = make(folder, with_captions)
    existing = card.read(folder / CARD_NAME)
    if existing is not None and not card.is_as_written(existing):
        if with_captions:
            raise ConfigError(
                f"{folder / CARD_NAME}: was edited by hand; write the captions into it, or remove it for a new one"
            )
        log.info("%s: edited by hand, stays as it is", folder / CARD_NAME)
        del texts[CARD_NAME]
    for name, text in texts.items():
        write_whole(folder / name, text)


def to_upload(folder: Path) -> list[str]:
    """Paths, relative to ``folder``, of all files to upload. Nothing else of a run is ever uploaded.

    config.json, metrics.jsonl and the JSON files of previews are not: they contain paths, names of clips and captions.
    """
    previews = previews_of(folder, describe(folder), False)
    preview_files = [path for preview in previews for path in (preview.audio, preview.base, preview.picture) if path]
    names = [*ADAPTERS, CARD_NAME, NOTICE_NAME, CURVES_NAME, *preview_files]
    return [path for path in names if (folder / path).is_file()]
