"""ModelScope's hub, by its own library, which reads MODELSCOPE_ENDPOINT, MODELSCOPE_API_TOKEN and MODELSCOPE_CACHE.

The library continues files that were cut, and compares each with its hash, at every start again. What it has compared
is noted here, with the hub's list of files, so that later starts need neither to read all files nor to reach the hub.
It knows no commits: the files of a branch are replaced in place when the branch has moved.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from modelscope_hub import FileInfo, HubApi, HubConfig
from modelscope_hub import HubError as LibraryError
from modelscope_hub.errors import (
    AuthenticationError,
    FileDownloadError,
    FileIntegrityError,
    InvalidParameter,
    NetworkError,
    NotExistError,
    PermissionDeniedError,
    RateLimitError,
    ServerError,
)
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from cluster.device.hub import HubError, HubVariables, Reason, causes, num_bytes_of, reason_of_disk_error, redacted


@dataclass(frozen=True)
class ComparedFile:
    """A file whose bytes have been compared with `sha256`; it has not changed since when the rest is still so."""

    sha256: str | None
    num_bytes: int
    changed_ns: int


@dataclass(frozen=True)
class Note:
    """All that is known of a repository at a revision: where it is, the hash of each file that the hub has listed
    last, and the files here that have been compared with theirs."""

    folder: Path
    listed: dict[str, str | None]
    compared: dict[str, ComparedFile]


class ModelScopeHub:
    """A repository of ModelScope, or of the hub at MODELSCOPE_ENDPOINT."""

    def __init__(self, repository: str, revision: str | None, notes_folder: Path) -> None:
        config = HubConfig()
        self.variables = HubVariables(redacted(config.endpoint or "", []), "MODELSCOPE_API_TOKEN",
                                      "MODELSCOPE_ENDPOINT", "MODELSCOPE_CACHE")
        self._repository = repository
        self._revision = revision
        self._token = config.token
        self._cache = config.cache_dir
        digest = hashlib.sha256(f"{config.cache_dir} {repository} {revision}".encode()).hexdigest()
        self._note_path = notes_folder / f"{digest[:24]}.json"

    def fetch(self, names: Sequence[str], at: Path | None = None) -> Path:
        try:
            return self._fetch(names)
        except HubError:
            raise
        except Exception as error:      # the library raises errors of many packages: network, disk, its own
            raise self._hub_error(error) from None      # the original may hold a token

    def _fetch(self, names: Sequence[str]) -> Path:
        api = self._api()
        files = {file.path: file for file in self._list_files(api) if not file.is_dir}
        wanted = [files[name] for name in names if name in files]
        note = self._read_note()
        missing = [file for file in wanted if note is None or not _is_here(note, file.path, file.sha256)]
        if note is None or missing:
            entries = [{"Path": file.path, "Size": file.size, "Sha256": file.sha256} for file in missing]
            folder = api.download_repo(self._repository, "model", revision=self._revision, file_list=entries)
        else:
            folder = note.folder
        compared = dict(note.compared) if note is not None and note.folder == folder else {}
        for file in missing:
            stat = (folder / file.path).stat()
            compared[file.path] = ComparedFile(file.sha256, stat.st_size, stat.st_mtime_ns)
        for name in set(names).intersection(compared).difference(files):        # the branch has them no more
            del compared[name]
            (folder / name).unlink(missing_ok=True)
        self._write_note(Note(folder, {name: file.sha256 for name, file in files.items()}, compared))
        return folder

    def _api(self) -> HubApi:
        """Return the library's client of the site that has the repository: the one set, the Chinese or the other."""
        api = HubApi()
        with contextlib.suppress(LibraryError):     # what is wrong shows in the next request
            api = HubApi(endpoint=api.resolve_endpoint_for_read(self._repository))
        return api

    def _list_files(self, api: HubApi) -> list[FileInfo]:
        try:
            return api.list_repo_files(self._repository, "model", revision=self._revision)
        except NotExistError as error:
            if self._revision is not None and api.repo_exists(self._repository, "model"):
                raise HubError(Reason.NO_REVISION, redacted(_words(error), [self._token])) from None
            raise

    def cached(self, names: Sequence[str], at: Path | None = None) -> Path | None:
        note = self._read_note()
        if note is None:        # the library itself may have fetched it
            with contextlib.suppress(LibraryError):
                return HubApi().download_repo(self._repository, "model", revision=self._revision, local_files_only=True)
            return None
        here = all(_is_here(note, name, note.listed[name]) for name in names if name in note.listed)
        return note.folder if here else None

    def num_cached_bytes(self) -> int:
        return num_bytes_of(self._cache / "models" / self._repository.replace("/", "--"))

    def _hub_error(self, error: Exception) -> HubError:
        if isinstance(error, FileDownloadError) and error.failed_files:
            name, cause = next(iter(error.failed_files.items()))
            return HubError(_reason_of(cause), redacted(f"{name}: {_words(cause)}", [self._token]))
        return HubError(_reason_of(error), redacted(_words(error), [self._token]))

    def _read_note(self) -> Note | None:
        try:
            return TypeAdapter(Note).validate_json(self._note_path.read_bytes())
        except (OSError, ValidationError):
            return None         # a node without notes compares once more

    def _write_note(self, note: Note) -> None:
        unfinished = self._note_path.with_suffix(f".unfinished-{os.getpid()}")
        with contextlib.suppress(OSError):          # as above
            unfinished.parent.mkdir(parents=True, exist_ok=True)
            unfinished.write_bytes(TypeAdapter(Note).dump_json(note, indent=1))
            unfinished.replace(self._note_path)


def _is_here(note: Note, name: str, sha256: str | None) -> bool:
    compared = note.compared.get(name)
    if compared is None or compared.sha256 != sha256:
        return False
    try:
        stat = (note.folder / name).stat()
    except OSError:
        return False
    return (stat.st_size, stat.st_mtime_ns) == (compared.num_bytes, compared.changed_ns)


def _words(error: BaseException) -> str:
    """Return the hub's words without the request and the answer that the library adds."""
    return error.message if isinstance(error, LibraryError) else str(error) or type(error).__name__


_REASONS: tuple[tuple[type[BaseException], Reason], ...] = (
    (AuthenticationError, Reason.SIGN_IN), (PermissionDeniedError, Reason.FORBIDDEN),
    (NotExistError, Reason.NO_REPOSITORY), (RateLimitError, Reason.RATE_LIMIT), (ServerError, Reason.SERVER),
    (FileIntegrityError, Reason.DAMAGED), (NetworkError, Reason.UNREACHABLE), (InvalidParameter, Reason.BAD_NAME))


def _reason_of(error: BaseException) -> Reason:
    for cause in causes(error):
        if isinstance(cause, HubError):
            return cause.reason
        of_library = next((reason for kind, reason in _REASONS if isinstance(cause, kind)), None)
        reason = reason_of_disk_error(cause) or of_library
        if reason is not None:
            return reason
    return Reason.OTHER
