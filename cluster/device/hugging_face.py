"""The Hugging Face hub, by its own library: HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE are what it reads.

The library compares sizes only; here every fetched file is compared with its hash, which names its blob in the cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Iterator, Sequence
from glob import escape
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_session, get_token, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.utils.tqdm import disable_progress_bars

from cluster.device.hub import (
    HubError,
    HubVariables,
    Reason,
    causes,
    num_bytes_of,
    reason_of_disk_error,
    reason_of_status,
    redacted,
)

_UNFINISHED_S = 600.0       # no reader of the library is silent for so long: nobody writes a file that is older
_COMMIT = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")


class HuggingFaceHub:
    """A repository of the hub at HF_ENDPOINT."""

    def __init__(self, repository: str, revision: str | None) -> None:
        self.variables = HubVariables(redacted(constants.ENDPOINT, []), "HF_TOKEN", "HF_ENDPOINT", "HF_HOME")
        self._repository = repository
        self._revision = revision
        self._cache = Path(constants.HF_HUB_CACHE) / "--".join(["models", *repository.split("/")])
        disable_progress_bars()

    def fetch(self, names: Sequence[str], at: Path | None = None) -> Path:
        try:
            _watch_requests()
            revision = HfApi().resolve_revision(self._repository, revision=at.name if at else self._revision)
            if not _COMMIT.fullmatch(revision.resolved):
                raise HubError(Reason.OUTSIDE, f"its commit is {revision.resolved[:80]!r}")
            new = [name for name in names if not isinstance(
                try_to_load_from_cache(self._repository, name, revision=revision.resolved), str)]
            with self._checking(self._unchecked(revision.resolved, names), bool(new)) as was_left:
                folder = Path(snapshot_download(self._repository, revision=revision, allow_patterns=_exactly(names)))
                for name in names if was_left else new:
                    _check(folder / name)
            return folder
        except HubError:
            raise
        except Exception as error:      # the library raises errors of many packages: network, disk, its own
            raise self._hub_error(error) from None      # the original may hold a token

    @contextlib.contextmanager
    def _checking(self, unchecked: Path, is_new: bool) -> Iterator[bool]:
        """Note that files come which are not compared yet, until the block has done so. Yield whether an earlier
        process was stopped in between, so that any of them may be wrong."""
        was_left = unchecked.exists()
        if was_left:
            self._remove_unfinished()
        if is_new:
            with contextlib.suppress(OSError):      # a cache without room for this has none for files: that is said
                self._cache.mkdir(parents=True, exist_ok=True)
                unchecked.touch()
        yield was_left
        with contextlib.suppress(OSError):
            unchecked.unlink()

    def _unchecked(self, commit: str, names: Sequence[str]) -> Path:
        """Return the file that is there from before these files of a commit come until they are compared."""
        digest = hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()
        return self._cache / f".unchecked-{commit}-{digest[:8]}"

    def _remove_unfinished(self) -> None:
        """Remove what processes that were stopped have left: the library never goes on with it."""
        for file in (self._cache / "blobs").glob("*.incomplete"):
            with contextlib.suppress(OSError):
                if time.time() - file.stat().st_mtime > _UNFINISHED_S:
                    file.unlink()

    def cached(self, names: Sequence[str], at: Path | None = None) -> Path | None:
        try:
            folder = Path(snapshot_download(self._repository, revision=at.name if at else self._revision,
                                            allow_patterns=_exactly(names), local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError):
            return None
        return None if self._unchecked(folder.name, names).exists() else folder

    def num_cached_bytes(self) -> int:
        return num_bytes_of(self._cache / "blobs")

    def _hub_error(self, error: Exception) -> HubError:
        token = None
        with contextlib.suppress(OSError):          # its file may be what cannot be read
            token = get_token()
        return HubError(_reason_of(error), redacted(str(error) or type(error).__name__, [token]))


def _exactly(names: Sequence[str]) -> list[str]:
    return [escape(name) for name in names]


def _reason_of(error: Exception) -> Reason:
    for cause in causes(error):
        reason = _reason_of_one(cause)
        if reason is not None:
            return reason
    return Reason.OTHER


def _reason_of_one(error: BaseException) -> Reason | None:
    if isinstance(error, OfflineModeIsEnabled):
        return Reason.OFFLINE
    if isinstance(error, HFValidationError):
        return Reason.BAD_NAME
    return _reason_of_answer(error) if isinstance(error, HfHubHTTPError) else _reason_on_the_way(error)


def _reason_of_answer(error: HfHubHTTPError) -> Reason:
    status = error.response.status_code
    if isinstance(error, RevisionNotFoundError):
        return Reason.NO_REVISION
    if isinstance(error, EntryNotFoundError):
        return Reason.NO_FILE
    if isinstance(error, GatedRepoError):
        return Reason.SIGN_IN if status == 401 else Reason.FORBIDDEN
    return reason_of_status(status)


def _reason_on_the_way(error: BaseException) -> Reason | None:
    if isinstance(error, (LocalEntryNotFoundError, RevisionResolutionError)):
        return None                     # its cause says why
    if "Consistency check failed" in str(error):
        return Reason.DAMAGED
    of_transport = type(error).__module__.split(".")[0] in ("httpx2", "httpcore2")
    if of_transport or isinstance(error, (ConnectionError, TimeoutError)):
        return Reason.UNREACHABLE
    return reason_of_disk_error(error)


def _watch_requests() -> None:
    """Have the library's requests bounded in time, and its answers checked where they become names of files."""
    session: Any = get_session()
    hooks = session.event_hooks
    if _bound_wait not in hooks["request"]:
        session.event_hooks = {"request": [*hooks["request"], _bound_wait],
                               "response": [*hooks["response"], _check_names]}


def _bound_wait(request: Any) -> None:      # an httpx2.Request, whose package is the library's own matter
    """Give a request that has no limit of time the limit of downloads."""
    limits = request.extensions.get("timeout") or dict.fromkeys(("connect", "read", "write", "pool"))
    request.extensions["timeout"] = {what: constants.HF_HUB_DOWNLOAD_TIMEOUT if limit_s is None else limit_s
                                     for what, limit_s in limits.items()}


def _check_names(response: Any) -> None:
    """Raise HubError for a hash or a commit that is no plain name: the library makes paths of them, in the cache."""
    if response.request.method != "HEAD":
        return
    for header in ("X-Linked-ETag", "ETag", "X-Repo-Commit"):
        name = response.headers.get(header, "").removeprefix("W/").strip('"')
        if "/" in name or "\\" in name or name.startswith("."):
            raise HubError(Reason.OUTSIDE, f"{header}: {name[:80]!r}")


def _check(file: Path) -> None:
    """Raise HubError, and remove the file, when it has another hash than the hub says. A file that is not there, or a
    cache without links, is not checked."""
    if not file.is_symlink():
        return
    blob, expected = file.resolve(), os.readlink(file).rpartition("/")[2].lower()
    if len(expected) not in (40, 64):
        return
    with blob.open("rb") as content:
        if len(expected) == 64:
            found = {hashlib.file_digest(content, "sha256").hexdigest()}
        else:           # of git; some mirrors give the plain one
            of_git = hashlib.sha1(b"blob %d\0" % blob.stat().st_size, usedforsecurity=False)
            while block := content.read(1 << 20):
                of_git.update(block)
            content.seek(0)
            found = {of_git.hexdigest(), hashlib.file_digest(content, "sha1").hexdigest()}
    if expected not in found:
        blob.unlink(missing_ok=True)
        file.unlink(missing_ok=True)
        raise HubError(Reason.DAMAGED, f"{file.name} has the hash {min(found)}, not {expected}")
