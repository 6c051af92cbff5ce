"""Notes running applications for `status`, `chat` and `down`: one small file for each."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from cluster.device.state_dir import STATE_DIR_VARIABLE
from cluster.launch.door_trust import DoorTrust
from cluster.launch.process_marks import ProcessMark, process_of
from serving.errors import ServingError

_OTHER_FOLDER = f"name a folder that you can write to: --state-dir FOLDER, or {STATE_DIR_VARIABLE}"


class NoClusterError(ServingError):
    """No application of that name was started from here, or what was started has ended."""


class StateDirError(ServingError):
    """The folder of the notes, or a note in it, cannot be used."""


class StartingError(ServingError):
    """Another `moesaic up` of the same application is at work."""


@dataclass(frozen=True, slots=True)
class RunningCluster:
    """Describes one application that was started from this machine."""

    application: str
    address: str                            # of Ray's GCS
    http_url: str
    model: str                              # as clients call it
    grpc_address: str = ""                  # host:port of one router's gRPC door, once it is known
    log_dir: str = ""
    processes: tuple[ProcessMark, ...] = ()     # of local nodes; none when the Ray cluster was there before
    starter: ProcessMark | None = None      # the `moesaic up` that brings it up; ends when the service answers
    certificate: str = ""                   # file of its doors' certificate; "": they are plain

    @property
    def http_address(self) -> str:
        """Return host:port, and the route prefix if there is one."""
        return self.http_url.partition("://")[2]

    @property
    def trust(self) -> DoorTrust | None:
        """Return how its doors are known; None: they are plain."""
        return DoorTrust(self.certificate) if self.certificate else None


def write_state(cluster: RunningCluster, state_dir: Path) -> None:
    """Note the application. Raises StateDirError."""
    path = _path(state_dir, cluster.application)
    unfinished = path.with_suffix(f".unfinished-{os.getpid()}-{threading.get_ident()}")     # several threads may write
    with _named_errors(state_dir):
        state_dir.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(asdict(cluster), indent=1), encoding="utf-8")
        os.replace(unfinished, path)


def read_state(state_dir: Path, application: str | None = None) -> RunningCluster:
    """Return the named application, or the only one there is. Raises NoClusterError, StateDirError."""
    with _named_errors(state_dir):
        names = sorted(path.stem for path in state_dir.glob("*.json"))
    if application is None and len(names) > 1:
        raise NoClusterError(f"several applications were started here: {', '.join(names)}",
                             fix="say which with --application")
    name = application or (names[0] if names else None)
    if name is None or name not in names:
        raise NoClusterError(f"no application{f' {name!r}' if name else ''} was started from this machine",
                             fix="start one with: moesaic up examples/demo.yaml")
    path = _path(state_dir, name)
    with _named_errors(state_dir):
        content = path.read_bytes()
    try:
        return _parse(content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StateDirError(f"{path}, the note of application {name!r}, cannot be read: {error}",
                            fix="remove that file; if the service runs still, end its processes (ray stop) and start "
                                "it again") from error


def _parse(content: bytes) -> RunningCluster:
    """Read a note. Raises ValueError, KeyError, TypeError or AttributeError when it is not what write_state wrote."""
    fields = json.loads(content)
    marks = tuple(ProcessMark(**mark) for mark in fields.pop("processes"))
    starter = fields.pop("starter", None)
    cluster = RunningCluster(**fields, processes=marks, starter=starter and ProcessMark(**starter))
    texts = (cluster.application, cluster.address, cluster.http_url, cluster.model, cluster.grpc_address,
             cluster.log_dir, cluster.certificate)
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("a text is not a text")
    return cluster


def remove_state(state_dir: Path, application: str) -> None:
    """Forget the application. Raises StateDirError."""
    with _named_errors(state_dir):
        _path(state_dir, application).unlink(missing_ok=True)


@contextlib.contextmanager
def only_starter(state_dir: Path, application: str) -> Iterator[None]:
    """Hold the right to start the application; it ends with the process at the latest.

    Raises StartingError while another process holds it, StateDirError when the folder cannot be written to.
    """
    with _named_errors(state_dir):
        state_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(state_dir / f"{application}.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise StartingError(f"another `moesaic up` is starting application {application!r}",
                                fix="wait for it, or end it with `moesaic down`") from None
    try:
        yield
    finally:
        lock.release()


def require_alive(running: RunningCluster) -> None:
    """Ask the marks of the local nodes whether what everything hangs on still runs: Ray itself would ask for minutes.

    Raises NoClusterError, which says what is gone.
    """
    gone = [mark for mark in running.processes if process_of(mark) is None]
    if any(mark.is_vital for mark in gone):
        names = ", ".join(mark.name for mark in gone if mark.name)
        num_all = len(running.processes)
        what = "all its processes have" if len(gone) == num_all else f"{len(gone)} of its {num_all} processes have"
        logs = f"; the logs are in {running.log_dir}" if running.log_dir else ""
        raise NoClusterError(
            f"application {running.application!r} does not run any more: {what} ended ({names})",
            fix=f"`moesaic down` clears what is left, then `moesaic up` starts it again{logs}")


@contextlib.contextmanager
def _named_errors(state_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = error.filename or state_dir
        raise StateDirError(f"{where}, where running applications are noted, cannot be used: {error.strerror or error}",
                            fix=_OTHER_FOLDER) from error


def _path(state_dir: Path, application: str) -> Path:
    return state_dir / f"{application}.json"
