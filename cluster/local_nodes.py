"""Several Ray nodes on this machine, for the demo, the tests and development. They outlive the process that starts them.

Ray's own ways are `ray start`, one command of seconds after the other, and ray.cluster_utils, whose nodes die with
their parent. Both are thin layers over ray._private.node.Node, which is used here directly: Ray is pinned to a minor version.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import psutil
from ray._private.node import Node
from ray._private.parameter import RayParams

from cluster.node import NODE_LABEL
from serving.config import LocalNodeConfig

_OBJECT_STORE_BYTES = 80 << 20      # about the least that Ray takes; tokens and weights never go through it
_KILL_AFTER_S = 5.0


@dataclass(frozen=True, slots=True)
class ProcessMark:
    """A process, and no later one with the same number."""

    pid: int
    create_time_s: float


class _LocalNode(Node):  # type: ignore[misc]
    def __init__(self, params: RayParams, is_head: bool, started: list[Node]) -> None:
        # Before anything runs: a node that fails half-way has processes to stop too.
        self.all_processes: dict[str, list[object]] = {}
        started.append(self)
        super().__init__(params, head=is_head, shutdown_at_exit=False, spawn_reaper=False)

    def start_api_server(self, *, include_dashboard: bool | None, raise_on_failure: bool) -> None:
        """None: it would only report usage statistics, for half a second of start-up and 120 MB."""


class LocalNodes:
    """`start_head`, then `start_others`, which may run beside a driver that is already connected to the head."""

    def __init__(self) -> None:
        self._nodes: list[Node] = []

    @property
    def address(self) -> str:
        """For ray.init()."""
        return str(self._nodes[0].gcs_address)

    @property
    def log_dir(self) -> str:
        return str(self._nodes[0].get_logs_dir_path())

    def marks(self) -> tuple[ProcessMark, ...]:
        """The processes started here. All others are their descendants."""
        pids = [entry.process.pid for node in list(self._nodes) for entries in node.all_processes.values()
                for entry in entries]
        marks = []
        for pid in pids:
            with contextlib.suppress(psutil.NoSuchProcess):
                marks.append(ProcessMark(pid, psutil.Process(pid).create_time()))
        return tuple(marks)

    def start_head(self, config: LocalNodeConfig) -> None:
        self._start(config, RayParams(include_dashboard=False, no_monitor=True), is_head=True)

    def start_others(self, configs: Sequence[LocalNodeConfig], on_started: Callable[[str], None]) -> None:
        """All at once, each in a thread."""
        if not configs:
            return
        sockets = f"{self._nodes[0].get_session_dir_path()}/sockets"

        def start(config: LocalNodeConfig) -> None:
            # Two nodes that start at once would choose the same names.
            params = RayParams(gcs_address=self.address, raylet_socket_name=f"{sockets}/raylet.{config.name}",
                               plasma_store_socket_name=f"{sockets}/plasma.{config.name}")
            self._start(config, params, is_head=False)
            on_started(config.name)

        with ThreadPoolExecutor(len(configs)) as pool:
            list(pool.map(start, configs))

    def _start(self, config: LocalNodeConfig, params: RayParams, is_head: bool) -> None:
        params.update(num_cpus=config.num_cpus, num_gpus=config.num_gpus, resources=dict(config.resources),
                      object_store_memory=_OBJECT_STORE_BYTES, node_name=config.name, labels={NODE_LABEL: config.name},
                      min_worker_port=0, max_worker_port=0, dashboard_agent_listen_port=None,
                      include_log_monitor=False)
        _LocalNode(params, is_head, self._nodes)


def stop_processes(marks: Sequence[ProcessMark]) -> int:
    """End exactly these processes and their descendants: ask, and after a while kill. Returns how many there were."""
    processes: list[psutil.Process] = []
    for mark in marks:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(mark.pid)
            if abs(process.create_time() - mark.create_time_s) < 0.01:
                processes += [*process.children(recursive=True), process]
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=_KILL_AFTER_S)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=_KILL_AFTER_S)
    return len(processes)


def are_alive(marks: Sequence[ProcessMark]) -> bool:
    """Whether any of them runs."""
    for mark in marks:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(mark.pid)
            if abs(process.create_time() - mark.create_time_s) < 0.01 and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


