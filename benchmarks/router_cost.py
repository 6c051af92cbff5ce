"""Measures what a router costs: processor time for each streamed token, and what it adds to the first.

`python benchmarks/router_cost.py [--clients 64,256] [--tokens 150] [--step-ms 20] [--repeats 3] [--doors http,...]`
A real router (doors, service, admission, journal, detokenizer, link over gRPC) has one shard: the real engine with a
stub for the model, whose step takes `--step-ms`. Clients stream one answer after the other, each on a connection of its
own unless said otherwise. The doors:
* `http`: completions over the router's own door; `chat`: chats; `ids`: completions with token ids
* `grpc`: the router's gRPC door; `grpc-shared`: the same with all streams of a run on one connection
* `grpc-bare`: a gRPC server without a router, which sends as many messages: what the library itself costs
* `link`: no router, but its link to the shard: what the shard takes to the first token
* `proxy`: as `http`, behind Ray Serve's HTTP proxy (starts Ray)
Doors take turns within a repeat; medians over repeats. `cpu us` is the processor time of all processes between shard
and client, user and system, for one token: it says what a core can carry, however busy the machine is. `a message` is
the number of tokens in one, which grows where a router cannot follow. First tokens are those of a further client, which
asks again and again for one token while the others stream as before; `added` is less the same of `link`.
The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import multiprocessing
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import asdict, astuple, dataclass
from multiprocessing.pool import Pool
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import grpc
import psutil
import uvloop

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.bodies import OneTokenExecutor  # noqa: E402
from benchmarks.machine import describe  # noqa: E402
from benchmarks.make_checkpoint import CheckpointWriter, write_tokenizer  # noqa: E402
from benchmarks.router_clients import CONTEXT, MODEL, Load, member_at, run_load  # noqa: E402
from model.placement import Placement  # noqa: E402
from serving.config import AdmissionConfig, RouterConfig, SchedulerConfig  # noqa: E402
from serving.engine.engine import Engine  # noqa: E402
from serving.engine.scheduler import Scheduler  # noqa: E402
from serving.ingress.grpc.server import SERVICE_NAME, build_grpc_server  # noqa: E402
from serving.ingress.http.app import build_http_app  # noqa: E402
from serving.ingress.http.server import HttpServer  # noqa: E402
from serving.link.epoch import Epoch, RequestShare  # noqa: E402
from serving.link.server import ShardLinkServer, start_link_server  # noqa: E402
from serving.metrics import RouterMetrics  # noqa: E402
from serving.proto import inference_pb2 as pb  # noqa: E402
from serving.router.generation import ModelCard  # noqa: E402
from serving.router.service import InferenceService  # noqa: E402
from serving.text.tokenizer import Tokenizer  # noqa: E402

NUM_EMBEDDINGS = 512
BLOCK_SIZE = 16
CONFIG = RouterConfig(admission=AdmissionConfig(max_open_requests=1024))
COLUMNS = ("door", "clients", "tokens/s", "a message", "cpu us", "shard us", "client us", "first p50", "first p99",
           "added p50", "added p99", "tokens/s core")
ROW = "{:>11} " + " {:>9}" * 10 + " {:>13}"


@dataclass(frozen=True, slots=True)
class Run:
    """One door under some clients."""

    tokens_per_s: float
    tokens_per_message: float
    cpu_us_per_token: float         # of the router
    shard_us_per_token: float
    client_us_per_token: float
    first_p50_ms: float
    first_p99_ms: float


@dataclass(frozen=True, slots=True)
class Door:
    name: str
    port: int
    processes: list[psutil.Process]     # between shard and client


async def serve_shard(port: Synchronized[int], step_s: float) -> None:
    """Run one shard until killed; its link's port goes into `port`."""
    servicer = ShardLinkServer("s0", time.monotonic)
    _, port.value = await start_link_server(servicer, "127.0.0.1:0")

    async def ring_nobody(step_index: int) -> None:
        pass

    scheduler = Scheduler(SchedulerConfig(block_size=BLOCK_SIZE), 256 * CONTEXT // BLOCK_SIZE, CONTEXT)
    engine = Engine(scheduler, OneTokenExecutor(step_s), 1, time.monotonic, ring_nobody, servicer.deliver)
    servicer.serve(engine, NUM_EMBEDDINGS)
    await engine.run()


async def start_service(folder: Path, shard_port: int) -> tuple[InferenceService, Tokenizer, RouterMetrics]:
    metrics, tokenizer = RouterMetrics(), Tokenizer.from_dir(folder)
    service = InferenceService(ModelCard(MODEL, CONTEXT, 0), tokenizer, CONFIG,
                               SchedulerConfig(block_size=BLOCK_SIZE), metrics, time.monotonic)
    service.set_epoch(Epoch(1, (member_at(shard_port),), Placement(1, ()), "", (RequestShare(1.0, 2048),)))
    gc.freeze()
    return service, tokenizer, metrics


async def serve_router(folder: Path, shard_port: Synchronized[int], ports: dict[str, Synchronized[int]]) -> None:
    """Serve at both doors until killed."""
    service, tokenizer, metrics = await start_service(folder, await set_value(shard_port))
    door = HttpServer(build_http_app(service, tokenizer, CONFIG, metrics.render))
    await door.start(listener(ports["http"]))
    grpc_server = build_grpc_server(service, tokenizer)
    ports["grpc"].value = grpc_server.add_insecure_port("127.0.0.1:0")
    await grpc_server.start()
    await grpc_server.wait_for_termination()


async def serve_bare(port: Synchronized[int], step_s: float) -> None:
    """Answer Generate with messages like a router's, one a step, until killed; nothing is behind it."""
    message = pb.GenerateResponse(request_id="0" * 32, text=" token", token_ids=[9]).SerializeToString()
    steps = [asyncio.Event()]

    async def generate(request: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> object:
        for _ in range(request.sampling.max_tokens):
            await steps[-1].wait()
            yield message

    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, {
        "Generate": grpc.unary_stream_rpc_method_handler(generate, pb.GenerateRequest.FromString)}),))
    port.value = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    while True:
        await asyncio.sleep(step_s)
        steps.append(asyncio.Event())
        steps.pop(0).set()


def listener(port: Synchronized[int]) -> socket.socket:
    found = socket.create_server(("127.0.0.1", 0), backlog=1024)
    port.value = found.getsockname()[1]
    return found


async def set_value(value: Synchronized[int]) -> int:
    while not value.value:     # noqa: ASYNC110
        await asyncio.sleep(0.01)
    return value.value


def cpu_s(processes: list[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def measure(clients: Pool, door: Door, shard: psutil.Process, options: argparse.Namespace, num_clients: int) -> Run:
    """Run the load twice: for its costs, and for first tokens while it runs."""
    num_answers = max(1, options.streams // num_clients)
    work = Load(door.name, door.port, num_clients, num_answers, options.tokens)
    before_s, shard_before_s = cpu_s(door.processes), cpu_s([shard])
    told = clients.apply(run_load, (work, False))
    num_tokens = num_clients * num_answers * options.tokens
    spent_s = (cpu_s(door.processes) - before_s, cpu_s([shard]) - shard_before_s, told.client_s)
    firsts = sorted(clients.apply(run_load, (work, True)).firsts_s)
    return Run(round(num_tokens / told.wall_s), round(num_tokens / told.num_messages, 2),
               *(round(seconds / num_tokens * 1e6, 1) for seconds in spent_s),
               *(round(firsts[int(part * len(firsts))] * 1e3, 1) for part in (0.5, 0.99)))


@contextlib.contextmanager
def process(work: Callable[[], Coroutine[None, None, None]]) -> Iterator[psutil.Process]:
    """Run the work in a child, on uvloop, until the block is left."""
    child = multiprocessing.get_context("fork").Process(
        target=lambda: uvloop.run(work()), daemon=True)
    child.start()
    try:
        yield psutil.Process(child.pid)
    finally:
        child.kill()
        child.join()


@contextlib.contextmanager
def proxied(folder: Path, shard_port: Synchronized[int], port: int) -> Iterator[list[psutil.Process]]:
    """Serve the same app behind Ray Serve's proxy, on a Ray node of its own."""
    import ray
    from ray import serve

    from cluster.http_proxy import CALLBACK
    from cluster.launch.local_nodes import LocalNodes
    from cluster.launch.process_marks import process_of, stop_processes
    from serving.config import LocalNodeConfig

    link_port = shard_port.value

    @serve.ingress()
    class Router:
        async def __init__(self) -> None:  # type: ignore[misc]
            service, tokenizer, metrics = await start_service(folder, link_port)
            self._door = build_http_app(service, tokenizer, CONFIG, metrics.render)

        def __serve_build_asgi_app__(self) -> object:
            return self._door

    nodes = LocalNodes()
    try:
        nodes.start_head(LocalNodeConfig(name="doors", num_cpus=4))
        ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR", runtime_env={
            "env_vars": {"PYTHONPATH": str(Path(__file__).parent.parent), **CALLBACK}})
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        serve.run(serve.deployment(Router, max_ongoing_requests=10_000, logging_config={
            "enable_access_log": False}).bind(), name="doors")
        found = [child for mark in nodes.marks() if (node := process_of(mark)) for child in node.children(True)]
        yield [child for child in set(found)
               if any(name in " ".join(child.cmdline()) for name in ("ProxyActor", "ServeReplica:doors"))]
    finally:
        ray.shutdown()
        stop_processes(nodes.marks())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", default="64,256")
    parser.add_argument("--tokens", type=int, default=150, help="of each answer")
    parser.add_argument("--streams", type=int, default=256, help="answers of all clients together")
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--doors", default="http,chat,ids,grpc,grpc-shared,grpc-bare,link,proxy")
    options = parser.parse_args()
    step_s, names = options.step_ms / 1e3, options.doors.split(",")
    ports = {name: multiprocessing.Value("i", 0) for name in ("link", "http", "grpc", "bare")}
    with (multiprocessing.get_context("fork").Pool(1) as clients, tempfile.TemporaryDirectory() as name,
          contextlib.ExitStack() as stack):
        folder = Path(name) / "checkpoint"
        writer = CheckpointWriter(folder, 1)
        write_tokenizer(writer)
        writer.add_json("config.json", {"vocab_size": NUM_EMBEDDINGS, "eos_token_id": 0})
        shard = stack.enter_context(process(lambda: serve_shard(ports["link"], step_s)))
        router = stack.enter_context(process(lambda: serve_router(folder, ports["link"], ports)))
        bare = stack.enter_context(process(lambda: serve_bare(ports["bare"], step_s)))
        number = {name: asyncio.run(set_value(port)) for name, port in ports.items()}
        print(f"process of the router: {router.pid}", file=sys.stderr)      # for a profiler
        doors = [Door("link", number["link"], []), Door("grpc-bare", number["bare"], [bare]),
                 *(Door(name, number["http"], [router]) for name in ("http", "chat", "ids")),
                 *(Door(name, number["grpc"], [router]) for name in ("grpc", "grpc-shared"))]
        doors = [door for door in doors if door.name in names]
        if "proxy" in names:
            from cluster.device.node import free_port
            proxy_port = free_port()
            doors.append(Door("proxy", proxy_port, stack.enter_context(proxied(folder, ports["link"], proxy_port))))
        report(clients, doors, shard, options)


def report(clients: Pool, doors: list[Door], shard: psutil.Process, options: argparse.Namespace) -> None:
    print(ROW.format(*COLUMNS))
    found: dict[str, dict[str, object]] = {}
    for num_clients in map(int, options.clients.split(",")):
        runs: dict[str, list[Run]] = {door.name: [] for door in doors}
        for repeat in range(options.repeats + 1):
            for door in doors:
                run = measure(clients, door, shard, options, num_clients)
                runs[door.name] += [run] * (repeat > 0)      # the first warms up
        medians = {name: Run(*(statistics.median(values) for values in zip(*map(astuple, measured), strict=True)))
                   for name, measured in runs.items()}
        for name, median in medians.items():
            figures = {**asdict(median), **_derived(name, median, medians.get("link"))}
            print(ROW.format(name, num_clients, *("" if value is None else value for value in figures.values())),
                  flush=True)
            found.setdefault(name, {})[str(num_clients)] = figures
    print(json.dumps({"benchmark": "router_cost", **describe(), "step_ms": options.step_ms,
                      "tokens_an_answer": options.tokens, "doors": found}))


def _derived(name: str, run: Run, link: Run | None) -> dict[str, float | None]:
    """Return what a door adds to the first token, and what a core carries; None: it does not say."""
    is_router = not name.startswith(("link", "grpc-bare"))
    adds = is_router and link is not None
    return {"added_p50_ms": round(run.first_p50_ms - link.first_p50_ms, 1) if adds else None,
            "added_p99_ms": round(run.first_p99_ms - link.first_p99_ms, 1) if adds else None,
            "tokens_per_s_a_core": round(1e6 / run.cpu_us_per_token) if run.cpu_us_per_token else None}


if __name__ == "__main__":
    main()
