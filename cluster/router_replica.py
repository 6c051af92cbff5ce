"""One router replica: the service, its two doors, and its part in the group's life. No Ray in here."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import operator
import time

from starlette.applications import Starlette

from cluster.coordinator.client import CoordinatorApi, CoordinatorUnavailableError, Reporter, ViewFollower
from cluster.coordinator.view import GroupPhase, RouterReport, View
from cluster.device.file_limit import bounded_by_files, max_http_connections, raise_file_limit
from cluster.device.model_store import locate_checkpoint
from cluster.device.node import NodeIdentity
from cluster.router_doors import RouterDoors
from serving.config import ServeConfig
from serving.ingress.grpc_server import build_grpc_server
from serving.ingress.http_server import HttpServer
from serving.ingress.openai_http import build_http_app
from serving.link.epoch import Epoch
from serving.metrics import RouterMetrics
from serving.router.generation import ModelCard
from serving.router.service import InferenceService
from serving.served_model import read_served_model
from serving.supervision import run_endless

logger = logging.getLogger(__name__)

_GOODBYE_S = 1.0        # a coordinator that does not answer is gone, or ends with the application
DRAIN_S = 15.0          # of what is open when this router is told to end; Serve kills it after 20


class RouterReplica:
    """`run` follows the coordinator and opens the doors, which answer from the start, with 503 until ready.

    `http_app` is what the HTTP door serves, and Ray Serve's proxy.
    """

    def __init__(self, config: ServeConfig, node: NodeIdentity, coordinator: CoordinatorApi) -> None:
        """Read and judge the model's files: takes a moment. Raises what read_served_model raises."""
        served = read_served_model(locate_checkpoint(config.model, "facts"), config.model)
        for note in served.notes:
            logger.warning("checkpoint_note found=%r fix=%r", note.found, note.fix)
        card = ModelCard(config.model.served_name, served.max_model_len, int(time.time()))
        tokenizer, metrics = served.tokenizer, RouterMetrics()
        num_files = raise_file_limit()
        router = config.router.model_copy(update={"admission": bounded_by_files(
            config.router.admission, num_files, config.router.replicas)})
        if router != config.router:
            logger.warning("admission_bounded num_files=%d max_open_requests=%d max_queued_requests=%d", num_files,
                           router.admission.max_open_requests, router.admission.max_queued_requests)
        self._config = config
        self._node = node
        self._coordinator = coordinator
        self._follower = ViewFollower(coordinator)
        self._service = InferenceService(card, tokenizer, router, config.scheduler, metrics, time.monotonic)
        self.http_app: Starlette = build_http_app(
            self._service, tokenizer, config.router, metrics.render,
            lambda: self._follower.view.why or "the router connects to its shards", config.route_prefix)
        self._doors = RouterDoors(
            HttpServer(self.http_app, max_http_connections(router.admission, num_files)),
            build_grpc_server(self._service, tokenizer, config.router), config.http_host, node.address)
        self._epoch = (0, 0)            # number and revision
        self._placement_metrics = metrics.placement
        self._reporter = Reporter(self._report, self._send_report, operator.ne)
        gc.freeze()     # a collection that looks through what imports leave keeps all requests waiting

    async def run(self) -> None:
        """Serve until cancelled; what is open then may go on for DRAIN_S, and gets an error after that."""
        try:
            await self._doors.open(self._config.http_port, self._config.router.grpc_port)
            await run_endless(follower=self._follower.run(), reporter=self._reporter.run(),
                              epochs=self._follow_epochs())
        finally:
            with contextlib.suppress(CoordinatorUnavailableError, TimeoutError):
                async with asyncio.timeout(_GOODBYE_S):
                    await self._coordinator.forget_router(self._service.router_id)
            self._doors.refuse()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DRAIN_S):
                    await asyncio.gather(self._doors.drain(), self._service.drain())
            await self._service.close()
            await self._doors.close()

    async def _follow_epochs(self) -> None:
        while True:
            epoch = await self._follower.first(self._new_epoch)
            self._epoch = (epoch.number, epoch.revision)
            await self._service.set_epoch(epoch)
            self._reporter.notify()

    def _new_epoch(self, view: View) -> Epoch | None:
        """Take an epoch to serve, or a new revision of one: it changes the shares of the requests."""
        epoch = view.epoch if view.phase is GroupPhase.READY else None
        return epoch if epoch is not None and (epoch.number, epoch.revision) > self._epoch else None

    async def _send_report(self, report: RouterReport) -> None:
        """Say how this router is, and show what the coordinator answers of the placement."""
        status = await self._coordinator.report_router(report)
        if status is not None:
            self._placement_metrics.observe(status.epoch, status.load, status.ratios)

    def _report(self) -> RouterReport:
        service = self._service
        return RouterReport(service.router_id, self._node.name, self._doors.http_address, self._doors.grpc_address,
                            service.epoch_number, service.is_ready())
