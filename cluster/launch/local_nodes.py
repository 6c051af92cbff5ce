"""Starts several Ray nodes on this machine, for the demo, tests and development. They outlive the process that does.

Ray's own ways are `ray start`, one command of seconds after the other, and ray.cluster_utils, whose nodes die with
their parent. Both are thin layers over ray._private.node.Node, used here directly: Ray is pinned to a minor version.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from ray._private.node import Node
from ray._private.parameter import RayParams
from ray._private.services import ProcessInfo

from cluster.device.node import NODE_LABEL
from cluster.http_proxy import CALLBACK
from cluster.launch.process_marks import ProcessMark, mark_of
from serving.config import LocalNodeConfig

_ENVIRONMENT = {
    # Serve kills an HTTP proxy that takes more than 5 s to start, and starts another: never ready on a busy machine.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    # Ray runs workers at 15, where anything else that runs on this machine all but stops them.
    "RAY_worker_niceness": "0",
    # Nothing in the folder where the service is started may take the place of a module of the program.
    "PYTHONSAFEPATH": "1",
    # Ray's own gRPC would go through the user's proxy; to gRPC the empty one means none. Hubs are reached by HTTP.
    "grpc_proxy": "",
    **CALLBACK,
}
_OBJECT_STORE_BYTES = 80 << 20      # about the least that Ray takes; tokens and weights never go through it


class _LocalNode(Node):  # type: ignore[misc]
    def __init__(self, name: str, params: RayParams, is_head: bool, started: list[_LocalNode],
                 on_control_service: Callable[[], None] | None = None) -> None:
        # Before anything runs: a node that fails half-way has processes to stop too.
        self.all_processes: dict[str, list[ProcessInfo]] = {}
        self.shown_name = name
        self.is_vital = is_head
        self._on_control_service = on_control_service
        started.append(self)
        super().__init__(params, head=is_head, shutdown_at_exit=False, spawn_reaper=False)

    def start_api_server(self, *, include_dashboard: bool | None, raise_on_failure: bool) -> None:
        """Start none: it would only report usage statistics, for half a second of start-up and 120 MB.

        The head calls this when its control service (GCS) runs and its raylet is yet to start.
        """
        if self._on_control_service is not None:
            self._on_control_service()


class LocalNodes:
    """Call `start_head`, then `start_others`, which may run beside a driver that is already connected to the head, and
    may begin when the head's control service runs."""

    def __init__(self) -> None:
        self._nodes: list[_LocalNode] = []

    @property
    def address(self) -> str:
        """Return the address for ray.init()."""
        return str(self._nodes[0].gcs_address)

    @property
    def log_dir(self) -> str:
        return str(self._nodes[0].get_logs_dir_path())

    def marks(self) -> tuple[ProcessMark, ...]:
        """Return the processes started here. All others are their descendants."""
        marks = [mark_of(entry.process.pid, f"{kind} of {node.shown_name}", node.is_vital)
                 for node in list(self._nodes) for kind, entries in list(node.all_processes.items())
                 for entry in list(entries)]
        return tuple(mark for mark in marks if mark is not None)

    def start_head(self, config: LocalNodeConfig, on_control_service: Callable[[], None] | None = None) -> None:
        """Start the first; `on_control_service` is called when others can join, while the head's own raylet starts."""
        self._start(config, RayParams(include_dashboard=False, no_monitor=True), True, on_control_service)

    def start_others(self, configs: Sequence[LocalNodeConfig], on_started: Callable[[str], None]) -> None:
        """Start all at once, each in a thread."""
        if not configs:
            return
        sockets = f"{self._nodes[0].get_session_dir_path()}/sockets"

        def start(number: int, config: LocalNodeConfig) -> None:
            # Two nodes that start at once would choose the same names; those of the nodes may be too long for a path.
            params = RayParams(gcs_address=self.address, raylet_socket_name=f"{sockets}/raylet.{number}",
                               plasma_store_socket_name=f"{sockets}/plasma.{number}")
            self._start(config, params, False)
            on_started(config.name)

        with ThreadPoolExecutor(len(configs)) as pool:
            list(pool.map(start, range(1, len(configs) + 1), configs))

    def _start(self, config: LocalNodeConfig, params: RayParams, is_head: bool,
               on_control_service: Callable[[], None] | None = None) -> None:
        params.update(num_cpus=config.num_cpus, num_gpus=config.num_gpus, resources=dict(config.resources),
                      object_store_memory=_OBJECT_STORE_BYTES, node_name=config.name, labels={NODE_LABEL: config.name},
                      min_worker_port=0, max_worker_port=0, dashboard_agent_listen_port=None,
                      include_log_monitor=False, env_vars=_ENVIRONMENT)
        _LocalNode(config.name, params, is_head, self._nodes, on_control_service)
