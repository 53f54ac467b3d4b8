"""The T5Gemma text encoder: finding it, loading it, and encoding prompts to hidden states."""

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
from sa3dist.model.digest_cache import DigestCache
from sa3dist.model.hub import hub_folder

DECIDING_SUFFIXES = (".safetensors", ".json", ".model")
# Hashing a smaller file costs no more than looking up its digest.
LARGE_BYTES = 1 << 20
NEEDED_FILES = ("config.json", "tokenizer_config.json")
ENCODER_MODULE = "transformers.models.t5gemma.modeling_t5gemma"


@dataclasses.dataclass(frozen=True)
class TextSource:
    """Where to look for the text encoder, in this order.

    override         what the user passed as ``text_encoder``: a directory, or ``org/name[/subfolder]`` on the hub
    model_directory  the checkpoint's directory, whose subfolder is used if present
    base_repo        hub repository of a released base. The config's repo_id names the post-trained model instead, which
                     is gated separately but has the same text encoder
    config           the config's model_path, repo_id and model_name, with its subfolder
    """

    config: PromptConfig
    override: str | None = None
    model_directory: Path | None = None
    base_repo: str | None = None

    def resolve(self, local_only: bool = False) -> Path:
        """A local directory with config, tokenizer and weights. Raises CheckpointError if there is none.

        local_only   do not download
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

    def digest(self, cache: DigestCache | None = None) -> str:
        """Hex SHA-256 over the files that hidden states depend on: weights, tokenizer and their configs.

        cache   for the digests of large files
        """
        parts = []
        for path in _deciding_files(self.resolve()):
            compute = functools.partial(file_sha256, path)
            use_cache = cache is not None and _is_large(path)
            parts += [path.name, cache.of(path, "file", compute) if use_cache else compute()]
        return digest_of(*parts)

    def begin_digest(self, cache: DigestCache) -> None:
        """Start hashing the large files of ``digest`` in threads, if they are on this machine."""
        # Errors are left to ``digest``, which raises them on every rank.
        with contextlib.suppress(CheckpointError, OSError):
            for path in filter(_is_large, _deciding_files(self.resolve(local_only=True))):
                cache.begin(path, "file", functools.partial(file_sha256, path))

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
    """Start importing the encoder's module in a thread: it takes seconds, while a GPU encodes clips.

    Loading the model stays in the main thread: transformers then changes torch's default dtype for all threads.
    """
    return ThreadPoolExecutor(1, "import the text encoder").submit(importlib.import_module, ENCODER_MODULE)


class TextEncoder:
    """Tokenizer and encoder. Not an nn.Module, so that adapters, casts and state dicts do not reach it."""

    def __init__(self, source: TextSource, device: torch.device | str):
        self.max_length = source.config.max_length
        directory = source.resolve()
        # Wait: two threads must not import the same modules. A failed import fails again here, with a message.
        begin_imports().exception()
        with quiet_transformers():
            self.tokenizer = load_tokenizer(directory)
            self.model = load_encoder(directory).to(device)

    @torch.no_grad()
    def encode(self, prompts: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """Last hidden states (B, L, 768) in the encoder's stored dtype, and the mask (B, L), bool, True = a token.

        Prompts are padded or cut to the config's length; the DiT attends to all positions.
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
    """Raises ValueError for no prompts, and for a bare string, which would be read as a list of letters."""
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
        # eager: some releases of transformers (5.20) otherwise take SDPA, which leaves out the logits' soft cap.
        model, info = T5GemmaEncoderModel.from_pretrained(
            str(directory),
            config=config,
            local_files_only=True,
            dtype="auto",
            attn_implementation="eager",
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{directory}: not a loadable T5Gemma encoder ({first_line(error)})") from error
    missing = sorted(info["missing_keys"])
    if missing:
        # transformers would use random values for them.
        raise CheckpointError(f"{directory}: {len(missing)} encoder weights are missing: {', '.join(missing[:3])}")
    width = model.config.encoder.hidden_size
    if width != HIDDEN_WIDTH:
        raise CheckpointError(f"{directory}: the encoder is {width} wide, expected {HIDDEN_WIDTH} (T5Gemma b-b)")
    return model.requires_grad_(False).eval()


@contextlib.contextmanager
def quiet_transformers():
    """Without progress bars and reports about the decoder's weights, which are unused on purpose."""
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
