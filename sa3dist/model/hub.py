"""Fetches released files from the Hugging Face cache or the hub. Errors are one line that says what to do."""

import contextlib
from pathlib import Path

from sa3dist.errors import CheckpointError


def hub_file(repo_id: str, name: str) -> Path:
    """Path of one file of a repository, from the cache or downloaded.

    Raises CheckpointError for gated or missing repositories, no network and offline mode.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    with contextlib.suppress(LocalEntryNotFoundError):
        return Path(hf_hub_download(repo_id, name, local_files_only=True))
    try:
        return Path(hf_hub_download(repo_id, name))
    # The client's exceptions come from requests or httpx, by version; explain() sorts out those that matter.
    except Exception as error:
        raise CheckpointError(explain(error, repo_id, name, "model=/path/to/its/directory")) from error


def is_cached(repo_id: str, name: str) -> bool:
    """Whether one file of a repository is on this machine."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repo_id, name), str)


def hub_folder(repo_id: str, subfolder: str | None, needed: tuple[str, ...], local_only: bool = False) -> Path:
    """Directory of a repository (or of one subfolder) that holds at least the files ``needed``, cache first.

    local_only   do not download
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    patterns = [f"{subfolder}/*"] if subfolder else ["*.json", "*.safetensors", "tokenizer*"]

    def folder(**options) -> Path:
        return Path(snapshot_download(repo_id, allow_patterns=patterns, **options)) / (subfolder or "")

    with contextlib.suppress(LocalEntryNotFoundError):
        cached = folder(local_files_only=True)
        # A snapshot may hold only the files someone asked for earlier.
        if all((cached / name).is_file() for name in needed):
            return cached
    if local_only:
        raise CheckpointError(f"{repo_id}: not in the local cache")
    try:
        downloaded = folder()
    except Exception as error:
        raise CheckpointError(explain(error, repo_id, subfolder or "files", "text_encoder=/path/to/t5gemma")) from error
    missing = [name for name in needed if not (downloaded / name).is_file()]
    if missing:
        raise CheckpointError(f"{downloaded}: no {missing[0]} in {repo_id}; pass text_encoder=/path/to/t5gemma")
    return downloaded


def explain(error: Exception, repo_id: str, what: str, otherwise: str) -> str:
    """One line for a failed download: what was asked, why it failed, what to do next."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, GatedRepoError) or status in (401, 403):
        return (
            f"{repo_id}: access to {what} is gated. Accept the licence at https://huggingface.co/{repo_id}, "
            f"run hf auth login, or pass {otherwise}"
        )
    if isinstance(error, OfflineModeIsEnabled):
        return f"{repo_id}: {what} is not in the local cache and HF_HUB_OFFLINE is set. Unset it or pass {otherwise}"
    if isinstance(error, RepositoryNotFoundError):
        return f"{repo_id}: no such repository on the hub (or it is private: run hf auth login). Or pass {otherwise}"
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return f"{repo_id}: the repository has no {what}. Pass {otherwise}"
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return (
        f"{repo_id}: {what} is not in the local cache and the hub cannot be reached ({reason}). "
        f"Connect, set HF_HUB_OFFLINE=1 with a filled cache, or pass {otherwise}"
    )
