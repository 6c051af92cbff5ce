"""What `moesaic up` leaves for `status`, `chat` and `down`: one small file for each running application."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

import platformdirs

from cluster.launch.process_marks import ProcessMark
from serving.errors import ServingError


class NoClusterError(ServingError):
    pass


@dataclass(frozen=True, slots=True)
class RunningCluster:
    """One application that was started from this machine."""

    application: str
    address: str                            # of Ray's GCS
    http_url: str
    model: str                              # as clients call it
    grpc_address: str = ""                  # host:port of one router's gRPC door, once it is known
    log_dir: str = ""
    processes: tuple[ProcessMark, ...] = ()     # of local nodes; none when the Ray cluster was there before

    @property
    def http_address(self) -> str:
        """host:port, and the route prefix if there is one."""
        return self.http_url.removeprefix("http://")


def default_state_dir() -> Path:
    return platformdirs.user_state_path("moesaic")


def write_state(cluster: RunningCluster, state_dir: Path) -> None:
    state_dir.mkdir(parents=True, exist_ok=True)
    path = _path(state_dir, cluster.application)
    unfinished = path.with_suffix(f".unfinished-{os.getpid()}-{threading.get_ident()}")     # several threads may write
    unfinished.write_text(json.dumps(asdict(cluster), indent=1), encoding="utf-8")
    os.replace(unfinished, path)


def read_state(state_dir: Path, application: str | None = None) -> RunningCluster:
    """The named application, or the only one there is. Raises NoClusterError."""
    names = sorted(path.stem for path in state_dir.glob("*.json"))
    if application is None and len(names) > 1:
        raise NoClusterError(f"several applications were started here: {', '.join(names)}",
                             fix="say which with --application")
    name = application or (names[0] if names else None)
    if name is None or name not in names:
        raise NoClusterError(f"no application{f' {name!r}' if name else ''} was started from this machine",
                             fix="start one with: moesaic up examples/demo.yaml")
    content = json.loads(_path(state_dir, name).read_text(encoding="utf-8"))
    content["processes"] = tuple(ProcessMark(**mark) for mark in content["processes"])
    return RunningCluster(**content)


def remove_state(state_dir: Path, application: str) -> None:
    _path(state_dir, application).unlink(missing_ok=True)


def _path(state_dir: Path, application: str) -> Path:
    return state_dir / f"{application}.json"
