"""Measures what a router's doors cost: tokens a second, time to the first token, and processor time for each token.

`python benchmarks/doors.py [--clients 16,64] [--tokens 200] [--repeats 3] [--doors http,h11,grpc,proxy]`
A real router (service, admission, journal, detokenizer, link over gRPC) has one shard, the real engine with a stub for
the model; only its doors differ. `http` is the router's own door, `h11` the same on uvicorn's other parser, `grpc` its
gRPC door, `proxy` the same app behind Ray Serve's HTTP proxy (starts Ray). Each client streams one answer after the
other on one connection. Doors take turns within a repeat; medians over repeats. `cpu_us` is the processor time of all
processes between shard and client, user and system, for one token: it says what a core can carry, however busy the
machine is. The last line of stdout is one JSON object.
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
import uvicorn
import uvloop

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.bodies import OneTokenExecutor  # noqa: E402
from benchmarks.machine import describe  # noqa: E402
from benchmarks.make_checkpoint import CheckpointWriter, write_tokenizer  # noqa: E402
from model.placement import Placement  # noqa: E402
from serving.config import AdmissionConfig, RouterConfig, SchedulerConfig  # noqa: E402
from serving.engine.engine import Engine  # noqa: E402
from serving.engine.scheduler import Scheduler  # noqa: E402
from serving.ingress.grpc_server import build_grpc_server  # noqa: E402
from serving.ingress.http_server import HttpServer  # noqa: E402
from serving.ingress.openai_http import build_http_app  # noqa: E402
from serving.link.epoch import DeviceFacts, Epoch, Member, RequestShare  # noqa: E402
from serving.link.server import ShardLinkServer, start_link_server  # noqa: E402
from serving.metrics import RouterMetrics  # noqa: E402
from serving.proto import inference_pb2 as pb  # noqa: E402
from serving.proto.inference_pb2_grpc import InferenceStub  # noqa: E402
from serving.router.generation import ModelCard  # noqa: E402
from serving.router.service import InferenceService  # noqa: E402
from serving.text.tokenizer import Tokenizer  # noqa: E402

NUM_EMBEDDINGS = 512
CONTEXT = 4096
BLOCK_SIZE = 16
CONFIG = RouterConfig(admission=AdmissionConfig(max_open_requests=1024))
ROW = "{:>8} {:>6} {:>10} {:>10} {:>10} {:>12}"


@dataclass(frozen=True, slots=True)
class Run:
    """One door under some clients."""

    tokens_per_s: float
    ttft_p50_ms: float
    cpu_us_per_token: float


@dataclass(frozen=True, slots=True)
class Door:
    name: str
    port: int
    processes: list[psutil.Process]     # between shard and client


async def serve_shard(port: Synchronized[int]) -> None:
    """Run one shard until killed; its link's port goes into `port`."""
    servicer = ShardLinkServer(time.monotonic)
    _, port.value = await start_link_server(servicer, "127.0.0.1:0")

    async def ring_nobody(step_index: int) -> None:
        pass

    scheduler = Scheduler(SchedulerConfig(block_size=BLOCK_SIZE), 256 * CONTEXT // BLOCK_SIZE, CONTEXT)
    engine = Engine(scheduler, OneTokenExecutor(), 1, time.monotonic, ring_nobody, servicer.deliver)
    servicer.open_epoch(1, engine)
    await engine.run()


async def start_service(folder: Path, shard_port: int) -> tuple[InferenceService, Tokenizer, RouterMetrics]:
    metrics, tokenizer = RouterMetrics(), Tokenizer.from_dir(folder)
    member = Member("s0", "default", "n0", "n0", f"127.0.0.1:{shard_port}", DeviceFacts("cpu", "stub", "stub", 1, 1))
    service = InferenceService(ModelCard("m", CONTEXT, 0), tokenizer, CONFIG,
                               SchedulerConfig(block_size=BLOCK_SIZE), metrics, time.monotonic)
    await service.set_epoch(Epoch(1, (member,), Placement(1, ()), "", (RequestShare(1.0, 2048),)))
    gc.freeze()
    return service, tokenizer, metrics


async def serve_router(folder: Path, shard_port: Synchronized[int], ports: dict[str, Synchronized[int]]) -> None:
    """Serve at three doors until killed."""
    service, tokenizer, metrics = await start_service(folder, await set_value(shard_port))
    app = build_http_app(service, tokenizer, CONFIG, metrics.render)
    door = HttpServer(app)
    await door.start(listener(ports["http"]))
    config = uvicorn.Config(app, http="h11", log_level="error", lifespan="off", ws="none", access_log=False)
    grpc_server = build_grpc_server(service, tokenizer, CONFIG)
    ports["grpc"].value = grpc_server.add_insecure_port("127.0.0.1:0")
    await grpc_server.start()
    await uvicorn.Server(config).serve([listener(ports["h11"])])


def listener(port: Synchronized[int]) -> socket.socket:
    found = socket.create_server(("127.0.0.1", 0), backlog=1024)
    port.value = found.getsockname()[1]
    return found


async def set_value(value: Synchronized[int]) -> int:
    while not value.value:     # noqa: ASYNC110
        await asyncio.sleep(0.01)
    return value.value


async def answer_http(stream: tuple[asyncio.StreamReader, asyncio.StreamWriter], num_tokens: int) -> float:
    """Stream one answer -> seconds until its first token."""
    reader, writer = stream
    body = json.dumps({"model": "m", "prompt": "hello", "max_tokens": num_tokens, "stream": True, "ignore_eos": True,
                       "temperature": 0})
    began_s = time.perf_counter()
    writer.write(f"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
                 f"content-length: {len(body)}\r\n\r\n{body}".encode())
    head = await reader.readuntil(b"data: ")
    first_s = time.perf_counter()
    if b" 200 " not in head.split(b"\r\n")[0]:
        raise RuntimeError(head)
    rest = b""
    while not rest.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
        chunk = await reader.read(1 << 16)
        if not chunk:
            raise RuntimeError("the stream broke")
        rest = (rest + chunk)[-64:]
    return first_s - began_s


async def answer_grpc(stub: InferenceStub, num_tokens: int) -> float:
    began_s, first_s = time.perf_counter(), None
    sampling = pb.Sampling(max_tokens=num_tokens, ignore_eos=True, temperature=0)
    async for _ in stub.Generate(pb.GenerateRequest(model="m", text="hello", sampling=sampling)):
        first_s = first_s or time.perf_counter()
    assert first_s is not None
    return first_s - began_s


async def load(door: str, port: int, num_clients: int, num_tokens: int, num_answers: int) -> tuple[float, list[float]]:
    """Return the seconds that all took, and those to each first token."""
    async def client() -> list[float]:
        if door == "grpc":
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=[
                    ("grpc.use_local_subchannel_pool", 1)]) as channel:
                return [await answer_grpc(InferenceStub(channel), num_tokens) for _ in range(num_answers)]
        stream = await asyncio.open_connection("127.0.0.1", port)
        times = [await answer_http(stream, num_tokens) for _ in range(num_answers)]
        stream[1].close()
        return times
    began_s = time.perf_counter()
    found = await asyncio.gather(*(client() for _ in range(num_clients)))
    return time.perf_counter() - began_s, [first for times in found for first in times]


def cpu_s(processes: list[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def measure(clients: Pool, door: Door, options: argparse.Namespace, num_clients: int) -> Run:
    num_answers = max(1, options.streams // num_clients)
    before_s = cpu_s(door.processes)
    wall_s, firsts = clients.apply(run_load, (door.name, door.port, num_clients, options.tokens, num_answers))
    num_tokens = num_clients * num_answers * options.tokens
    return Run(round(num_tokens / wall_s), round(statistics.median(firsts) * 1e3, 1),
               round((cpu_s(door.processes) - before_s) / num_tokens * 1e6, 1))


def run_load(*arguments: object) -> tuple[float, list[float]]:
    return asyncio.run(load(*arguments))    # type: ignore[arg-type]


@contextlib.contextmanager
def process(work: Callable[[], Coroutine[None, None, None]]) -> Iterator[psutil.Process]:
    """Run the work in a child, on the event loop that Ray has too, until the block is left."""
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
    parser.add_argument("--clients", default="16,64")
    parser.add_argument("--tokens", type=int, default=200, help="of each answer")
    parser.add_argument("--streams", type=int, default=128, help="answers of all clients together")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--doors", default="http,h11,grpc,proxy")
    options = parser.parse_args()
    shard_port = multiprocessing.Value("i", 0)
    ports = {door: multiprocessing.Value("i", 0) for door in ("http", "h11", "grpc")}
    names = options.doors.split(",")
    with (multiprocessing.get_context("fork").Pool(1) as clients, tempfile.TemporaryDirectory() as name,
          contextlib.ExitStack() as stack):
        folder = Path(name) / "checkpoint"
        writer = CheckpointWriter(folder, 1)
        write_tokenizer(writer)
        writer.add_json("config.json", {"vocab_size": NUM_EMBEDDINGS, "eos_token_id": 0})
        stack.enter_context(process(lambda: serve_shard(shard_port)))
        router = stack.enter_context(process(lambda: serve_router(folder, shard_port, ports)))
        doors = [Door(door, asyncio.run(set_value(port)), [router]) for door, port in ports.items() if door in names]
        if "proxy" in names:
            from cluster.device.node import free_port
            proxy_port = free_port()
            doors.append(Door("proxy", proxy_port, stack.enter_context(proxied(folder, shard_port, proxy_port))))
        report(clients, doors, options)


def report(clients: Pool, doors: list[Door], options: argparse.Namespace) -> None:
    print(ROW.format("door", "clients", "tokens/s", "ttft ms", "cpu us", "tokens/s core"))
    found: dict[str, dict[str, object]] = {}
    for num_clients in map(int, options.clients.split(",")):
        runs: dict[str, list[Run]] = {door.name: [] for door in doors}
        for repeat in range(options.repeats + 1):
            for door in doors:
                run = measure(clients, door, options, num_clients)
                runs[door.name] += [run] * (repeat > 0)      # the first warms up
        for name, measured in runs.items():
            median = Run(*(statistics.median(values) for values in zip(*map(astuple, measured), strict=True)))
            print(ROW.format(name, num_clients, *astuple(median), round(1e6 / median.cpu_us_per_token)), flush=True)
            found.setdefault(name, {})[str(num_clients)] = asdict(median)
    print(json.dumps({"benchmark": "doors", **describe(), "tokens_an_answer": options.tokens, "doors": found}))


if __name__ == "__main__":
    main()
