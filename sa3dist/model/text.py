"""The T5Gemma text encoder: finding it, loading it, and turning prompts into hidden states."""

import contextlib
import dataclasses
import functools
import importlib
import os
import re
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from sa3dist.data.remote.local_paths import expand_home
from sa3dist.errors import CheckpointError, first_line
from sa3dist.formats import digest_of, file_sha256
from sa3dist.model.conditioners import HIDDEN_WIDTH
from sa3dist.model.config import PromptConfig
from sa3dist.model.hub import hub_folder
from sa3dist.model.kept_digests import KeptDigests

DECIDING_SUFFIXES = (".safetensors", ".json", ".model")
# Hashing a smaller file costs no more than looking up its digest.
LARGE_BYTES = 1 << 20
NEEDED_FILES = ("config.json", "tokenizer_config.json")
ENCODER_MODULE = "transformers.models.t5gemma.modeling_t5gemma"


@dataclasses.dataclass(frozen=True)
class TextSource:
    """Where to look for the text encoder, in this order.

    override         the user's ``text_encoder``: a directory, or ``org/name[/subfolder]`` on the hub
    model_directory  the checkpoint's own directory, if it has the subfolder
    base_repo        hub repository of a released base: the config's own repo_id names the post-trained twin, which is
                     gated separately, although the bytes are the same
    config           the config's model_path, repo_id and model_name, with its subfolder
    """

    config: PromptConfig
    override: str | None = None
    model_directory: Path | None = None
    base_repo: str | None = None

    def resolve(self, local_only: bool = False) -> Path:
        """A local directory with config, tokenizer and weights. Raises CheckpointError when there is none.

        local_only   nothing is downloaded
        """
        subfolder = self.config.subfolder
        if self.override:
            return self._resolve_override(self.override, local_only)
        if self.model_directory and subfolder and (self.model_directory / subfolder / "config.json").is_file():
            return self.model_directory / subfolder
        if self.base_repo:
            return hub_folder(self.base_repo, subfolder, NEEDED_FILES, local_only)
        if self.config.model_path:
            return self._directory(Path(self.config.model_path), "model_path of the model config")
        return hub_folder(self.config.repo_id or self.config.model_name, subfolder, NEEDED_FILES, local_only)

    def digest(self, kept: KeptDigests | None = None) -> str:
        """Hex SHA-256 over the files that decide the hidden states: weights, tokenizer and their configs.

        kept   where the digests of large ones are kept
        """
        parts = []
        for path in _deciding_files(self.resolve()):
            make = functools.partial(file_sha256, path)
            parts += [path.name, kept.of(path, "file", make) if kept is not None and _is_large(path) else make()]
        return digest_of(*parts)

    def begin_digest(self, kept: KeptDigests) -> None:
        """Start hashing the large files of ``digest`` in threads, if they are on this machine."""
        # Whoever asks for the digest, on every rank, reports a file that is missing, unreadable or still on the hub.
        with contextlib.suppress(CheckpointError, OSError):
            for path in filter(_is_large, _deciding_files(self.resolve(local_only=True))):
                kept.begin(path, "file", functools.partial(file_sha256, path))

    def _resolve_override(self, override: str, local_only: bool) -> Path:
        path = Path(expand_home(override))
        if os.path.isdir(path):
            return self._directory(path, "text_encoder")
        match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/([\w./-]+))?", override)
        if match is None:
            raise CheckpointError(f"text_encoder={override}: no such directory, nor a hub name org/name[/subfolder]")
        return hub_folder(match[1], match[2], NEEDED_FILES, local_only)

    def _directory(self, path: Path, origin: str) -> Path:
        for candidate in (path, path / (self.config.subfolder or "")):
            if (candidate / "config.json").is_file():
                return candidate
        raise CheckpointError(f"{path}: {origin} holds no config.json; expected a saved T5Gemma directory")


def _deciding_files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.suffix in DECIDING_SUFFIXES)


def _is_large(path: Path) -> bool:
    return path.stat().st_size >= LARGE_BYTES


@functools.cache
def begin_imports() -> Future[ModuleType]:
    """Start a thread that imports the encoder's libraries: seconds, most of which a GPU that encodes clips leaves free.

    The import only: while loading a model, transformers sets torch's default dtype for all threads.
    """
    return ThreadPoolExecutor(1, "import the text encoder").submit(importlib.import_module, ENCODER_MODULE)


class TextEncoder:
    """Tokenizer and encoder. Deliberately not an nn.Module: no adapters, no casts, no state dict."""

    def __init__(self, source: TextSource, device: torch.device | str):
        self.max_length = source.config.max_length
        directory = source.resolve()
        # A failed import fails again below, with a message. Wait: two threads must not import the same modules at once.
        begin_imports().exception()
        with quiet_transformers():
            self.tokenizer = load_tokenizer(directory)
            self.model = load_encoder(directory).to(device)

    @torch.no_grad()
    def encode(self, prompts: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """Last hidden states (B, L, 768) in the encoder's stored dtype, and the mask (B, L), bool, True = a token.

        Every prompt is padded or cut to the config's length: the DiT attends to all of it.
        """
        tokens = self.tokenizer(
            list(prompts), padding="max_length", max_length=self.max_length, truncation=True, return_tensors="pt"
        )
        mask = tokens["attention_mask"].to(device)
        with torch.autocast(device.type, enabled=False):
            model = self.model.to(device)
            hidden = model(input_ids=tokens["input_ids"].to(device), attention_mask=mask).last_hidden_state
        return hidden, mask.bool()


def require_list(prompts: list[str]) -> None:
    """Raises ValueError for no prompts, and for a bare string, which would count as a list of letters."""
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"prompts is {prompts!r}, expected a list of at least one string")


def load_tokenizer(directory: Path):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{directory}: no usable tokenizer ({first_line(error)})") from error


def load_encoder(directory: Path):
    """The encoder half in its stored dtype, frozen. Raises CheckpointError when a weight is missing."""
    from safetensors import SafetensorError
    from transformers import AutoConfig, T5GemmaEncoderModel

    try:
        config = AutoConfig.from_pretrained(str(directory), local_files_only=True)
        config.is_encoder_decoder = False
        model, info = T5GemmaEncoderModel.from_pretrained(
            str(directory), config=config, local_files_only=True, dtype="auto", output_loading_info=True
        )
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{directory}: not a loadable T5Gemma encoder ({first_line(error)})") from error
    missing = sorted(info["missing_keys"])
    if missing:
        # transformers would use random values there.
        raise CheckpointError(f"{directory}: {len(missing)} encoder weights are missing: {', '.join(missing[:3])}")
    width = model.config.encoder.hidden_size
    if width != HIDDEN_WIDTH:
        raise CheckpointError(f"{directory}: the encoder is {width} wide, expected {HIDDEN_WIDTH} (T5Gemma b-b)")
    return model.requires_grad_(False).eval()


@contextlib.contextmanager
def quiet_transformers():
    """No progress bar, and no report about the decoder's weights, which are deliberately unused."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
