"""Device profiles on this machine's disk: measured once per device and model shape, read at every later start."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import platformdirs
from filelock import FileLock
from pydantic import TypeAdapter, ValidationError

from cluster.planner.costs.profile_check import profile_fault
from serving.link.epoch import DeviceProfile

logger = logging.getLogger(__name__)

Facts = Mapping[str, str | int | bool | None]       # what a profile depends on


@dataclass(frozen=True, slots=True)
class StoredProfile:
    """A file's content. The profile is without emulation: how slow a pool pretends to be is not the device's."""

    facts: dict[str, str | int | bool | None]
    measured_at_s: float            # since 1970
    profile: DeviceProfile
    timings: tuple[tuple[str, int, float], ...] = ()    # what it was made of: (what, rows, seconds)


_ADAPTER = TypeAdapter(StoredProfile)


def default_profile_dir() -> Path:
    return platformdirs.user_cache_path("moesaic") / "profiles"


class ProfileStore:
    """A folder with one file for each set of facts. A folder that cannot be used costs a warning, never an error."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path_of(self, facts: Facts) -> Path:
        digest = hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode()).hexdigest()
        return self.folder / f"{digest[:24]}.json"

    def read(self, facts: Facts) -> StoredProfile | None:
        """Return what was stored, or None when it was not measured yet or its file is broken."""
        path = self.path_of(facts)
        try:
            stored = _ADAPTER.validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError, ValueError) as error:
            logger.warning("profile_unreadable path=%s error=%s", path, str(error).splitlines()[0])
            return None
        fault = profile_fault(stored.profile)
        if fault:
            logger.warning("profile_unreadable path=%s error=%s", path, fault)
            return None
        return stored if stored.facts == dict(facts) else None

    def write(self, facts: Facts, profile: DeviceProfile, timings: tuple[tuple[str, int, float], ...] = ()) -> None:
        path = self.path_of(facts)
        unfinished = path.with_suffix(f".unfinished-{os.getpid()}")
        stored = StoredProfile(dict(facts), time.time(), profile, timings)
        try:
            unfinished.write_text(json.dumps(asdict(stored), indent=1), encoding="utf-8")
            unfinished.replace(path)
        except OSError as error:
            logger.warning("profile_not_kept path=%s error=%s", path, error)

    @contextlib.contextmanager
    def lock(self, timeout_s: float) -> Iterator[None]:
        """Let in one process of the machine at a time: two that measure at once measure each other. Goes on without the
        lock when it does not come within timeout_s, or cannot be had at all."""
        with contextlib.ExitStack() as stack:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(FileLock(self.folder / "lock").acquire(timeout_s))
            except (OSError, NotImplementedError) as error:     # its Timeout is an OSError
                logger.warning("profile_lock_unavailable folder=%s error=%s", self.folder, error)
            yield
