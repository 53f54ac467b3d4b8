"""Upload files to a repository of the Hugging Face hub, in one commit; retries do not repeat finished uploads."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sa3dist import __version__
from sa3dist.errors import ConfigError, EnvironmentFailure, SA3DistError
from sa3dist.publishing import card
from sa3dist.publishing.files import CARD_NAME

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelInfo

GET_A_TOKEN = "run hf auth login, or set HF_TOKEN to one with write access from https://huggingface.co/settings/tokens"


def check_name(repo_id: str) -> None:
    """Raises ConfigError unless ``repo_id`` is a valid user/name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as problem:
        raise ConfigError(f"{repo_id}: no name of a repository: {_one_line(problem)}") from None
    if "/" not in repo_id:
        raise ConfigError(f"{repo_id}: expected user/name; hf auth whoami tells your user's")


def upload(folder: Path, paths: Sequence[str], repo_id: str, public: bool, replace_card: bool) -> tuple[str, bool]:
    """Upload files to a repository, creating it if needed. Returns its address, and whether it is private.

    paths          relative to ``folder`` and to the repository
    public         for a new repository; an existing public one is refused unless this is set
    replace_card   replace a card there even if it was edited
    Uses a single commit. If interrupted, another call uploads only what is missing. Never asks for input.
    Raises ConfigError for a user's mistake, EnvironmentFailure for other failures.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.utils import disable_progress_bars, logging

    check_name(repo_id)
    token = get_token()
    if token is None:
        raise ConfigError(f"{repo_id}: no token of the Hugging Face hub here; {GET_A_TOKEN}")
    # Its warnings before every retry would bury the final message.
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi(token=token, library_name="sa3dist", library_version=__version__)
    user = _explained(repo_id, "you", lambda: api.whoami()["name"])
    repository = _explained(repo_id, user, lambda: _open(api, repo_id, public))
    if not repository.private and not public:
        raise ConfigError(f"{repo_id}: is public, and a run is published privately; say --public to publish it there")
    if not replace_card and CARD_NAME in paths:
        _explained(repo_id, user, lambda: _keep_edited_card(api, repository, (folder / CARD_NAME).read_bytes()))
    operations = [CommitOperationAdd(path, folder / path) for path in paths]
    message = f"Publish with sa3dist {__version__}"
    _explained(
        repo_id,
        user,
        lambda: api.create_commit(repo_id, operations, commit_message=message, parent_commit=repository.sha),
    )
    return f"{api.endpoint}/{repo_id}", bool(repository.private)


def _open(api: HfApi, repo_id: str, public: bool) -> ModelInfo:
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return api.model_info(repo_id)
    except RepositoryNotFoundError:
        api.create_repo(repo_id, private=not public)
        return api.model_info(repo_id)


def _keep_edited_card(api: HfApi, repository: ModelInfo, ours: bytes) -> None:
    """Raises ConfigError if the repository's card was edited by hand and differs from the one to upload."""
    if CARD_NAME not in {file.rfilename for file in repository.siblings or ()}:
        return
    existing = Path(api.hf_hub_download(repository.id, CARD_NAME, revision=repository.sha)).read_bytes()
    if existing != ours and not card.is_as_written(existing.decode(errors="replace")):
        raise ConfigError(f"{repository.id}: its {CARD_NAME} was edited by hand; --replace-card replaces it")


def _explained(repo_id: str, user: str, call: Callable):
    """The result of a call to the hub. Raises errors from ``explain`` for refusals and connection failures."""
    try:
        return call()
    except SA3DistError:
        raise
    except Exception as error:
        explained = explain(error, repo_id, user)
        if explained is None:
            raise
        raise explained from error


def explain(error: Exception, repo_id: str, user: str) -> SA3DistError | None:
    """An error with one line of explanation for a failed request; None if the failure is not the hub's."""
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    causes = list(_causes(error))
    status = next((e.response.status_code for e in causes if getattr(e, "response", None) is not None), None)
    reason = _one_line(next((e for e in causes if isinstance(e, HTTPError)), error))
    if any(isinstance(e, OfflineModeIsEnabled) for e in causes):
        return ConfigError(f"{repo_id}: HF_HUB_OFFLINE is set; unset it to publish")
    if status == 401:
        return ConfigError(f"{repo_id}: the hub does not know this token; {GET_A_TOKEN}")
    if status in (403, 404, 409):
        return ConfigError(
            f"{repo_id}: {user} may not write there: somebody else has this name, or the token is a read-only one; "
            f"choose {user}/NAME, or {GET_A_TOKEN}"
        )
    if status == 412:
        return EnvironmentFailure(f"{repo_id}: somebody else changed it meanwhile; run again")
    if status in (400, 402, 413, 422) or (status is None and isinstance(error, ValueError)):
        return ConfigError(f"{repo_id}: the hub refuses it ({reason})")
    if status is not None:
        return EnvironmentFailure(f"{repo_id}: the hub fails ({reason}); run again to continue")
    if any(isinstance(e, HTTPError | ConnectionError | TimeoutError) for e in causes):
        return EnvironmentFailure(f"{repo_id}: the hub cannot be reached ({reason}); run again to continue")
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An exception and its chain of causes."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
