"""Connects the command line to a Ray cluster, to deploy, ask and delete. Imports Ray when it connects."""

from __future__ import annotations

import contextlib
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import cast

from cluster.coordinator.client import CoordinatorUnavailableError
from cluster.coordinator.leaving import Drain
from cluster.coordinator.pool_scale import PoolScale
from cluster.coordinator.view import ClusterStatus, GroupPhase, PlacementStatus, View
from cluster.launch.failure_text import first_error
from cluster.launch.interruption import signals_kept
from cluster.launch.state_file import NoClusterError, RunningCluster, require_alive
from model.placement import Placement
from serving.config import ServeConfig
from serving.errors import ServingError
from serving.link.epoch import PlacementChange

WATCH_S = 1.0
CALL_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 5.0
PLAN_TIMEOUT_S = 300.0      # exact plans of many different layers
_FAILURE_EVERY = 3
_CONTROLLER_POLL_S = 0.05
_SERVE_LOGGER = "ray.serve"


def _require_answer(address: str | None) -> None:
    """Ask the control service for a connection: Ray itself tries for minutes when nobody is there.

    `address` as in ClusterClient.connect. Raises NoClusterError.
    """
    from ray._private.services import canonicalize_bootstrap_address

    try:
        found = canonicalize_bootstrap_address(address or "auto") or ""
        host, _, port = found.rpartition(":")
        with socket.create_connection((host.strip("[]"), int(port)), ANSWER_TIMEOUT_S):
            return
    except (OSError, ValueError) as error:
        raise NoClusterError(f"no Ray cluster answers at {address or 'RAY_ADDRESS, or on this machine'}: {error}",
                             fix="start one with `ray start --head`, set RAY_ADDRESS to one that runs, or give the "
                                 "config local_nodes") from error


def _in_thread(function: Callable[[], None]) -> Future[None]:
    """Do as a pool's submit does, but neither an error beside it nor the end of the process waits for the thread."""
    future: Future[None] = Future()

    def work() -> None:
        try:
            function()
            future.set_result(None)
        except BaseException as error:
            future.set_exception(error)
    threading.Thread(target=work, name="serve-start", daemon=True).start()
    return future


def _wait_for_controller(starting: Future[None]) -> None:
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    while not starting.done():
        try:
            ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
            return
        except ValueError:
            time.sleep(_CONTROLLER_POLL_S)
    starting.result()


@dataclass(slots=True)
class Latest:
    """Holds what the poller knows."""

    status: ClusterStatus | None = None
    failure: str = ""               # why Serve gave the application up
    error: Exception | None = None  # that ended the poller

    @property
    def is_ready(self) -> bool:
        """Return True when the group is, or sleeps already; its routers will be in a moment."""
        return self.status is not None and (self.status.view.phase is GroupPhase.READY or self.status.view.is_asleep)


class ClusterClient:
    """Speaks to one application on one Ray cluster."""

    def __init__(self, application: str) -> None:
        self._application = application

    @staticmethod
    @contextlib.contextmanager
    def connected(running: RunningCluster) -> Iterator[ClusterClient]:
        """Yield a client of an application; without its name of the only one there. Raises NoClusterError, at once when
        it is gone.

        Ray writes what its nodes say to the standard output of whoever is connected, where JSON may be awaited.
        """
        require_alive(running)
        client = ClusterClient(running.application)
        with contextlib.redirect_stdout(sys.stderr):
            try:
                client.connect(None if running.address == "auto" else running.address)
                client.choose_application()
                yield client
            finally:
                client.disconnect()

    def connect(self, address: str | None) -> None:
        """Connect to the GCS at `address`; None: RAY_ADDRESS, or the cluster of this machine. Raises NoClusterError."""
        import ray
        from ray.job_config import JobConfig

        _require_answer(address)
        # Else Ray puts the folder of this process in front of sys.path of every worker (it takes that for a client's).
        job = JobConfig(ray_namespace="moesaic", _client_job=True)
        try:
            with signals_kept():        # ray.init takes SIGTERM for itself
                ray.init(address=address or "auto", log_to_driver=False, logging_level=logging.ERROR, job_config=job)
        except ConnectionError as error:
            raise NoClusterError(f"the Ray cluster at {address or 'RAY_ADDRESS'} does not take this process: {error}",
                                 fix="look at `ray status` and its logs") from error
        import ray.serve  # sets up its logger

        logging.getLogger(_SERVE_LOGGER).setLevel(logging.WARNING)

    def disconnect(self) -> None:
        """End the connection. What runs on the cluster goes on."""
        import ray

        if ray.is_initialized():
            # Serve's handles still wait for answers that nobody needs; Ray's end is an error to them, with a traceback.
            logging.getLogger(_SERVE_LOGGER).setLevel(logging.CRITICAL)
            ray.shutdown()

    def deploy(self, config: ServeConfig) -> None:
        """Return when Serve has taken the application, long before it answers. Raises what serve.start raises."""
        from ray import serve

        from cluster.app import build

        # Nodes on one machine have one set of ports.
        location = "HeadOnly" if config.local_nodes else "EveryNode"
        options = {"host": config.proxy_host, "port": config.proxy_port}
        # serve.start() waits for the HTTP proxy. The application need not: its replicas can start beside it.
        starting = _in_thread(lambda: serve.start(proxy_location=location, http_options=options))
        _wait_for_controller(starting)
        serve.run_many([serve.RunTarget(build(config), config.application, config.route_prefix,
                                        external_scaler_enabled=True)],
                       wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
        starting.result()

    def choose_application(self) -> None:
        """Take the only application of ours that Serve has, where none was named. Raises NoClusterError."""
        if self._application:
            return
        from ray import serve

        from cluster.app import COORDINATOR

        names = sorted(name for name, application in serve.status().applications.items()
                       if COORDINATOR in application.deployments)
        if len(names) != 1:
            raise NoClusterError(f"the Ray cluster has {len(names)} applications of Moesaic: {', '.join(names) or '-'}",
                                 fix="say which with --application" if names else "deploy one: moesaic up CONFIG")
        self._application = names[0]

    def is_deployed(self) -> bool:
        """Return True when Serve has this application now."""
        import ray
        from ray import serve
        from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

        try:
            ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        except ValueError:
            return False
        return self._application in serve.status().applications

    def delete(self) -> None:
        from ray import serve

        serve.delete(self._application)

    def status(self) -> ClusterStatus:
        """Return what the coordinator knows. Raises CoordinatorUnavailableError."""
        return cast(ClusterStatus, self._ask("status"))

    def watch(self, seen_key: str, timeout_s: float) -> View:
        """See Coordinator.watch. Raises CoordinatorUnavailableError."""
        return cast(View, self._ask("watch", seen_key, timeout_s))

    def running_config(self) -> ServeConfig:
        """Return what the application was deployed with. Raises CoordinatorUnavailableError."""
        return cast(ServeConfig, self._ask("running_config"))

    def placement(self) -> PlacementStatus:
        """Return the placement that runs. Raises CoordinatorUnavailableError, NotReadyError."""
        return cast(PlacementStatus, self._ask("placement"))

    def change_placement(self, operation_id: str, why: str, placement: Placement | None) -> PlacementChange:
        """See Coordinator.change_placement. Raises CoordinatorUnavailableError, PlacementError, NotReadyError."""
        return cast(PlacementChange, self._ask("change_placement", operation_id, why, placement,
                                               timeout_s=PLAN_TIMEOUT_S))

    def drain(self, target: str, operation_id: str) -> Drain:
        """See Coordinator.drain. Raises CoordinatorUnavailableError, PlacementError."""
        return cast(Drain, self._ask("drain", target, operation_id, timeout_s=PLAN_TIMEOUT_S))

    def scale(self, pool: str, num: int, shard_id: str | None) -> PoolScale:
        """See Coordinator.scale. Raises CoordinatorUnavailableError, PlacementError."""
        return cast(PoolScale, self._ask("scale", pool, num, shard_id))

    def _ask(self, method: str, *arguments: object, timeout_s: float = CALL_TIMEOUT_S) -> object:
        from ray import serve
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        from cluster.app import COORDINATOR

        try:
            handle = serve.get_deployment_handle(COORDINATOR, self._application)
            return cast(object, getattr(handle, method).remote(*arguments).result(timeout_s=timeout_s))
        except (TimeoutError, KeyError, RayError, RayServeException) as error:      # KeyError: Serve has yet to make it
            cause = getattr(error, "cause", None)
            if isinstance(cause, ServingError):     # what the coordinator itself says
                raise cause from None
            raise CoordinatorUnavailableError(f"the coordinator of {self._application!r} did not answer: {error}",
                                              fix="look at `serve status` and the logs") from error

    @contextlib.contextmanager
    def polling(self) -> Iterator[Latest]:
        """Follow the coordinator in a thread while the block runs, without taking much from what starts beside it."""
        latest, ended = Latest(), threading.Event()
        thread = threading.Thread(target=self._poll_or_tell, args=(latest, ended), name="status", daemon=True)
        thread.start()
        try:
            yield latest
        finally:
            ended.set()
            thread.join(CALL_TIMEOUT_S)

    def _poll_or_tell(self, latest: Latest, ended: threading.Event) -> None:
        try:
            self._poll(latest, ended)
        except Exception as error:
            latest.error = error

    def _poll(self, latest: Latest, ended: threading.Event) -> None:
        key, num_asked = "", 0
        while not ended.is_set():
            try:
                if latest.is_ready:
                    ended.wait(WATCH_S)     # there is little to come, and the block must not wait for an answer
                else:
                    key = self.watch(key, WATCH_S).key
                latest.status = self.status()
            except CoordinatorUnavailableError:
                ended.wait(WATCH_S)
            if num_asked % _FAILURE_EVERY == 0:
                latest.failure = self._failure()
            num_asked += 1

    def _failure(self) -> str:
        from ray import serve

        application = serve.status().applications.get(self._application)
        if application is None or application.status != "DEPLOY_FAILED":
            return ""
        causes = [f"{name}: {first_error(deployment.message)}" for name, deployment in application.deployments.items()
                  if deployment.status != "HEALTHY" and deployment.message]
        return "; ".join(causes) or application.message
