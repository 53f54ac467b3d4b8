"""Find captions that are longer than the text encoder's limit, where it cuts them, and warn of them."""

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

# Every token covers at least one byte, except one at each end and a leading space.
_TOKENS_ADDED = 3


@dataclasses.dataclass(frozen=True)
class CutCaptions:
    """Captions that are too long.

    limit    tokens the text encoder reads
    tokens   key of each clip with a longer caption -> tokens of the caption
    """

    limit: int
    tokens: dict[str, int]

    def line(self, most: int = 3) -> str:
        """A one-line message with the first ``most`` clips; empty if no caption is cut."""
        if not self.tokens:
            return ""
        named = listed([f"{key} has {count}" for key, count in sorted(self.tokens.items())], len(self.tokens), most)
        return (
            f"{counted(len(self.tokens), 'caption is', 'captions are')} longer than the {self.limit} tokens the text "
            f"encoder reads, and cut there: {named}; put what matters first, or shorten"
        )


def cut_captions(source: TextSource, captions: Iterable[tuple[str, str]]) -> CutCaptions | None:
    """The captions, given as (clip's key, caption), that are too long; None if unknown for lack of a local tokenizer.

    Downloads nothing. Imports transformers only if some caption may be too long.
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


def warn_of_cut_captions(index: DatasetIndex, source: TextSource | None) -> None:
    """Warn of captions that are too long, if the tokenizer is on this machine."""
    cut = source and cut_captions(source, ((clip.key, clip.caption) for clip in index.clips))
    if cut and cut.tokens:
        log.warning("%s", cut.line())


def text_source(settings: Settings) -> TextSource:
    """The text encoder of a run with these settings. Reads the model's config, no weights. Raises CheckpointError."""
    override = None if settings.text_encoder is None else str(settings.text_encoder)
    directory = None if settings.model in RELEASED else Path(settings.model).expanduser()
    return TextSource(known_config(settings.model).prompt, override, directory, RELEASED.get(settings.model))
