"""Goes from a config to a service that answers, and back. What can happen at the same time does.

Ray Serve is imported while the first local node starts; Serve's controller, the proxy, the coordinator and the router
start on it while the other nodes come up; a shard starts as soon as its node is there.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib
import logging
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from cluster.coordinator.client import CoordinatorUnavailableError
from cluster.coordinator.view import ClusterStatus, RouterReport, ShardState
from cluster.device.model_store import locate_checkpoint
from cluster.device.node import PortTakenError, host_and_port, port_fault
from cluster.launch.cluster_client import ClusterClient
from cluster.launch.config_change import changes, what_to_do
from cluster.launch.door_trust import DoorTrust
from cluster.launch.local_nodes import LocalNodes
from cluster.launch.process_marks import are_alive, end_process, mark_of, stop_processes
from cluster.launch.state_file import (
    NoClusterError,
    RunningCluster,
    StartingError,
    StateDirError,
    only_starter,
    read_state,
    remove_state,
    require_alive,
    write_state,
)
from cluster.planner.memory_demand import min_kv_cache_bytes
from serving.config import ServeConfig
from serving.errors import ServingError
from serving.served_model import read_served_model
from serving.tls.identity import read_identity

logger = logging.getLogger(__name__)

POLL_S = 0.1
UNDO_S = 60.0           # longer than a start takes to undo itself
_NODE_START_S = 30.0    # longer than a node without its head takes to give up


class StartError(ServingError):
    """The service cannot come up; what was started has been stopped."""


@dataclass(frozen=True, slots=True)
class Progress:
    """A start has come so far. `status` is None before the coordinator answers."""

    stage: str
    nodes: tuple[str, ...] = ()             # local nodes that run
    status: ClusterStatus | None = None


OnProgress = Callable[[Progress], None]


class BringUp:
    """Does what `moesaic up` does, without its terminal. Used once."""

    def __init__(self, config: ServeConfig, state_dir: Path, on_progress: OnProgress,
                 starter_pid: int | None = None) -> None:
        """`starter_pid` is that of the process that undoes this when it is told to end, where there is one."""
        self._config = config
        self._state_dir = state_dir
        self._on_progress = on_progress
        self._local = LocalNodes()
        self._nodes: list[str] = []
        self._node_errors: list[BaseException] = []
        self._router: RouterReport | None = None
        self._starter = mark_of(starter_pid) if starter_pid is not None else None
        self._deploys_anew = False              # there was no such application before
        self._saving = threading.Lock()
        self._client = ClusterClient(config.application)
        self._other_nodes = threading.Thread(target=self._start_other_nodes, name="local-nodes", daemon=True)

    def run(self) -> RunningCluster:
        """Return when the service answers. On any failure or signal everything that was started is stopped."""
        with self.running() as running:
            return running

    @contextlib.contextmanager
    def running(self) -> Iterator[RunningCluster]:
        """Do the same; the block begins while this process still has its connection, whose end takes half a second.

        An error in the block undoes the start too.
        """
        judge_model(self._config)
        judge_certificates(self._config)
        with only_starter(self._state_dir, self._config.application):
            self._refuse_conflicts()
            try:
                yield self._start()
            except BaseException:
                self._undo()
                raise
            self._client.disconnect()

    def _start(self) -> RunningCluster:
        self._start_nodes_and_application()
        self._wait_until_healthy()
        self._save()
        return self._running()

    def _refuse_conflicts(self) -> None:
        """Refuse before anything is started. Raises StartError, NoClusterError, PortTakenError, StateDirError."""
        config = self._config
        if not config.local_nodes:
            return
        running: RunningCluster | None = None
        with contextlib.suppress(NoClusterError):
            running = read_state(self._state_dir, config.application)
        if running is not None and are_alive(running.processes):
            require_alive(running)
            where = f", at {running.http_url}" if running.http_url else ""
            with contextlib.suppress(CoordinatorUnavailableError, NoClusterError), \
                    ClusterClient.connected(running) as client:
                refuse_changes(client.running_config(), config)
            raise StartError(f"application {config.application!r} runs already{where}",
                             fix="stop it with `moesaic down`, or set `application` to another name")
        for key, host, port in (("http_port", config.http_host, config.http_port),
                                ("proxy_port", config.proxy_host, config.proxy_port)):
            fault = port_fault(host, port)
            if fault is not None:
                raise PortTakenError(f"nothing can listen at {host_and_port(host, port)}: {fault}",
                                     fix=f"set {key} to a port that is free, or http_host to an address of this "
                                         "machine")

    def _start_nodes_and_application(self) -> None:
        imports = threading.Thread(target=importlib.import_module, args=("cluster.app",), name="imports", daemon=True)
        imports.start()
        if self._config.local_nodes:
            self._tell("starting Ray nodes")
            try:
                self._local.start_head(self._config.local_nodes[0], self._other_nodes.start)
            except Exception as error:      # of Ray: of many kinds, most about its folder
                raise StartError(f"the first Ray node did not start: {error}", fix="if it is about a folder or a path, "
                                 "set RAY_TMPDIR to one with a short name that you can write to") from error
            self._nodes.append(self._config.local_nodes[0].name)
            self._save()
        imports.join()
        self._tell("starting Ray Serve")
        self._client.connect(self._local.address if self._config.local_nodes else None)
        self._deploys_anew = not self._client.is_deployed()
        if self._deploys_anew:
            self._save()        # before the first trace of it
        if self._deploys_anew or not self._is_as_configured():
            self._client.deploy(self._config)
        self._save()

    def _is_as_configured(self) -> bool:
        """Return whether the application runs with this config; one that does not answer is deployed anew. Raises
        StartError for one that runs with another."""
        try:
            refuse_changes(self._client.running_config(), self._config)
        except CoordinatorUnavailableError:
            return False
        return True

    def _start_other_nodes(self) -> None:
        def started(name: str) -> None:
            self._nodes.append(name)
            self._save()
        try:
            self._local.start_others(self._config.local_nodes[1:], started)
        except BaseException as error:
            self._node_errors.append(error)

    def _wait_until_healthy(self) -> None:
        with self._client.polling() as latest:
            while not (latest.is_ready and latest.status is not None and answers(self._config, latest.status)):
                if self._node_errors:
                    raise StartError(f"a Ray node did not start: {self._node_errors[0]}",
                                     fix=f"see the logs in {self._local.log_dir}") from self._node_errors[0]
                if latest.error is not None:
                    raise StartError(f"the application could not be followed: {latest.error!r}",
                                     fix=self._where_logs()) from latest.error
                if latest.failure:
                    raise StartError(f"the application could not be deployed: {latest.failure}", fix=self._where_logs())
                if latest.status is not None:
                    self._refuse_hopeless(latest.status)
                self._tell("starting shards" if latest.status is None else "loading", latest.status)
                time.sleep(POLL_S)
        if self._config.local_nodes:
            self._other_nodes.join()
        status = self._client.status()
        self._router = first_router(status)
        self._tell("healthy", status)

    def _refuse_hopeless(self, status: ClusterStatus) -> None:
        """Give up where more waiting mends nothing. Raises StartError."""
        for member, shard in status.shards:
            if shard.state == ShardState.FAILED:
                raise StartError(f"a shard failed on node {member.node_name}: {shard.detail}")
        if status.view.is_too_small and self._config.local_nodes:
            raise StartError(status.view.why, fix="Local nodes do not grow: change the config")

    def _tell(self, stage: str, status: ClusterStatus | None = None) -> None:
        self._on_progress(Progress(stage, tuple(self._nodes), status))

    def _where_logs(self) -> str:
        return f"see the logs in {self._local.log_dir}" if self._config.local_nodes else "see `serve status`"

    def _running(self) -> RunningCluster:
        config, is_local = self._config, bool(self._config.local_nodes)
        router = self._router
        return RunningCluster(config.application, self._local.address if is_local else "auto",
                              http_url(config, router.http_address) if router else "",
                              config.model.served_name, router.grpc_address if router else "",
                              self._local.log_dir if is_local else "", self._local.marks() if is_local else (),
                              self._starter, config.tls.certificate if config.tls else "")

    def _save(self) -> None:
        """Note what is known. Both threads call it: the earlier must not overwrite what the later one knows."""
        with self._saving:
            write_state(self._running(), self._state_dir)

    def _undo(self) -> None:
        logger.info("start_undone application=%s", self._config.application)
        if self._config.local_nodes:
            self._client.disconnect()
            stop_processes(self._local.marks())
            if self._other_nodes.ident is not None:     # a node may have started after all others were stopped
                self._other_nodes.join(_NODE_START_S)
                stop_processes(self._local.marks())
        elif self._deploys_anew:
            with contextlib.suppress(Exception):    # what went wrong first is what counts
                self._client.delete()
        if self._config.local_nodes or self._deploys_anew:
            remove_state(self._state_dir, self._config.application)
        self._client.disconnect()


def judge_certificates(config: ServeConfig) -> None:
    """Raise ConfigError now for what every router and shard would raise later. Files that are not on this machine are
    the nodes'."""
    for option, files in config.certificates.items():
        if config.local_nodes or Path(files.certificate).is_file():
            read_identity(files, option)


def judge_model(config: ServeConfig) -> None:
    """Raise now what every router would raise minutes later. A folder that only the cluster's nodes see is theirs."""
    is_here = (Path(config.model.path).expanduser() / "config.json").is_file()
    if config.local_nodes or is_here:
        served = read_served_model(locate_checkpoint(config.model, "facts"), config.model)
        min_kv_cache_bytes(served.args, config)


def refuse_changes(running: ServeConfig, given: ServeConfig) -> None:
    """Raise StartError when a service that runs is given another config: its members must all compute by one."""
    changed = changes(running, given)
    if changed:
        raise StartError(f"application {given.application!r} runs already, with another config: "
                         f"{'; '.join(map(str, changed))}", fix=what_to_do(changed))


def undo_start(state_dir: Path, application: str, starter_pid: int) -> None:
    """Undo what a start that ended suddenly has noted; `starter_pid` as in BringUp. Its own processes are gone."""
    with contextlib.suppress(NoClusterError, StateDirError):
        running = read_state(state_dir, application)
        if running.starter is not None and running.starter.pid == starter_pid:
            take_down(replace(running, starter=None), state_dir)


def take_down(running: RunningCluster, state_dir: Path) -> int:
    """Stop the application and, if they were started for it, its nodes. Returns the number of processes stopped.

    Who is still starting it is told to end, and undoes what it has begun. Raises StartingError when it does not.
    """
    num_stopped = 0
    if running.starter is not None and not end_process(running.starter, UNDO_S):
        raise StartingError(f"`moesaic up` (process {running.starter.pid}) does not end",
                            fix=f"end it with: kill -KILL {running.starter.pid}, then repeat this command")
    if running.processes:
        num_stopped = stop_processes(running.processes)
    else:
        with ClusterClient.connected(running) as client:
            client.delete()
    remove_state(state_dir, running.application)
    return num_stopped


def http_url(config: ServeConfig, http_address: str) -> str:
    scheme = "https" if config.tls else "http"
    return f"{scheme}://{http_address}{config.route_prefix.rstrip('/')}"


def first_router(status: ClusterStatus) -> RouterReport | None:
    """Return the router that clients are told of: of several on one machine the one that has the configured port."""
    return min(status.routers, key=lambda router: (not router.is_ready, _port_of(router.http_address)), default=None)


def answers(config: ServeConfig, status: ClusterStatus) -> bool:
    """Return whether clients get answers: all routers say so, or one does that is asked. Those on other nodes may have
    addresses that only their nodes reach."""
    return status.is_ready or any(_is_healthy(config, router.http_address) for router in status.routers)


def _port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


def _is_healthy(config: ServeConfig, http_address: str) -> bool:
    """Ask /health once."""
    host = urlsplit(http_url(config, http_address))
    name, port, timeout_s = host.hostname or "", host.port, 2.0
    try:
        connection = http.client.HTTPConnection(name, port, timeout=timeout_s) if config.tls is None else \
            http.client.HTTPSConnection(name, port, timeout=timeout_s,
                                        context=DoorTrust(config.tls.certificate).context())
    except ssl.SSLError:        # the file holds no certificate
        return False
    try:
        connection.request("GET", f"{host.path}/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
