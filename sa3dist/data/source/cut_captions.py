"""Captions longer than the text encoder reads: it cuts them, so warn the user."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from sa3dist.errors import CheckpointError, counted, listed
from sa3dist.formats import DatasetIndex
from sa3dist.model.loading import known_config
from sa3dist.model.released import RELEASED
from sa3dist.model.text import TextSource, load_tokenizer, quiet_transformers

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from sa3dist.settings import Settings

# A token stands for at least one byte, except one token at either end and a space in front.
_TOKENS_ADDED = 3


@dataclasses.dataclass(frozen=True)
class CutCaptions:
    """Captions that do not fit.

    limit    tokens the text encoder reads
    tokens   clip's key -> number of its caption's tokens, if above the limit
    """

    limit: int
    tokens: dict[str, int]

    def line(self, most: int = 3) -> str:
        """One line for people, with the first ``most`` clips; empty if no caption is cut."""
        if not self.tokens:
            return ""
        named = listed([f"{key} has {count}" for key, count in sorted(self.tokens.items())], len(self.tokens), most)
        return (
            f"{counted(len(self.tokens), 'caption is', 'captions are')} longer than the {self.limit} tokens the text "
            f"encoder reads, and cut there: {named}; put what matters first, or shorten"
        )


def cut_captions(source: TextSource, captions: Iterable[tuple[str, str]]) -> CutCaptions | None:
    """Which of (clip's key, caption) do not fit; None if some may not and this machine has no tokenizer.

    Downloads nothing, and does not import transformers if all captions are short.
    """
    limit = source.config.max_length
    long = [(key, caption) for key, caption in captions if len(caption.encode()) + _TOKENS_ADDED > limit]
    if not long:
        return CutCaptions(limit, {})
    try:
        directory = source.resolve(local_only=True)
        with quiet_transformers():
            counts = [len(ids) for ids in load_tokenizer(directory)([caption for _, caption in long])["input_ids"]]
    except CheckpointError:
        return None
    return CutCaptions(limit, {key: count for (key, _), count in zip(long, counts, strict=True) if count > limit})


def say_cut_captions(index: DatasetIndex, source: TextSource | None) -> None:
    """Warn of captions that do not fit, if this machine has the tokenizer."""
    found = source and cut_captions(source, ((clip.key, clip.caption) for clip in index.clips))
    if found and found.tokens:
        log.warning("%s", found.line())


def text_source(settings: Settings) -> TextSource:
    """Where a run with these settings finds its text encoder; reads the model's config, but no weights.

    Raises CheckpointError.
    """
    override = None if settings.text_encoder is None else str(settings.text_encoder)
    directory = None if settings.model in RELEASED else Path(settings.model).expanduser()
    return TextSource(known_config(settings.model).prompt, override, directory, RELEASED.get(settings.model))
