"""How commands that ask a running service find it: one that was started here, or any Ray cluster that has one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.device.state_dir import STATE_DIR_VARIABLE, default_state_dir
from cluster.launch.state_file import RunningCluster, read_state

if TYPE_CHECKING:
    from cluster.launch.cluster_client import ClusterClient

Application = Annotated[str | None, typer.Option(help="Which application, when several run")]
StateDir = Annotated[Path | None, typer.Option(envvar=STATE_DIR_VARIABLE, help="Where running applications are noted")]
# KubeRay sets the variable in all its pods.
Address = Annotated[str | None, typer.Option(
    envvar="RAY_ADDRESS", help="host:port of a Ray cluster  [default: the one that was started here]")]


@contextlib.contextmanager
def reached(application: str | None, state_dir: Path | None, address: str | None) -> Iterator[ClusterClient]:
    """Yield a client of the application. Raises NoClusterError, StateDirError."""
    from cluster.launch.cluster_client import ClusterClient

    running = (RunningCluster(application or "", address, http_url="", model="") if address
               else read_state(state_dir or default_state_dir(), application))
    with ClusterClient.connected(running) as client:
        yield client
