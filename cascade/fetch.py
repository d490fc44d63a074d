"""From what a user calls a checkpoint to a local directory: nano, a directory, or a Hub id."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from cascade.errors import CheckpointError
from cascade.files import check_model_type, read_json

NANO = "nano"
NANO_DIRECTORY = Path(__file__).parent / "checkpoints" / NANO

ATTEMPTS = 4
"""How often a download is tried where the fault may pass."""

# Weights, configs, tokenizer and chat template; never code, never pickles.
PATTERNS = ["*.safetensors", "*.json", "*.jinja"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_PASSING_STATUS = {408, 429}

T = TypeVar("T")


def locate(path: str | Path, revision: str | None = None) -> tuple[Path, str]:
    """The directory of a checkpoint and its name.

    path:     `"nano"`, a directory, or a Hub id `owner/name`, tried in this order
    revision: branch, tag or commit; only of a Hub id

    Raises CheckpointError saying what was looked for and where.
    """
    directory = Path(path).expanduser()
    if revision is not None and (path == NANO or directory.is_dir()):
        raise CheckpointError(f"revision={revision!r} is for Hub ids; {str(path)!r} is not one")
    if path == NANO:
        if not NANO_DIRECTORY.is_dir():
            raise CheckpointError(
                f"'nano' should be at {NANO_DIRECTORY}, but this installation lacks it; "
                "reinstall cascade-reasoning"
            )
        return NANO_DIRECTORY, NANO
    if directory.is_dir():
        return directory, directory.resolve().name
    if directory.exists():
        raise CheckpointError(
            f"{directory} is a file; give the directory that holds config.json and the weights"
        )
    if not isinstance(path, str) or not _HUB_ID.fullmatch(path):
        raise CheckpointError(
            f"no directory {str(path)!r} (looked in {directory.absolute().parent}); a checkpoint "
            "is 'nano', a directory, or a Hub id 'owner/name'"
        )
    return _download(path, revision), path


def _download(repo: str, revision: str | None) -> Path:
    """The snapshot of a Hub repository; its config is checked before weights are fetched."""
    from huggingface_hub import hf_hub_download, snapshot_download

    config = _attempt(
        repo, revision, lambda: hf_hub_download(repo, "config.json", revision=revision)
    )
    check_model_type(read_json(Path(config)), Path(config))
    return Path(
        _attempt(
            repo,
            revision,
            lambda: snapshot_download(
                repo, revision=revision, allow_patterns=PATTERNS, ignore_patterns=["*/*"]
            ),
        )
    )


def _attempt(repo: str, revision: str | None, fetch: Callable[[], T]) -> T:
    """`fetch()`, again after faults that may pass. Raises CheckpointError for all others."""
    from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential_jitter

    retrying = Retrying(
        retry=retry_if_exception(_may_pass),
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_exponential_jitter(initial=1, max=8),
        reraise=True,
    )
    try:
        return retrying(fetch)
    except Exception as error:  # httpx's, huggingface_hub's, the disk's: no common base
        raise CheckpointError(_explain(repo, revision, error)) from error


def _chain(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in found:
        found.append(cause)
        cause = cause.__cause__ or cause.__context__
    return found


def _may_pass(error: BaseException) -> bool:
    """Timeouts, broken connections, and the statuses 408, 429 and 5xx."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    for cause in _chain(error):
        if isinstance(cause, OfflineModeIsEnabled):
            return False
        if isinstance(cause, HfHubHTTPError) and cause.response is not None:
            status = cause.response.status_code
            return status >= 500 or status in _PASSING_STATUS
        if isinstance(
            cause,
            (
                httpx.TimeoutException,
                httpx.NetworkError,
                httpx.RemoteProtocolError,
                TimeoutError,
                ConnectionError,
            ),
        ):
            return True
    return False


def _explain(repo: str, revision: str | None, error: Exception) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = f" at revision {revision!r}" if revision else ""
    looked = (
        f"no directory {repo!r} in {Path.cwd()}, so {repo!r}{at} was looked for on "
        f"{constants.ENDPOINT}"
    )
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in _chain(error)):
        return (
            f"{looked}: HF_HUB_OFFLINE is set and the cache {constants.HF_HUB_CACHE} does not "
            "hold it"
        )
    match error:
        case GatedRepoError():
            why = "access must be asked for there; then log in with `hf auth login`"
        case RepositoryNotFoundError():
            why = "there is no such repository, or it is private; `hf auth login` if it is yours"
        case RevisionNotFoundError():
            why = "there is no such revision"
        case LocalEntryNotFoundError():
            why = f"it cannot be reached, and the cache {constants.HF_HUB_CACHE} does not hold it"
        case EntryNotFoundError():
            why = "it has no config.json"
        case _:
            why = f"{type(error).__name__}: {error}"
    tried = f" ({ATTEMPTS} attempts)" if _may_pass(error) else ""
    return f"{looked}: {why}{tried}"
