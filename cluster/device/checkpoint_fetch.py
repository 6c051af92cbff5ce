"""Gets a checkpoint from a hub once for all processes of a node: one fetches, the others wait and say how far it is."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from cluster.device.hub import Hub, HubError, Reason, checkpoint_error
from model.checkpoint_files import INDEX_NAME, SINGLE_NAME, weight_file_names

logger = logging.getLogger(__name__)

FACT_NAMES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
              "special_tokens_map.json", "chat_template.jinja", INDEX_NAME)      # all that is read besides weights
_REPORT_S = 5.0
_STALL_S = 1800.0       # a holder of the lock that brings nothing for so long is not waited for: it may hash, or hang
_FIRST_WAIT_S = 1.0     # before a second attempt; then four times as long each

Report = Callable[[str], None]


class CheckpointFetch:
    """Looks for one checkpoint. `report` is called now and then with a line that says how far it is."""

    def __init__(self, path: str, hub: Hub, lock_path: Path, report: Report) -> None:
        """`lock_path`: what the names of the locks begin with; all processes of the node give the same."""
        self._path = path
        self._hub = hub
        self._lock_path = lock_path
        self._report = report

    def facts(self) -> Path:
        """Return the folder with all but the weights, as the hub has them now. Raises CheckpointError."""
        with self._only_one_process("facts"):
            return self._fetched(FACT_NAMES, ("config.json",))

    def all_files(self) -> Path:
        """Return the folder of the whole checkpoint, at the commit that was last seen. Raises CheckpointError."""
        with self._only_one_process("facts"):       # not for as long as weights take: others need only facts
            folder = self._cached(FACT_NAMES, ("config.json",)) or self._fetched(FACT_NAMES, ("config.json",))
        names = weight_file_names(folder) if (folder / INDEX_NAME).is_file() else [SINGLE_NAME]
        with self._only_one_process("weights"):
            return self._cached(names, names, folder) or self._fetched(names, names, folder)

    def _fetched(self, names: Sequence[str], required: Sequence[str], at: Path | None = None) -> Path:
        with self._reporting():
            folder = self._retried(names, required, at)
        absent = [name for name in required if not (folder / name).is_file()]
        if absent:
            raise checkpoint_error(self._path, HubError(Reason.NO_FILE, ", ".join(absent[:5])), self._hub.variables)
        return folder

    def _retried(self, names: Sequence[str], required: Sequence[str], at: Path | None) -> Path:
        """Fetch; when that fails, take what is cached, or try again as often as the reason is worth since more came."""
        num_failures, wait_s, num_bytes = 0, _FIRST_WAIT_S, self._hub.num_cached_bytes()
        while True:
            try:
                return self._hub.fetch(names, at)
            except HubError as error:
                failure = error
            folder = self._cached(names, required, at)
            if folder is not None:
                logger.warning("checkpoint_from_cache path=%s reason=%s error=%s", self._path, failure.reason.name,
                               failure)
                return folder
            before, num_bytes = num_bytes, self._hub.num_cached_bytes()
            if num_bytes > before:
                num_failures, wait_s = 0, _FIRST_WAIT_S
            num_failures += 1
            if num_failures > failure.reason.num_retries:
                raise checkpoint_error(self._path, failure, self._hub.variables)
            logger.warning("checkpoint_fetch_again path=%s in_s=%.0f reason=%s error=%s", self._path, wait_s,
                           failure.reason.name, failure)
            time.sleep(wait_s)
            wait_s *= 4

    def _cached(self, names: Sequence[str], required: Sequence[str], at: Path | None = None) -> Path | None:
        folder = self._hub.cached(names, at)
        return folder if folder is not None and all((folder / name).is_file() for name in required) else None

    @contextlib.contextmanager
    def _only_one_process(self, part: str) -> Iterator[None]:
        """Hold the node's lock for this part of the checkpoint, or go on without where there can be none: files stay
        whole, but may be fetched twice."""
        lock = FileLock(self._lock_path.with_suffix(f".{part}.lock"))
        with contextlib.ExitStack() as stack:
            try:
                self._lock_path.parent.mkdir(parents=True, exist_ok=True)
                self._wait_for(lock)
                stack.callback(lock.release)
            except (OSError, NotImplementedError) as error:
                logger.warning("checkpoint_lock_unavailable path=%s error=%s", self._lock_path, error)
            yield

    def _wait_for(self, lock: FileLock) -> None:
        """Take the lock. Raises Timeout, which is an OSError, when its holder has brought nothing for long."""
        num_bytes, stalled_s = -1, 0.0
        while True:
            try:
                lock.acquire(timeout=_REPORT_S)
                return
            except Timeout:
                before, num_bytes = num_bytes, self._hub.num_cached_bytes()
                stalled_s = stalled_s + _REPORT_S if num_bytes == before else 0.0
                self._report(f"waits for another process of this node that fetches {self._path}: {_amount(num_bytes)}")
                if stalled_s >= _STALL_S:
                    raise

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        """Report now and then how much is here, until the block ends."""
        is_over = threading.Event()

        def report() -> None:
            while not is_over.wait(_REPORT_S):
                self._report(f"fetches {self._path}: {_amount(self._hub.num_cached_bytes())}")
        thread = threading.Thread(target=report, name="fetch-report", daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()


def _amount(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB here"
