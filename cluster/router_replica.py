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
from cluster.device.state_dir import database_url, default_state_dir
from cluster.live_view import LiveView
from cluster.router_doors import RouterDoors
from serving.batches.runner import BatchRunner
from serving.batches.stores import BatchStores
from serving.config import ServeConfig
from serving.ingress.batches.line_worker import LineWorker
from serving.ingress.grpc.server import build_grpc_server
from serving.ingress.http.app import HttpParts, build_http_app, no_rates
from serving.ingress.http.server import HttpServer
from serving.ingress.http.ui.live_feed import LiveFeed
from serving.ingress.responses.store import MemoryStore, SharedStore
from serving.ingress.usage import UsageEndpoint
from serving.link.epoch import Epoch
from serving.link.security import LinkSecurity
from serving.metrics import RouterMetrics
from serving.router.generation import ModelCard, Service
from serving.router.logged_service import LoggedService
from serving.router.metered_service import MeteredService
from serving.router.patient_service import PatientService
from serving.router.router_load import RouterLoad
from serving.router.service import InferenceService
from serving.router.traced_service import TracedService
from serving.served_model import read_served_model
from serving.supervision import run_endless
from serving.tenants.access import Access
from serving.tls.identity import RenewedIdentity
from serving.tracing.opening import open_tracer

logger = logging.getLogger(__name__)

_GOODBYE_S = 1.0        # a coordinator that does not answer is gone, or ends with the application
DRAIN_S = 15.0          # of what is open when this router is told to end; Serve kills it after 20


class RouterReplica:
    """`run` follows the coordinator and opens the doors, which answer from the start, with 503 until ready.

    `http_app` is what the HTTP door serves, and Ray Serve's proxy.
    """

    def __init__(self, config: ServeConfig, node: NodeIdentity, coordinator: CoordinatorApi) -> None:
        """Read and judge the model's files: takes a moment. Raises what read_served_model raises, ConfigError."""
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
        identities = {option: RenewedIdentity(files, option) for option, files in config.certificates.items()}
        for option, identity in identities.items():
            metrics.watch_certificate(option, identity.remaining_s)
        self._service = InferenceService(card, tokenizer, router, config.scheduler, metrics, time.monotonic,
                                         LinkSecurity(identities.get("cluster_tls")))
        self._access = Access(
            database_url(config.access.database, default_state_dir()), self._service.router_id,
            config.access.keep_requests_days) if config.access.keys or config.access.database else None
        self._stores = BatchStores(self._access.engine, self._service.router_id, config.batch) if self._access else None
        metered: Service = self._service if self._access is None \
            else MeteredService(self._service, self._access.meter, time.time, metrics.tenants)
        if config.router.log_requests:
            metered = LoggedService(metered, time.monotonic)
        self._tracer = open_tracer(config.tracing, "router", self._service.router_id, time.monotonic)
        if self._tracer is not None:
            metered = TracedService(metered, self._tracer, time.monotonic)
        keys = self._access.keys if self._access and config.access.keys else None
        responses = SharedStore(self._access.responses) if self._access else MemoryStore()
        usage = UsageEndpoint(self._access.usage, config.access.prices, time.time) if self._access else None
        self._batches = BatchRunner(
            self._stores, LineWorker(PatientService(metered), tokenizer, router.tool_parser, responses, keys),
            self._service.has_room, time.time, metrics.batches) if self._stores else None
        self._live = LiveView(card.name, coordinator, metrics, self._service.load, time.time)
        self._live_feed = LiveFeed(self._live.look, time.monotonic)
        self.http_app: Starlette = build_http_app(
            metered, tokenizer, config.router, metrics.render, config.route_prefix,
            HttpParts(lambda: self._follower.view.why or "the router connects to its shards", keys,
                      self._access.meter.headers if self._access else no_rates, responses, self._live_feed,
                      self._stores, usage))
        self._doors = RouterDoors(
            HttpServer(self.http_app, max_http_connections(router.admission, num_files)),
            build_grpc_server(metered, tokenizer, keys, router.tool_parser), config.http_host, node.address,
            identities.get("tls"))
        self._told: tuple[int, int, tuple[str, ...]] = (0, 0, ())       # number, revision, who leaves
        self._metrics = metrics
        self._reporter = Reporter(self._report, self._send_report, operator.ne)
        self._service.on_shards_changed = self._reporter.notify
        self._service.is_asleep = lambda: self._follower.view.is_asleep
        metrics.autoscaler.asleep.set_function(self._service.is_asleep)
        gc.freeze()     # a collection that looks through what imports leave keeps all requests waiting

    async def run(self) -> None:
        """Serve until cancelled; what is open then may go on for DRAIN_S, and gets an error after that."""
        try:
            await self._doors.open(self._config.http_port, self._config.router.grpc_port)
            works = {"follower": self._follower.run(), "reporter": self._reporter.run(),
                     "epochs": self._follow_epochs()}
            works |= {"access": self._access.run()} if self._access else {}
            works |= {"stores": self._stores.run()} if self._stores else {}
            works |= {"batches": self._batches.run()} if self._batches else {}
            await run_endless(**works)
        finally:
            await (self._access.close_after(self._end()) if self._access else self._end())

    async def _end(self) -> None:
        with contextlib.suppress(CoordinatorUnavailableError, TimeoutError):
            async with asyncio.timeout(_GOODBYE_S):
                await self._coordinator.forget_router(self._service.router_id)
        self._doors.refuse()
        self._live_feed.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                await asyncio.gather(self._doors.drain(), self._service.drain())
        await self._service.close()
        await self._doors.close()
        if self._stores:
            await self._stores.close()
        if self._tracer is not None:
            await self._tracer.close()

    async def _follow_epochs(self) -> None:
        while True:
            epoch, leaving = await self._follower.first(self._news)
            self._told = (epoch.number, epoch.revision, leaving)
            self._service.set_epoch(epoch, leaving)

    def _news(self, view: View) -> tuple[Epoch, tuple[str, ...]] | None:
        """Take an epoch to serve, a new revision of it, which changes the shares of the requests, or who leaves it.

        The first when it is ready: until then requests are refused. Later ones at once: what was on members that are
        gone need not wait, for those that go on take and queue it.
        """
        epoch = view.epoch
        if epoch is None or (view.phase is not GroupPhase.READY and self._told[0] == 0):
            return None
        is_old = (epoch.number, epoch.revision) < self._told[:2]
        return None if is_old or (epoch.number, epoch.revision, view.leaving) == self._told else (epoch, view.leaving)

    async def _send_report(self, report: RouterReport) -> None:
        """Say how this router is, and show what the coordinator answers of the placement."""
        status = await self._coordinator.report_router(report)
        self._live.placement = status
        if status is not None:
            self._metrics.placement.observe(status.epoch, status.load, status.ratios)
            if (scaling := status.autoscaler) is not None:
                self._metrics.autoscaler.observe(scaling.wanted, scaling.backlog_s, scaling.kind, scaling.ratio)
            for change in status.membership_changes:
                if change.resumed_ms is not None:
                    self._metrics.membership.observe(change.epoch_after, change.cause, change.pause_s)

    def _report(self) -> RouterReport:
        service = self._service
        return RouterReport(service.router_id, self._node.name, self._doors.http_address, self._doors.grpc_address,
                            service.epoch_number, service.is_ready(),
                            service.load() if self._config.autoscaling is not None else RouterLoad(),
                            dict(self._metrics.requests.num_moved))
