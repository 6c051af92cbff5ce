"""The interface of a hub of models, and every reason why one may not give its files."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Protocol

from model.errors import CheckpointError


class Reason(Enum):
    """A reason why a hub gives no files: what is wrong, what to do, and how often to try again before it is said."""

    SIGN_IN = ("it does not exist, or it is private or gated and no valid token came along",
               "check the name; if it is private or gated, accept its terms on {site} and set {token} on every node", 0)
    FORBIDDEN = ("this token may not read it",
                 "ask its owner for access on {site}, or set {token} on every node to a token that may read it", 0)
    NO_REPOSITORY = ("there is no such repository", "check model.path, and {endpoint} if you use a mirror", 0)
    NO_REVISION = ("it has no such revision", "set model.revision to a branch, a tag or a commit of it", 0)
    NO_FILE = ("it lacks a file", "choose a repository in safetensors format that is complete", 0)
    BAD_NAME = ("this is no name of a repository", "write owner/name behind the ://", 0)
    OFFLINE = ("this node is set to be offline, and its cache does not hold all files",
               "fetch them while online, copy the cache of another node, or unset the variable that says offline", 0)
    UNREACHABLE = ("the hub cannot be reached, and the cache of this node does not hold all files",
                   "check the network, the proxy and {endpoint}; or copy the cache of another node", 3)
    SERVER = ("the hub has a fault of its own", "try again later, or set {endpoint} to a mirror", 3)
    RATE_LIMIT = ("the hub gets too many requests from here", "try again later, or set {token} for a higher limit", 3)
    DAMAGED = ("a file came with other bytes than the hub says it has",
               "try again; if it stays so, set {endpoint} to another mirror, or look for a proxy that changes files", 1)
    OUTSIDE = ("it gives a file a name that leads out of its folder", "do not use this hub: tell its owner", 0)
    DISK_FULL = ("the disk is full", "free space, or set {cache} to a folder on another disk", 0)
    NO_WRITING = ("the cache cannot be written", "give this user the right to, or set {cache} to another folder", 0)
    OTHER = ("it could not be fetched", "check the name, the network, {endpoint} and {token}", 0)

    def __init__(self, what: str, fix: str, num_retries: int) -> None:
        self.what = what
        self.fix = fix
        self.num_retries = num_retries


class HubError(Exception):
    """A hub did not give what was asked, for a reason of the table."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class HubVariables:
    """The words of a hub that the table's advice names: its site, and environment variables."""

    site: str
    token: str
    endpoint: str
    cache: str


class Hub(Protocol):
    """One repository at one revision. The methods block; they raise HubError."""

    variables: HubVariables

    def fetch(self, names: Sequence[str], at: Path | None = None) -> Path:
        """Get those of `names` that the repository has and this node has not, compare them with what the hub says of
        them, and return their folder. Ask first which commit the revision is, or stay at that of the folder `at`."""

    def cached(self, names: Sequence[str], at: Path | None = None) -> Path | None:
        """Return the folder when this node has all of `names` that the repository has, as far as is known here, at the
        commit that the revision last was or at that of the folder `at`. Do not ask the hub."""

    def num_cached_bytes(self) -> int:
        """Return the bytes of this repository on this disk, unfinished files included."""


def checkpoint_error(path: str, error: HubError, variables: HubVariables) -> CheckpointError:
    """Return the error for the user: what is wrong, the hub's own words, what to do."""
    fix = error.reason.fix.format(site=variables.site, token=variables.token, endpoint=variables.endpoint,
                                  cache=variables.cache)
    return CheckpointError(f"model.path={path}: {error.reason.what} ({error})", fix=fix)


def reason_of_status(status: int) -> Reason:
    """Return the reason behind a status of HTTP, where a hub says no more."""
    if status == 429:
        return Reason.RATE_LIMIT
    if status >= 500 or status == 408:
        return Reason.SERVER
    return {401: Reason.SIGN_IN, 403: Reason.FORBIDDEN, 404: Reason.NO_REPOSITORY}.get(status, Reason.OTHER)


def reason_of_disk_error(error: BaseException) -> Reason | None:
    """Return the reason when it is this node's disk."""
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT):
        return Reason.DISK_FULL
    return Reason.NO_WRITING if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR) else None


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the error, then what it came from, and so on."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def num_bytes_of(folder: Path) -> int:
    """Return the bytes of all files below a folder, as far as they can be seen."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):          # renamed or removed meanwhile
                total += os.lstat(os.path.join(parent, name)).st_size
    return total


def redacted(text: str, secrets: Sequence[str | None]) -> str:
    """Return the text in one line, without tokens, names and passwords inside addresses, and signatures behind them."""
    for secret in secrets:
        if secret:
            text = text.replace(secret, "***")
    text = re.sub(r"(\w+://)[^\s/@]+@", r"\1***@", text)
    text = re.sub(r"(\w+://[^\s?]+)\?[^\s'\")]+", r"\1?***", text)
    return " ".join(text.split())
